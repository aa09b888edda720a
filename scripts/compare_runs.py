"""
Puts runs side by side: a Markdown table and, with `--plot`, the average after every task.

    python scripts/compare_runs.py runs/* results/digits/*.json --plot curve.png > table.md
    python scripts/compare_runs.py runs/digits --save results/digits/finetune-seed0.json

Inputs are output folders of `train_continual.py` and files that `--save` made. Runs whose configurations differ in
nothing but the seed are one row, with the mean over seeds and its standard error.
"""

import argparse
import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from diffusers_cl.plots import format_number, plot_curves
from diffusers_cl.report import (
    HIGHER_IS_BETTER,
    PLUS_MINUS,
    format_spread,
    headline_metric,
    measurement_note,
    method_name,
    read_json,
)


# What a run measures: equal for any two runs of one table.
DATA_KEYS = (
    "dataset_name",
    "dataset_config_name",
    "train_data_dir",
    "train_split",
    "eval_split",
    "eval_images_per_class",
    "max_train_samples",
    "resolution",
    "resize_mode",
    "feature_extractor_weights_path",
)
# What does not make it another method.
SAME_METHOD_KEYS = ("seed", "num_threads", "license")
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Run:
    """A finished or running run: where it was read, `metrics.json` and, where there is one, `run.json`."""

    path: Path
    metrics: dict
    machine: dict | None

    @property
    def seed(self) -> int:
        return self.metrics["config"]["seed"]

    @property
    def finished(self) -> bool:
        """Whether every task has its row."""
        return len(self.metrics["num_images"][-1]) == len(self.metrics["tasks"])

    @property
    def method(self) -> dict:
        """The configuration without what only tells runs of one method apart."""
        config = self.metrics["config"].items()
        return {key: value for key, value in config if key not in SAME_METHOD_KEYS and value is not None}


def load_run(path: str | Path) -> Run:
    """Returns a run from its output folder or from a results file; raises a `ValueError` that says what is wrong."""
    path = Path(path)
    if path.is_dir():
        if not (path / "metrics.json").exists():
            raise ValueError(
                f"{path}: has no metrics.json: no run of train_continual.py, or none with a finished task"
            )
        machine = path / "run.json"
        content = {"metrics": read_json(path / "metrics.json")}
        content["run"] = read_json(machine) if machine.exists() else None
    else:
        content = read_json(path)
    metrics = content.get("metrics")
    if not isinstance(metrics, dict) or metrics.get("schema") != 1:
        raise ValueError(
            f"{path}: has no metrics of a run in schema 1; give an output folder or a file that --save made"
        )
    return Run(path, metrics, content.get("run"))


def join_result(run: Run, made_by: str | None) -> dict:
    """
    Returns a finished run as one object, the content of a file under `results/`: `metrics` (`metrics.json`), `run`
    (`run.json`), `made_by` and `commit`, of this checkout, with `-dirty` where tracked files were changed and `None`
    where git does not know it.
    """
    if run.machine is None:
        raise ValueError(f"{run.path}: has no run.json")
    if not run.finished:
        raise ValueError(f"{run.path}: not all of its {len(run.metrics['tasks'])} tasks are finished")
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    try:
        commit = subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = None
    return {"metrics": run.metrics, "run": run.machine, "made_by": made_by, "commit": commit}


def check_comparable(runs: list[Run], metric: str) -> None:
    """Raises a `ValueError` if a run lacks the metric or two measured different things, naming them and what differs."""
    for run in runs:
        if metric not in run.metrics["metrics"]:
            raise ValueError(f"{run.path}: has no metric {metric!r}, only {', '.join(run.metrics['metrics'])}")

    def measured(run: Run) -> dict:
        values = {key: run.metrics["config"].get(key) for key in DATA_KEYS}
        values |= {key: run.metrics[key] for key in ("tasks", "feature_extractor")}
        return values | {"images a task": run.metrics["num_images"][-1]}

    first = measured(runs[0])
    for run in runs[1:]:
        for key, value in measured(run).items():
            if value != first[key]:
                raise ValueError(
                    f"{runs[0].path} and {run.path} cannot stand in one table: {key} is {first[key]!r} and {value!r}"
                )


def group_runs(runs: list[Run]) -> dict[str, list[Run]]:
    """
    Returns runs by the name of their method. Methods are the same if their configurations are, up to the seed; where
    two methods have one name, the keys in which they differ follow it.

    Raises:
        ValueError: if one method has one seed twice, naming both runs.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        group = groups.setdefault(json.dumps(run.method, sort_keys=True), [])
        for other in group:
            if other.seed == run.seed:
                raise ValueError(
                    f"{other.path} and {run.path} are the same method with the same seed {run.seed}: give one of them"
                )
        group.append(run)
    named = {}
    for group in groups.values():
        name, method = method_name(group[0].metrics["config"]), group[0].method
        namesakes = [other[0].method for other in groups.values() if method_name(other[0].metrics["config"]) == name]
        keys = sorted({key for other in namesakes for key in {**method, **other} if method.get(key) != other.get(key)})
        notes = ", ".join(f"{key} {json.dumps(method.get(key))}" for key in keys)
        named[f"{name} [{notes}]" if notes else name] = group
    return named


def mean_and_error(values: list[float | None], scale: float, sign: bool = False) -> str:
    """Returns the mean over seeds and, for several, its standard error, with as many decimals as `scale` would get."""
    if None in values:
        return "n/a"
    mean = format_number(np.mean(values), sign, scale)
    if len(values) == 1:
        return mean
    return f"{mean} {PLUS_MINUS} {format_number(np.std(values, ddof=1) / len(values) ** 0.5, scale=scale)}"


def mean_floor(runs: list[Run], metric: str) -> dict | None:
    """Returns the floor, averaged over runs: their held-out images may differ. `None` if the metric has none."""
    floors = [run.metrics["floor"].get(metric) for run in runs]
    if None in floors:
        return None
    mean = {key: np.mean([floor[key] for floor in floors], axis=0).tolist() for key in ("mean", "std", "per_task")}
    return floors[0] | mean


def render_table(groups: dict[str, list[Run]], metric: str) -> str:
    """Returns the comparison in Markdown: a row a method, the best average first, the floor, and how to read it."""
    runs = [run for group in groups.values() for run in group]
    floor = mean_floor(runs, metric)
    results = {name: [run.metrics["metrics"][metric] for run in group] for name, group in groups.items()}
    average = {name: float(np.mean([seed["average"][-1] for seed in seeds])) for name, seeds in results.items()}
    lower, upper = (
        [average[name] for name in groups if name.split(" [")[0] == bound] for bound in ("fine-tuning", "joint")
    )
    gap = lower[0] - upper[0] if len(lower) == len(upper) == 1 else None

    head = ["method", "seeds", "average", "learning", "forgetting", "worst", "per task at the end", "minutes"]
    head += ["gap closed"] if gap else []
    rows = [head, ["---"] * len(head)]
    for name in sorted(groups, key=average.get, reverse=metric in HIGHER_IS_BETTER):
        group, seeds, scale = groups[name], results[name], average[name]
        numbers = ", ".join(str(seed) for seed in sorted(run.seed for run in group))
        row = [name.replace("|", "\\|"), f"{numbers} (n={len(group)})"]
        row.append(mean_and_error([seed["average"][-1] for seed in seeds], scale))
        for key in ("learning", "forgetting", "worst"):
            row.append(mean_and_error([seed[key] for seed in seeds], scale, sign=key == "forgetting"))
        per_task = np.mean([seed["matrix"][-1] for seed in seeds], axis=0)
        row.append(" / ".join(format_number(value, scale=scale) for value in per_task))
        minutes = [run.machine["seconds"]["total"] / 60 for run in group if run.machine]
        row.append(f"{np.mean(minutes):.1f}" if minutes else "n/a")
        row += [f"{(lower[0] - scale) / gap:.0%}"] if gap else []
        rows.append(row)
    if floor:
        per_task = " / ".join(map(format_number, floor["per_task"]))
        row = ["floor (real against real)", "", format_spread(floor["mean"], floor["std"]), "", "", "", per_task]
        rows.append(row + [""] * (len(head) - len(row)))

    devices = sorted({f"{run.machine['device']} ({run.machine['threads']} threads)" for run in runs if run.machine})
    notes = [
        f"`{metric}` ({'higher' if metric in HIGHER_IS_BETTER else 'lower'} is better), mean {PLUS_MINUS} standard "
        "error over n seeds.",
        measurement_note(runs[0].metrics, metric, floor),
        f"Minutes: the whole run, on {', '.join(devices) or 'n/a'}.",
    ]
    if gap:
        notes.append("Gap closed: (fine-tuning - method) / (fine-tuning - joint).")
        if floor and abs(gap) <= floor["std"]:
            notes.append("That gap is itself within the floor's spread: shares of it mean nothing.")
    elif len(lower) > 1 and upper or len(upper) > 1 and lower:
        notes.append("No gap closed: there is more than one fine-tuning or joint method.")
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", " ".join(notes)]) + "\n"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="output folders of train_continual.py, or results files")
    parser.add_argument("--metric", help="the metric of table and plot (default: fid, else the fd_*)")
    parser.add_argument("--plot", type=Path, help="draw the average after every task into this PNG file")
    parser.add_argument("--save", type=Path, help="join one finished run into this results file; makes no table")
    parser.add_argument("--made_by", help="with --save: the command that made the run, as it was typed")
    args = parser.parse_args(argv)
    try:
        runs = [load_run(path) for path in args.runs]
        if args.made_by and not args.save:
            raise ValueError("--made_by belongs to --save")
        if args.save:
            if len(runs) != 1 or args.plot or args.metric:
                raise ValueError("--save takes one run and neither --plot nor --metric")
            result = json.dumps(join_result(runs[0], args.made_by), indent=1)
            args.save.parent.mkdir(parents=True, exist_ok=True)
            args.save.write_text(result + "\n", encoding="utf-8")
            return
        for run in runs:
            if not run.finished:
                print(f"warning: {run.path} is left out: its tasks are not all finished", file=sys.stderr)
        runs = [run for run in runs if run.finished]
        if not runs:
            raise ValueError(f"no finished run among {', '.join(args.runs)}")
        metric = args.metric or headline_metric(runs[0].metrics)
        check_comparable(runs, metric)
        groups = group_runs(runs)
        print(render_table(groups, metric), end="")
        if args.plot:
            curves = {
                name: [run.metrics["metrics"][metric]["average"] for run in group] for name, group in groups.items()
            }
            label = f"average {metric} ({'higher' if metric in HIGHER_IS_BETTER else 'lower'} is better)"
            plot_curves(args.plot, curves, runs[0].metrics["tasks"], label, mean_floor(runs, metric))
    except (ValueError, OSError) as error:
        print(f"compare_runs.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
