"""
Measures what continual learning costs, as ratios against plain descriptions of the same thing, and writes a table.

    python scripts/benchmark.py                                    # or: make benchmark
    python scripts/benchmark.py --device cuda --data ../mnist      # scripts/gpu/README.md
    python scripts/benchmark.py --only penalties

Every ratio of times is the median over repetitions, in each of which both sides were timed one after the other. Where a step is
too long for that, a line says from how many rows it is reckoned. Nothing is downloaded.
"""

import argparse
import platform
import resource
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from benchmarks import estimates, steps
from benchmarks.script import script_steps
from benchmarks.timing import threads

from diffusers_cl.errors import ConfigError
from diffusers_cl.files import write_json
from diffusers_cl.processes import num_cores
from diffusers_cl.record import versions
from diffusers_cl.report import read_json
from diffusers_cl.results import ROOT, checkout_commit
from diffusers_cl.sampling import choose_device


# Of an ImageNet stream.
MANY_TASKS = 20
TASKS = (1, 5, MANY_TASKS)


def parts_on_cpu(device: torch.device, args: argparse.Namespace) -> dict[str, Callable[[], list[dict]]]:
    """Returns what is measured on a CPU, by name: the paper's network with as few rows as say something."""
    rows = {name: steps.rows_of_a_step(name) for name in ("digits", "paper")}
    return {
        "fisher": lambda: [
            *estimates.rank1("digits", 256, 128, device, 5, ">= 15"),
            *estimates.rank1("paper", 4, 4, device, 5, ">= 3.5"),
            estimates.diagonal("digits", 128, 128, device, 5, ">= 2.5"),
            estimates.arithmetic("digits", 128, device, 9),
            estimates.arithmetic("paper", 4, device, 9),
        ],
        # As configs/digits.yaml has it: images so small keep one thread busy.
        "penalties": lambda: [
            *steps.penalties("digits", rows["digits"], rows["digits"], TASKS, device, 15, num_threads=1),
            *steps.penalties("paper", 4, rows["paper"], (MANY_TASKS,), device, 5),
        ],
        "memory": lambda: estimates.memory("digits", MANY_TASKS, device),
        "sampling": lambda: [
            estimates.sampling("digits", 512, 256, 10, device, 5),
            estimates.sampling("paper", 4, 4, 5, device, 5),
        ],
        "script": lambda: script_steps(args.preset, args.data, device, 60),
        "options": lambda: [
            *steps.precisions("digits", rows["digits"], device, 7, compiled=True),
            *steps.precisions("paper", 4, device, 5, compiled=False),
        ],
    }


def parts_on_gpu(device: torch.device, args: argparse.Namespace) -> dict[str, Callable[[], list[dict]]]:
    """Returns what is measured on a GPU, by name: both networks at the sizes of their presets."""
    rows = steps.rows_of_a_step("paper")
    return {
        "fisher": lambda: [
            *estimates.rank1("digits", 512, 128, device, 5, ">= 100"),
            *estimates.rank1("paper", 256, 128, device, 5, ">= 100"),
            estimates.diagonal("digits", 512, 128, device, 5, ">= 20"),
            estimates.diagonal("paper", 64, 64, device, 5, ">= 20"),
        ],
        "penalties": lambda: steps.penalties("paper", rows, rows, TASKS, device, 9),
        "memory": lambda: estimates.memory("paper", MANY_TASKS, device),
        "sampling": lambda: [estimates.sampling("paper", 2000, 500, 10, device, 5)],
        "script": lambda: script_steps(args.preset, args.data, device, 60),
        "options": lambda: steps.precisions("paper", rows, device, 9, compiled=True),
    }


def whole_run(run: Path, epochs: int) -> dict:
    """
    Returns how long a run would take with so many epochs a task, from one with fewer: the seconds of training grow with the
    epochs, those of replay, Fisher and evaluation are as they are.

    Args:
        run (`Path`): an output folder, finished, whose `num_train_epochs` decided its length.
        epochs (`int`).
    """
    record, config = read_json(run / "run.json"), read_json(run / "metrics.json")["config"]
    if config["max_train_steps"] is not None:
        raise ValueError(
            f"{run}: max_train_steps is {config['max_train_steps']}; allowed: null, so that epochs decide"
        )
    seconds = dict(record["seconds"])
    total, train = seconds.pop("total"), seconds["train"]
    expected = total + train * (epochs / config["num_train_epochs"] - 1)
    about = {"run": run.name, "epochs": epochs, "of epochs": config["num_train_epochs"], "seconds": seconds}
    return {"what": "whole run, minutes", "minutes": expected / 60, **about, "device": record["device"]}


def table(on_cpu: dict, on_gpu: dict | None = None, all_lines: bool = False) -> str:
    """
    Returns the lines of one or two files as Markdown, those with a target or all; a line is known by what and which network it
    measures.
    """
    others = {(line["what"], line["network"]): line for line in (on_gpu or {"lines": []})["lines"]}
    lines = {(line["what"], line["network"]): line for line in on_cpu["lines"]}
    heads = [
        f"{on_cpu['threads']} CPU cores, median (least to largest)",
        "target",
        on_gpu["device"] if on_gpu else "one GPU",
        "target",
    ]
    text = [f"| what | network | {' | '.join(heads)} |", "| --- |" + " --- |" * 5]
    for key in {**lines, **others}:
        if not all_lines and not any(key in found and found[key]["target"] for found in (lines, others)):
            continue
        number = lines[key]["threads"] if key in lines else on_cpu["threads"]
        cells = [key[0], key[1] + (f", {number} thread" if number != on_cpu["threads"] else "")]
        for line in (lines.get(key), others.get(key)):
            if line is None:
                cells += ["", ""]
                continue
            ratio, least, largest = (f"{line[name]:.3f}" for name in ("ratio", "least", "largest"))
            word = {None: "", True: "", False: ": **not reached**"}[line["reached"]]
            cells += [f"{ratio} ({least} to {largest})", f"{line['target'] or ''}{word}"]
        text.append(f"| {' | '.join(cells)} |")
    return "\n".join(text)


def main(argv: list[str] | None = None) -> int:
    """Runs the script and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--device", help="such as cuda; by default the CPU")
    parser.add_argument("--threads", type=int, default=num_cores(), help="of the CPU")
    parser.add_argument("--preset", default="digits", help="a name in configs/, for the script's own step")
    parser.add_argument("--data", help="its dataset_name: a dataset on the Hub or a folder")
    parser.add_argument("--only", nargs="+", help="these parts: fisher, penalties, memory, sampling, script, options")
    parser.add_argument(
        "--run", type=Path, help="extrapolate this short run of configs/mnist.yaml, and measure nothing"
    )
    parser.add_argument("--epochs", type=int, default=200, help="a task, for --run")
    parser.add_argument("--output", type=Path, help="a JSON file; default results/benchmark-<device>.json")
    parser.add_argument(
        "--table", type=Path, nargs="+", help="print what has a target, of one or two files, and measure nothing"
    )
    args = parser.parse_args(argv)
    if args.run is not None or args.table is not None:
        print(whole_run(args.run, args.epochs) if args.table is None else table(*map(read_json, args.table)))
        return 0
    try:
        device = choose_device(args.device or "cpu")
    except ConfigError as error:
        parser.error(str(error))
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    about = {
        "device": name,
        "threads": args.threads,
        "host": f"{platform.machine()} {platform.system()}, {num_cores()} cores",
        "versions": versions(),
    }
    parts = (parts_on_gpu if device.type == "cuda" else parts_on_cpu)(device, args)
    if unknown := set(args.only or []) - set(parts):
        parser.error(f"--only {' '.join(sorted(unknown))}; allowed: {', '.join(parts)}")
    output = args.output or ROOT / "results" / f"benchmark-{name.lower().replace(' ', '-')}.json"
    # Parts that are not measured now stay as they are, if they are of the same machine.
    content = read_json(output) if args.only and output.exists() else {"parts": {}, "lines": []}
    if content["parts"] and any(content[key] != value for key, value in about.items()):
        parser.error(
            f"{output} is of another machine, other threads or other versions; allowed: all parts, or another --output"
        )
    # Writing the results would make it look changed.
    commit = checkout_commit()
    for part in args.only or parts:
        start = time.perf_counter()
        print(f"Measuring: {part}", file=sys.stderr, flush=True)
        with threads(args.threads):
            measured = [{"part": part, **line} for line in parts[part]()]
        content["parts"][part] = {"minutes": (time.perf_counter() - start) / 60, "commit": commit}
        if device.type == "cuda":
            content["parts"][part]["peak_memory_gib"] = torch.cuda.max_memory_allocated() / 2**30
            torch.cuda.reset_peak_memory_stats()
        else:
            # Of all parts that this process has measured: the system does not forget.
            content["peak_memory_gib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        lines = [line for line in content["lines"] if line["part"] != part] + measured
        content |= {**about, "lines": sorted(lines, key=lambda line: list(parts).index(line["part"]))}
        write_json(output, content)
    print(table(content, all_lines=True))
    return 0


if __name__ == "__main__":
    sys.exit(main())
