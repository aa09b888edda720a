"""
Follows v along a run: how it, its second moment, the curvature along it and the top Gauss-Newton eigenvector move with steps.

    python scripts/experiments/trajectory.py RUN --output FILE.json [--plot FILE.png]

RUN is an output folder of train_continual.py as direction.py (E1) takes it, with `checkpoints_total_limit: null`, so that
checkpoints of the whole run are there. With EMA every step gives two rows, raw and EMA weights.
"""

import argparse
import sys
import time
from pathlib import Path

import numpy as np
import torch
from direction import Task, by_name, cosine, flat, losses
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from diffusers_cl import along, fisher
from diffusers_cl.errors import DataError, RunError
from diffusers_cl.files import write_json
from diffusers_cl.gauss_newton import top_gauss_newton
from diffusers_cl.passes import estimating
from diffusers_cl.plots import format_number


# Steps at which the run is looked at, and so many before each, to see how v moves meanwhile.
STEPS, BACK = (20, 100, 200, 400, 700), 10
# Draws of v, in units of the task's images; of all that is measured along it.
ROUNDS, DRAWS = 4, 256
BLOCK, NUM_ITERATIONS = 2, 4
COLUMNS = {
    "cosine_back": f"abs cos of v to v {BACK} steps before",
    "cosine_other_draws": "abs cos of v to v of other draws",
    "second_moment": "second moment m",
    "curvature": "curvature along v",
    "direction_share": "m / trace",
    "gauss_newton": "top Gauss-Newton eigenvalue",
    "gauss_newton_cosine": "abs cos of v to its eigenvector",
}


def predict(model, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Returns the network's prediction for `(noisy_images, timesteps, class_labels, target)`."""
    return model(batch[0], batch[1], class_labels=batch[2]).sample


def direction_at(task: Task, variant: str, step: int, purpose: str) -> torch.Tensor:
    """Returns the mean gradient of the task's images at a step, `(parameters,)` float64."""
    draws = task.draws("old", purpose, ROUNDS * len(task.rows["old"]))
    return flat(fisher.mean_gradient(task.network(variant, step), losses, draws)[0])


def measure(task: Task, variant: str, step: int) -> dict:
    """Returns what there is to say about v at one step of the run."""
    unet, mu = task.network(variant, step), direction_at(task, variant, step, "v")
    v, batches = mu / mu.norm(), list(task.draws("old", "held out", DRAWS))
    named = by_name(v, unet)
    with estimating(unet):
        m = torch.cat([along.projections(unet, losses, b, named) for b in batches]).double().square().mean().item()
    trace, _ = fisher.gradient_trace(unet, losses, batches, 64, chunk_size=8)
    vectors, values, residual = top_gauss_newton(unet, predict, batches, v, BLOCK, NUM_ITERATIONS)
    return {
        "variant": variant,
        "step": step,
        "cosine_back": cosine(mu, direction_at(task, variant, step - BACK, "v again")) if step > BACK else None,
        "cosine_other_draws": cosine(mu, direction_at(task, variant, step, "v again")),
        "second_moment": m,
        "curvature": along.curvature_along(unet, losses, batches, named)[0],
        "direction_share": m / trace,
        "gauss_newton": values[0],
        "gauss_newton_residual": residual,
        "gauss_newton_cosine": cosine(v, vectors[0]),
    }


def table(rows: list[dict]) -> str:
    """Returns the Markdown table: a row a step and variant."""
    lines = [f"| step | weights | {' | '.join(COLUMNS.values())} |", "|---" * (2 + len(COLUMNS)) + "|"]
    for row in sorted(rows, key=lambda row: (row["variant"], row["step"])):
        cells = " | ".join(format_number(row[name]) for name in COLUMNS)
        lines.append(f"| {row['step']} | {row['variant']} | {cells} |")
    return "\n".join(lines)


def plot(path: Path, rows: list[dict]) -> None:
    """Saves every quantity over steps, a line a variant."""
    figure = Figure(figsize=(10, 6), layout="constrained")
    grid = figure.subplots(2, 3, sharex=True)
    shown = [name for name in COLUMNS if name != "cosine_other_draws"]
    for axes, name in zip(grid.flat, shown, strict=True):
        for number, variant in enumerate(dict.fromkeys(row["variant"] for row in rows)):
            chosen = [row for row in rows if row["variant"] == variant]
            values = np.array([row[name] for row in chosen], dtype=float)
            axes.plot([row["step"] for row in chosen], values, marker="o", color=f"C{number}", label=variant)
        axes.set_title(COLUMNS[name], fontsize=9)
        axes.set_ylim(0, 1.02 if "cosine" in name else None)
        axes.grid(alpha=0.3)
    for axes in grid[-1]:
        axes.set_xlabel("optimizer step")
    grid[0, 0].legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=100, facecolor="white")


def main(argv: list[str] | None = None) -> int:
    """Runs the script and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("run", type=Path, help="an output folder of train_continual.py")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file to write")
    parser.add_argument("--plot", type=Path, default=None, help="a PNG file to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    start = time.process_time()
    try:
        task = Task(args.run)
        steps, rows = [step for step in STEPS if step <= task.last_step], []
        for variant, step in tqdm([(variant, step) for variant in task.variants for step in steps], unit="step"):
            rows.append(measure(task, variant, step))
            about = {"seed": task.config.seed, "torch": torch.__version__, "device": "cpu", "threads": 1}
            about |= {"draws_of_v": ROUNDS * len(task.rows["old"]), "draws_along_v": DRAWS}
            write_json(args.output, {**about, "cpu_seconds": time.process_time() - start, "rows": rows})
    except (RunError, OSError) as error:
        print(f"trajectory.py: error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", DataError.exit_code)
    print(table(rows))
    if args.plot is not None:
        plot(args.plot, rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())
