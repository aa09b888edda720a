"""
Says whether a new model may be released: whether it draws every class that an old one knew as well as that did.

    python scripts/gate.py runs/digits/task-00 runs/digits/task-04 --output_dir gate
    python scripts/gate.py me/digits-task-04 runs/candidate/task-05 --max_regression 0.1

Both sample from the same noise, and the extractor and the reference statistics that travel with OLD measure them: no data is
needed. Exit code 0 when nothing got worse, 1 when something did; 2, 3 and 4 for faults.
"""

import argparse
import json
import sys
from pathlib import Path

from diffusers_cl.changes import MIN_IMAGES
from diffusers_cl.config import TrainingConfig
from diffusers_cl.errors import RunError, StorageError
from diffusers_cl.gate import gate_lines, open_measure, open_model, plot_side_by_side, run_gate, sample_both
from diffusers_cl.sampling import choose_device


def number(kind: type, low: float, high: float = float("inf"), name: str = "number"):
    """Returns a type of command line values: numbers of a kind, from `low` to below `high`."""

    def parse(text: str):
        value = kind(text)
        if not low <= value < high:
            raise ValueError
        return value

    parse.__name__ = name
    return parse


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the options, from the command line by default."""
    images = number(int, MIN_IMAGES, name=f"number from {MIN_IMAGES}")
    positive, share = number(int, 1, name="number from 1"), number(float, 0, 1, name="number from 0 to below 1")
    parser = argparse.ArgumentParser(description="Compares every class that OLD knows between two models.")
    parser.add_argument("old", metavar="OLD", help="A task folder or Hub repo.")
    parser.add_argument("new", metavar="NEW", help="Another; it has to know all classes of OLD, by name.")
    parser.add_argument("--old_revision", help="Branch, tag or commit of OLD, where that is a repo.")
    parser.add_argument("--new_revision", help="The same of NEW.")
    parser.add_argument("--num_images", type=images, default=100, help="Images a class (default: 100).")
    parser.add_argument("--seed", type=int, default=0, help="Of the noise.")
    parser.add_argument("--num_inference_steps", type=positive, help="Default: those that OLD was measured with.")
    parser.add_argument("--batch_size", type=positive, default=64, help="Images in one forward pass.")
    parser.add_argument(
        "--resamplings",
        type=number(int, 100, name="number from 100"),
        default=1000,
        help="For the intervals (default: 1000).",
    )
    parser.add_argument(
        "--confidence",
        type=share,
        default=0.95,
        help="Of all intervals together: with more classes each is longer, so that chance alone seldom fails a model (default: 0.95).",
    )
    parser.add_argument(
        "--max_regression",
        type=number(float, 0, name="number from 0"),
        default=0.0,
        help="How much worse is allowed: 0.1 is ten per cent of OLD's distance, for distances, and 0.1 of accuracy (from"
        " 95%% to 85%%). A class fails when the whole interval of its change is beyond. Default: 0.",
    )
    parser.add_argument("--output_dir", type=Path, default=Path("gate"), help="Gets gate.json, gate.md and gate.png.")
    parser.add_argument("--device", help="Default: the accelerator where there is one, else the CPU.")
    parser.add_argument("--cache_dir", help="Where downloads are kept.")
    parser.add_argument(
        "--feature_extractor",
        help="Where OLD's extractor is now, if it was a transformers image classifier in a folder. Its weights are checked.",
    )
    parser.add_argument("--feature_extractor_weights_path", help="Inception weights that are already on this machine.")
    return parser.parse_args(argv)


def gate(args: argparse.Namespace) -> bool:
    """
    Compares, prints and writes what `args` asks for.

    Returns:
        `bool`: whether nothing got worse.

    Raises:
        ConfigError: for models that cannot be compared, and a device that is not there.
        DataError: when a repo or the extractor cannot be had.
        CheckpointError: for a task folder that is not whole.
        StorageError: when the output folder cannot be written.
    """
    device = choose_device(args.device)
    old = open_model(args.old, args.old_revision, device, args.cache_dir)
    new = open_model(args.new, args.new_revision, device, args.cache_dir)
    recorded = old.start.state["config"]
    config = TrainingConfig(
        feature_extractor=args.feature_extractor or recorded["feature_extractor"],
        feature_extractor_weights_path=args.feature_extractor_weights_path,
    )
    references, extractor = open_measure(old, config, device)
    num_inference_steps = args.num_inference_steps or recorded["eval_num_inference_steps"]
    images = sample_both(old, new, args.num_images, args.seed, num_inference_steps, args.batch_size)
    result = run_gate(
        old,
        new,
        references,
        extractor,
        images,
        seed=args.seed,
        resamplings=args.resamplings,
        confidence=args.confidence,
        max_regression=args.max_regression,
    )
    result["num_inference_steps"] = num_inference_steps
    table = "\n".join(gate_lines(result)) + "\n"
    try:
        args.output_dir.mkdir(parents=True, exist_ok=True)
        (args.output_dir / "gate.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        heading = f"# {old.name} and {new.name}\n\n"
        (args.output_dir / "gate.md").write_text(f"{heading}{table}\n![Old and new](gate.png)\n", encoding="utf-8")
        plot_side_by_side(args.output_dir / "gate.png", images, result)
    except OSError as error:
        raise StorageError(f"cannot write {args.output_dir}: {error.strerror or error}") from error
    print(table)
    print(args.output_dir / "gate.png")
    return result["passed"]


def main() -> None:
    """Runs the script; what the user can mend ends it with one line and the fault's exit code."""
    try:
        passed = gate(parse_args())
    except RunError as error:
        print(f"gate.py: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    sys.exit(0 if passed else 1)


if __name__ == "__main__":
    main()
