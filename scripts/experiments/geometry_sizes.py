"""
Compares the eigenvalues of several checkpoints, of other sizes or trained for longer: the paper's Figure 6.

    python scripts/experiments/geometry_sizes.py NAME=geometry.json [NAME=geometry.json ...] --output FILE.json [--plot FILE.png]

Each geometry.json is of scripts/analyze_fisher.py with the same timesteps and number of samples.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from diffusers_cl.errors import ConfigError, RunError
from diffusers_cl.files import read_json, write_json
from diffusers_cl.plots import format_number


KEPT = ("t", "loss", "ratio", "rank1_error", "diagonal_error", "signal_ratio", "eigenvalues")


def load(argument: str) -> dict:
    """Returns name, size and timesteps of a `NAME=FILE` argument; anything else is a `ConfigError`."""
    name, _, file = argument.partition("=")
    if not name or not file:
        raise ConfigError(f"{argument!r} is not NAME=FILE")
    content = read_json(file)
    if "timesteps" not in content:
        raise ConfigError(f"{file} has no timesteps; allowed: geometry.json of the part timesteps")
    rows = [
        {**{key: row[key] for key in KEPT}, "mean_cosine": float(np.mean(row["cosines"]))}
        for row in content["timesteps"]["rows"]
    ]
    return {
        "name": name,
        "num_parameters": content["num_parameters"],
        "data": content["data"],
        "num_samples": content["timesteps"]["rows"][0]["num_samples"],
        "rows": rows,
    }


def check(models: list[dict]) -> None:
    """Raises `ConfigError` for models that were measured differently."""
    asked = {(tuple(row["t"] for row in model["rows"]), model["num_samples"]) for model in models}
    if len(asked) > 1:
        raise ConfigError("the files have different timesteps or numbers of samples; allowed: the same ones")


def table(models: list[dict]) -> str:
    """Returns the Markdown table: a row a model, lambda_2 / lambda_1 by timestep."""
    t = [row["t"] for row in models[0]["rows"]]
    head = ["model", "parameters", *(f"t = {value}" for value in t), "lowest at", "mean loss"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for model in models:
        cells = [format_number(row["ratio"]) for row in model["rows"]]
        lowest = min(model["rows"], key=lambda row: row["ratio"])["t"]
        loss = format_number(float(np.mean([row["loss"] for row in model["rows"]])))
        size = f"{model['num_parameters']:,}"
        lines.append(f"| {' | '.join([model['name'], size, *cells, str(lowest), loss])} |")
    return "\n".join(lines)


def plot(path: Path, models: list[dict]) -> None:
    """Saves the first five eigenvalues (left, of the first and last model) and the ratio of all."""
    figure = Figure(figsize=(12, 3.9), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    for axes, model in ((left, models[0]), (middle, models[-1])):
        t = [row["t"] for row in model["rows"]]
        for i in range(5):
            axes.plot(t, [row["eigenvalues"][i] for row in model["rows"]], marker="osD^v"[i], label=f"lambda_{i + 1}")
        axes.set(yscale="log", xlabel="timestep t", title=f"eigenvalues, {model['name']}")
        axes.legend(fontsize=7, frameon=False)
        axes.grid(alpha=0.3)
    for number, model in enumerate(models):
        t, values = zip(*((row["t"], row["ratio"]) for row in model["rows"]), strict=True)
        right.plot(t, values, marker="osD^v"[number % 5], color=f"C{number}", label=model["name"])
    right.set(xlabel="timestep t", title="lambda_2 / lambda_1", ylim=(0, None))
    right.legend(fontsize=7, frameon=False)
    right.grid(alpha=0.3)
    figure.savefig(path, dpi=100, facecolor="white")


def main(argv: list[str] | None = None) -> int:
    """Runs the script and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("models", nargs="+", metavar="NAME=FILE", help="what a model is called, and its geometry.json")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file to write")
    parser.add_argument("--plot", type=Path, default=None, help="a PNG file to write")
    args = parser.parse_args(argv)
    try:
        models = [load(argument) for argument in args.models]
        check(models)
        write_json(args.output, {"models": models})
    except (RunError, OSError) as error:
        print(f"geometry_sizes.py: error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", ConfigError.exit_code)
    print(table(models))
    if args.plot is not None:
        plot(args.plot, models)
    return 0


if __name__ == "__main__":
    sys.exit(main())
