"""
Measures the geometry of a checkpoint's per-sample gradients: whether the empirical Fisher is rank-1, and what its direction is.

    python scripts/analyze_fisher.py --model runs/digits/task-04 --data digits --output_dir geometry

Writes report.html, report.md, geometry.json and plots. The same command goes on after the timesteps that are done, and
writes the report again where all are. Exit code 0 when all is written; 2, 3, 4, 5 and 6 for faults and 130 for Ctrl-C, as
train_continual.py.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from diffusers_cl.analysis import PARTS, Options, analysis_inputs, analyze, check_options
from diffusers_cl.errors import ConfigError, RunError, StorageError
from diffusers_cl.files import read_json, remove_folder
from diffusers_cl.geometry_report import describe, write_geometry
from diffusers_cl.processes import num_cores
from diffusers_cl.sampling import choose_device
from diffusers_cl.subject import open_subject


TIMESTEPS = list(range(100, 1000, 100))
# Per-sample gradients a timestep, by default.
DIGITS_SAMPLES, OTHER_SAMPLES = 256, 1024


def number(kind: type, low: float):
    """Returns a type of command line values: numbers of a kind, from `low` on (above it, for `float`)."""

    def parse(text: str):
        value = kind(text)
        if not (low <= value if kind is int else low < value < float("inf")):
            raise ValueError
        return value

    parse.__name__ = f"number from {low}" if kind is int else f"number above {low}"
    return parse


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the options, from the command line by default."""
    parser = argparse.ArgumentParser(description="Measures the geometry of a checkpoint's per-sample gradients.")
    parser.add_argument(
        "--model", required=True, help="A task folder, a folder with unet and scheduler, or a Hub repo."
    )
    parser.add_argument("--revision", help="Branch, tag or commit of the repo.")
    parser.add_argument(
        "--data", required=True, help="digits, a folder of images or a dataset: with the model's classes, by name."
    )
    parser.add_argument(
        "--output_dir", type=Path, required=True, help="Gets report.html, report.md, geometry.json, plots."
    )
    parser.add_argument(
        "--num_samples",
        type=number(int, 1),
        help=f"N, gradients a timestep (default: {DIGITS_SAMPLES} for digits, else {OTHER_SAMPLES}, the paper's).",
    )
    parser.add_argument(
        "--timesteps", type=number(int, 0), nargs="+", default=TIMESTEPS, help="Default: 100, 200, ..., 900."
    )
    parser.add_argument(
        "--memory_gib",
        type=number(float, 0),
        default=4.0,
        help="For the gradients at a time, beside the network: less takes more passes (default: 4).",
    )
    parser.add_argument("--batch_size", type=number(int, 1), default=128, help="Rows of everything else.")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=PARTS,
        default=list(PARTS),
        help="What is measured: timesteps alone is the paper's, the others answer its critique (default: all).",
    )
    parser.add_argument(
        "--resize_mode", choices=["pad", "resize"], help="For images that are not of the network's size."
    )
    parser.add_argument("--seed", type=int, default=0, help="Of every draw.")
    parser.add_argument("--num_threads", type=number(int, 1), help="CPU threads (default: the cores that there are).")
    parser.add_argument("--device", help="Default: the accelerator where there is one, else the CPU.")
    parser.add_argument("--cache_dir", help="Where downloads are kept.")
    return parser.parse_args(argv)


def finished(output_dir: Path, inputs: dict) -> dict | None:
    """Returns what was measured in the output folder of the same model, data and options, if it is there."""
    path = output_dir / "geometry.json"
    content = read_json(path) if path.exists() else {}
    return content if content.get("inputs") == json.loads(json.dumps(inputs)) else None


def run(args: argparse.Namespace) -> Path:
    """
    Measures and writes what `args` asks for.

    Returns:
        `Path`: the report.

    Raises:
        ConfigError, DataError, CheckpointError: before any work, for a model or data that do not fit, and impossible options.
        NonFiniteError: when a gradient, loss or eigenvalue is not finite.
        StorageError: when the output folder cannot be written.
    """
    if len(set(args.timesteps)) < len(args.timesteps):
        raise ConfigError(f"--timesteps is {args.timesteps}; allowed: every timestep once")
    torch.set_num_threads(args.num_threads or num_cores())
    device = choose_device(args.device)
    subject = open_subject(
        args.model, args.data, device, args.seed, args.revision, args.resize_mode, cache_dir=args.cache_dir
    )
    samples = args.num_samples or (DIGITS_SAMPLES if args.data == "digits" else OTHER_SAMPLES)
    options = Options(samples, sorted(args.timesteps), args.memory_gib, args.batch_size, tuple(args.parts))
    check_options(subject, options)
    shards = args.output_dir / "shards"
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        result = finished(args.output_dir, analysis_inputs(subject, options))
        result = result or describe(subject, args.model) | analyze(subject, options, shards)
        report = write_geometry(args.output_dir, result)
    except OSError as error:
        raise StorageError(f"cannot write {args.output_dir}: {error.strerror or error}") from error
    remove_folder(shards)
    return report


def main(argv: list[str] | None = None) -> None:
    """Runs the script; what the user can mend ends it with one line and the fault's exit code."""
    try:
        print(run(parse_args(argv)))
    except RunError as error:
        print(f"analyze_fisher.py: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        print("analyze_fisher.py: interrupted; the same command goes on after what is done", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
