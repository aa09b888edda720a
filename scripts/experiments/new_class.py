"""
What one more class costs against training the joint model from scratch: a curve of quality against time.

    python scripts/experiments/new_class.py --preset digits --output results/new_class/digits.json
    python scripts/experiments/new_class.py --preset mnist_small --data ../mnist --output results/new_class/mnist_small.json

For every seed a joint model learns all ten classes; the preset's stream learns the first nine, and from its last task folder the
tenth is learned in so many steps, by every method; all through train_continual.py, with the preset's settings but for what a
row names. Seconds are those of generating and of training (on a CPU, CPU seconds), without starting and measuring. What is done already is skipped.
"""

import argparse
import itertools
import statistics
import subprocess
import sys
from pathlib import Path

from matplotlib.figure import Figure

from diffusers_cl.files import write_json
from diffusers_cl.folders import task_folder
from diffusers_cl.plain_yaml import load_yaml
from diffusers_cl.report import headline_metric, read_json
from diffusers_cl.results import ROOT, portable_name


# As entries of the task matrix: the last is the new class.
TASKS = [[0, 1], [2, 3], [4, 5], [6, 7], [8], [9]]
METHODS = {
    # Two steps of the teacher do as well as 50 on digits: results/digits/replay.
    "distillation": ["--replay", "generative_distillation", "--replay_num_inference_steps", "2"],
    "lwf": ["--replay", "lwf"],
}
STEPS = (25, 50, 100, 200, 400)
TICKS = (0.01, 0.02, 0.05, 0.1, 0.2, 0.5)
# How near the joint model's average is near enough.
TOLERANCE = 1.05


def run(folder: Path, *arguments: str | Path) -> dict:
    """Returns what a run of the script left behind, after running it if it is not finished."""
    status = folder / "status.json"
    if not status.exists() or read_json(status)["exit_code"] != 0:
        command = [sys.executable, "train_continual.py", *map(str, arguments), "--output_dir", str(folder.resolve())]
        with open(folder.with_suffix(".log"), "w") as log:
            subprocess.run(command, cwd=ROOT, check=True, stdout=log, stderr=subprocess.STDOUT)
    metrics, record = read_json(folder / "metrics.json"), read_json(folder / "run.json")
    name = headline_metric(metrics)
    row = metrics["metrics"][name]["matrix"][-1]
    # On a CPU those that the process had, whatever else the machine did.
    clock = "cpu_seconds" if record["device"] == "cpu" else "seconds"
    seconds = {phase: record[clock].get(phase, 0.0) for phase in ("replay", "train")}
    found = {"metric": name, "average": statistics.fmean(row), "old": statistics.fmean(row[:-1]), "new": row[-1]}
    images = {"trained": record["images"]["trained"], "replayed": record["images"]["replayed"]}
    first = metrics["first_task"]
    images["generated"] = record["images"]["generated"] - sum(map(sum, metrics["num_images"][first:]))
    about = {key: record[key] for key in ("device", "threads", "versions")}
    return {**found, "clock": clock, "seconds": seconds, "images": images, **about}


def of_seed(seed: int, preset: str, dataset_name: str, runs_dir: Path) -> list[dict]:
    """Returns the rows of one seed: the joint model, the first nine classes, and every method and number of steps."""
    own = ["--dataset_name", dataset_name, "--report_to", "none", "--seed", str(seed)]
    base = ["--config", f"configs/{preset}.yaml", *own, "--classes_per_task", "null"]
    folder = runs_dir / f"seed{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    joint = [*base, "--config", "configs/methods/joint.yaml", "--tasks", str(TASKS)]
    rows = [{"method": "joint", **run(folder / "joint", *joint)}]
    rows.append({"method": "first nine", **run(folder / "nine", *base, "--tasks", str(TASKS[:-1]))})
    start = task_folder((folder / "nine").resolve(), len(TASKS) - 2)
    # Settings come from there; the threads are a machine's own.
    going_on = ["--pretrained_model_name_or_path", start, *own, "--num_threads", str(rows[-1]["threads"])]
    for (method, settings), steps in itertools.product(METHODS.items(), STEPS):
        arguments = [*going_on, *settings, "--tasks", str(TASKS[-1:]), "--max_train_steps", str(steps)]
        rows.append({"method": method, "steps": steps, **run(folder / f"{method}-{steps}", *arguments)})
    return [{"seed": seed, **row} for row in rows]


def summarize(rows: list[dict]) -> list[dict]:
    """Returns, for every method and number of steps, means over seeds of quality and cost in units of the joint model's."""
    joint = {row["seed"]: row for row in rows if row["method"] == "joint"}
    summary = []
    for method, steps in itertools.product(METHODS, STEPS):
        group = [row for row in rows if (row["method"], row.get("steps")) == (method, steps)]
        if not group:
            continue

        def mean(value, group=group) -> float:
            return statistics.fmean(value(row) / value(joint[row["seed"]]) for row in group)

        quality = mean(lambda row: row["average"])
        summary.append(
            {
                "method": method,
                "steps": steps,
                "seeds": len(group),
                "average / joint's": quality,
                "range": [f(row["average"] / joint[row["seed"]]["average"] for row in group) for f in (min, max)],
                "near enough": quality <= TOLERANCE,
                "seconds / joint's": mean(lambda row: sum(row["seconds"].values())),
                "images seen / joint's": mean(lambda row: row["images"]["trained"] + row["images"]["replayed"]),
                "images generated": statistics.fmean(row["images"]["generated"] for row in group),
            }
        )
    return summary


def table(summary: list[dict]) -> str:
    """Returns the summary as Markdown; what is near enough stands in bold."""
    heads = ["method", "steps", "average / joint's", "seconds / joint's", "images seen / joint's", "images generated"]
    text = [f"| {' | '.join(heads)} |", "| --- |" + " --- |" * (len(heads) - 1)]
    for row in summary:
        quality = f"{row[heads[2]]:.2f}" + f" ({row['range'][0]:.2f} to {row['range'][1]:.2f})" * (row["seeds"] > 1)
        shares = [f"{row[head]:.1%}" for head in heads[3:5]]
        quality = f"**{quality}**" if row["near enough"] else quality
        text.append(f"| {' | '.join([row['method'], str(row['steps']), quality, *shares, f'{row[heads[5]]:.0f}'])} |")
    return "\n".join(text)


def plot(path: Path, summary: list[dict], title: str) -> None:
    """Saves the curves: the average in units of the joint model's against the time in units of its time."""
    figure = Figure(figsize=(6.5, 4.2), layout="constrained")
    axes = figure.add_subplot()
    for number, method in enumerate(METHODS):
        points = [row for row in summary if row["method"] == method]
        if not points:
            continue
        x, y = ([row[key] for row in points] for key in ("seconds / joint's", "average / joint's"))
        low, high = zip(*(row["range"] for row in points), strict=True)
        axes.fill_between(x, low, high, color=f"C{number}", alpha=0.15, linewidth=0)
        axes.plot(x, y, marker="o", color=f"C{number}", label=method)
        for row, left, top in zip(points, x, y, strict=True):
            axes.annotate(str(row["steps"]), (left, top), textcoords="offset points", xytext=(4, 5), fontsize=8)
    axes.axhline(TOLERANCE, color="0.4", linestyle="--", linewidth=1, label=f"{TOLERANCE} times the joint model's")
    axes.axvline(0.1, color="0.4", linestyle=":", linewidth=1, label="a tenth of its time")
    axes.set(
        xlabel="seconds / those of the joint model", ylabel="average / the joint model's", xscale="log", title=title
    )
    axes.set_xticks(TICKS, list(map(str, TICKS)))
    axes.minorticks_off()
    axes.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=120, facecolor="white")


def main(argv: list[str] | None = None) -> int:
    """Runs the script and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--preset", required=True, choices=("digits", "mnist_small"), help="a name in configs/")
    parser.add_argument("--data", help="dataset_name: a dataset on the Hub or a folder")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--runs_dir", type=Path, default=Path("runs/new_class"), help="the runs' folders, by preset")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file to write")
    parser.add_argument("--plot", type=Path, help="a PNG file to write")
    args = parser.parse_args(argv)
    preset = load_yaml((ROOT / "configs" / f"{args.preset}.yaml").read_text())
    dataset_name = preset["dataset_name"] if args.data is None else str(Path(args.data).resolve())
    command = (
        f"python scripts/experiments/new_class.py --preset {args.preset} --seeds {' '.join(map(str, args.seeds))}"
    )
    content = {"made_by": command + (f" --data {portable_name(args.data)}" if args.data else "")}
    content |= {"preset": args.preset, "tasks": TASKS, "tolerance": TOLERANCE, "rows": []}
    for seed in args.seeds:
        content["rows"] += of_seed(seed, args.preset, dataset_name, args.runs_dir / args.preset)
        content["summary"] = summarize(content["rows"])
        write_json(args.output, content)
        if args.plot is not None:
            plot(args.plot, content["summary"], f"One more class, {args.preset}, {len(args.seeds)} seed(s)")
    print(table(content["summary"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
