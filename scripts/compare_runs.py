"""
Puts runs side by side: a Markdown table and, with `--plot`, the average after every task.

    python scripts/compare_runs.py runs/* results/digits/*.json --output table.md --plot curve.png
    python scripts/compare_runs.py runs/digits --save results/digits/finetune-seed0.json

Inputs are output folders of `train_continual.py` and files that `--save` made. Runs whose configurations differ in
nothing but the seed are one row, with the mean over seeds and its standard error.
"""

import argparse
import json
import math
import shlex
import statistics
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from diffusers_cl.config import OPERATIONAL_KEYS
from diffusers_cl.report import (
    HIGHER_IS_BETTER,
    PLUS_MINUS,
    count_range,
    dataset_name,
    format_number,
    format_spread,
    headline_metric,
    method_name,
    plot_curves,
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
# What does not make it another method: the seed and what runs of one seed may differ in.
SAME_METHOD_KEYS = ("seed", "num_threads", "license", *OPERATIONAL_KEYS)
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Run:
    """A finished or running run: where it was read, `metrics.json` and, where there is one, `run.json`."""

    path: Path
    metrics: dict
    run: dict | None

    @property
    def finished(self) -> bool:
        """Whether every task has its row."""
        rows = 1 if self.metrics["stream"] == "joint" else len(self.metrics["tasks"])
        return len(self.metrics["num_images"]) == rows

    @property
    def method(self) -> dict:
        """The configuration without what only tells runs of one method apart."""
        config = self.metrics["config"].items()
        return {key: value for key, value in config if key not in SAME_METHOD_KEYS and value is not None}


def load_run(path: str | Path) -> Run:
    """
    A run from its output folder, or from a results file.

    Args:
        path (`str` or `Path`): the folder or file.

    Returns:
        [`Run`]: what is there.

    Raises:
        ValueError: naming the file and what is wrong with it.
    """
    path = Path(path)
    if not path.is_dir():
        content = read_json(path)
        if not isinstance(content.get("metrics"), dict) or "config" not in content["metrics"]:
            raise ValueError(
                f"{path}: is neither a run's folder nor a file made by --save: no key `metrics` with a run"
            )
        loaded = Run(path, content["metrics"], content.get("run"))
    elif (path / "metrics.json").exists():
        run = path / "run.json"
        loaded = Run(path, read_json(path / "metrics.json"), read_json(run) if run.exists() else None)
    else:
        raise ValueError(f"{path}: has no metrics.json: no run of train_continual.py, or none with a finished task")
    if loaded.metrics.get("schema") != 1:
        raise ValueError(f"{path}: metrics have schema {loaded.metrics.get('schema')!r}; this script reads schema 1")
    missing = {"seconds", "device", "threads"} - set(loaded.run or {"seconds", "device", "threads"})
    if missing:
        raise ValueError(f"{path}: the run's machine record lacks {sorted(missing)}")
    missing = {"tasks", "stream", "feature_extractor", "num_images", "floor", "metrics", "config"} - set(
        loaded.metrics
    )
    if missing:
        raise ValueError(f"{path}: metrics lack {sorted(missing)}")
    return loaded


def join_result(output_dir: str | Path, made_by: str | None = None) -> dict:
    """
    A finished run as one object: the content of a file under `results/`.

    Args:
        output_dir (`str` or `Path`): the run's folder.
        made_by (`str`, *optional*): the command that made it; by default the one that spells out every key of its
            configuration.

    Returns:
        `dict`: `metrics` (`metrics.json`), `run` (`run.json`), `made_by` and `commit` (of this checkout, with
        `-dirty` where tracked files were changed).

    Raises:
        ValueError: if the run is not finished, lacks a file, or the checkout has no commit.
    """
    run = load_run(output_dir)
    if run.run is None:
        raise ValueError(f"{output_dir}: has no run.json")
    if not run.finished:
        raise ValueError(
            f"{output_dir}: {len(run.metrics['num_images'])} of {len(run.metrics['tasks'])} tasks finished"
        )
    if made_by is None:
        command = ["python", "train_continual.py"]
        for key, value in run.metrics["config"].items():
            if key != "output_dir":
                command += [f"--{key}", value if isinstance(value, str) else json.dumps(value)]
        made_by = shlex.join(command)
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    commit = subprocess.run(describe, capture_output=True, text=True)
    if commit.returncode != 0:
        raise ValueError(f"{ROOT}: a result names the commit that made it: {commit.stderr.strip()}")
    return {"metrics": run.metrics, "run": run.run, "made_by": made_by, "commit": commit.stdout.strip()}


def check_comparable(runs: list[Run], metric: str) -> None:
    """
    Checks that runs measured the same thing.

    Args:
        runs (`list[Run]`): those that shall stand in one table.
        metric (`str`): the metric of the table.

    Raises:
        ValueError: naming two runs and what differs, or a run that lacks the metric.
    """
    for run in runs:
        if metric not in run.metrics["metrics"]:
            raise ValueError(f"{run.path}: has no metric {metric!r}, only {', '.join(run.metrics['metrics'])}")

    def measured(run: Run) -> dict:
        config = {key: run.metrics["config"].get(key) for key in DATA_KEYS}
        num_images = {"images a task": run.metrics["num_images"][-1]}
        return (
            {"tasks": run.metrics["tasks"], "feature_extractor": run.metrics["feature_extractor"]}
            | config
            | num_images
        )

    first = measured(runs[0])
    for run in runs[1:]:
        for key, value in measured(run).items():
            if value != first[key]:
                raise ValueError(
                    f"{runs[0].path} and {run.path} cannot stand in one table: {key} is {first[key]!r} and {value!r}"
                )


def group_runs(runs: list[Run]) -> dict[str, list[Run]]:
    """
    Runs by method: equal configurations up to the seed and operational keys.

    Args:
        runs (`list[Run]`): any number of runs.

    Returns:
        `dict[str, list[Run]]`: by name; where two methods have one name, the keys in which they differ follow it.

    Raises:
        ValueError: if one method has one seed twice, naming both runs.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        group = groups.setdefault(json.dumps(run.method, sort_keys=True), [])
        for other in group:
            if other.metrics["config"]["seed"] == run.metrics["config"]["seed"]:
                raise ValueError(
                    f"{other.path} and {run.path} are the same method with the same seed "
                    f"{run.metrics['config']['seed']}: give one of them"
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


def mean_and_error(values: list[float], scale: float, sign: bool = False) -> str:
    """
    A mean over seeds with its standard error, as the table prints it.

    Args:
        values (`list[float]`): one number a seed.
        scale (`float`): print as many decimals as this number gets.
        sign (`bool`, defaults to `False`): print a plus sign too.

    Returns:
        `str`: the mean alone for a single seed, `"n/a"` where a value is `None`.
    """
    if None in values:
        return "n/a"
    mean = format_number(statistics.fmean(values), sign, scale)
    if len(values) == 1:
        return mean
    return f"{mean} {PLUS_MINUS} {format_number(statistics.stdev(values) / math.sqrt(len(values)), scale=scale)}"


def mean_floor(runs: list[Run], metric: str) -> dict | None:
    """
    The floor over runs.

    Args:
        runs (`list[Run]`): comparable runs.
        metric (`str`): the metric.

    Returns:
        `dict`, *optional*: `mean`, `std` and `per_task`, each the mean over the runs, and `num_images`; `None` if a
        run has no floor for this metric.
    """
    floors = [run.metrics["floor"].get(metric) for run in runs]
    if None in floors:
        return None
    floor = {key: statistics.fmean(floor[key] for floor in floors) for key in ("mean", "std")} | {
        "num_images": floors[0]["num_images"]
    }
    floor["per_task"] = [statistics.fmean(task) for task in zip(*(floor["per_task"] for floor in floors), strict=True)]
    return floor


def render_table(groups: dict[str, list[Run]], metric: str) -> str:
    """
    The comparison in Markdown: a row a method, the best average first, then the floor.

    Args:
        groups (`dict[str, list[Run]]`): from [`group_runs`], comparable.
        metric (`str`): the metric of the table.

    Returns:
        `str`: the table and what is needed to read it.
    """

    def column(group: list[Run], key: str) -> list:
        values = [run.metrics["metrics"][metric][key] for run in group]
        return [value[-1] for value in values] if key in ("average", "matrix") else values

    runs = [run for group in groups.values() for run in group]
    floor, higher = mean_floor(runs, metric), metric in HIGHER_IS_BETTER
    average = {name: statistics.fmean(column(group, "average")) for name, group in groups.items()}
    bounds = [[name for name in groups if name.split(" [")[0] == bound] for bound in ("fine-tuning", "joint")]
    gap = [average[names[0]] for names in bounds] if [len(names) for names in bounds] == [1, 1] else None

    head = ["method", "seeds", "average", "learning", "forgetting", "worst task", "per task at the end", "minutes"]
    head += ["gap closed"] if gap else []
    rows = [head, ["---"] * len(head)]
    for name in sorted(groups, key=average.get, reverse=higher):
        group, scale = groups[name], average[name]
        seeds = sorted(run.metrics["config"]["seed"] for run in group)
        row = [name.replace("|", "\\|"), f"{', '.join(map(str, seeds))} (n={len(group)})"]
        for key in ("average", "learning", "forgetting", "worst"):
            row.append(mean_and_error(column(group, key), scale, sign=key == "forgetting"))
        per_task = [statistics.fmean(task) for task in zip(*column(group, "matrix"), strict=True)]
        row.append(" / ".join(format_number(value, scale=scale) for value in per_task))
        timed = [run.run["seconds"]["total"] / 60 for run in group if run.run]
        row.append(f"{statistics.fmean(timed):.1f}" if timed else "n/a")
        if gap:
            row.append(f"{(gap[0] - scale) / (gap[0] - gap[1]):.0%}" if gap[0] != gap[1] else "n/a")
        rows.append(row)
    if floor:
        per_task = " / ".join(map(format_number, floor["per_task"]))
        row = ["floor (real against real)", "", format_spread(floor["mean"], floor["std"]), "", "", "", per_task]
        rows.append(row + [""] * (len(head) - len(row)))

    notes = _reading_notes(runs, metric, floor)
    if gap:
        notes.append("Gap closed: (fine-tuning - method) / (fine-tuning - joint).")
        if floor and abs(gap[0] - gap[1]) <= floor["std"]:
            notes.append("That gap is itself within the floor's spread: shares of it mean nothing.")
    elif all(bounds):
        notes.append(f"No gap closed: not one but several of {', '.join(bounds[0] + bounds[1])}.")
    return "\n".join([*(f"| {' | '.join(row)} |" for row in rows), "", " ".join(notes)]) + "\n"


def _reading_notes(runs: list[Run], metric: str, floor: dict | None) -> list[str]:
    metrics, higher = runs[0].metrics, metric in HIGHER_IS_BETTER
    notes = [
        f"`{metric}` ({'higher' if higher else 'lower'} is better) on `{dataset_name(metrics['config'])}` after "
        f"{len(metrics['tasks'])} tasks; features: {metrics['feature_extractor']}; "
        f"{count_range(metrics['num_images'][-1])} generated and as many real images a task. "
        f"Mean {PLUS_MINUS} standard error over n seeds. Average = learning + forgetting"
        f"{'; a forgetting below 0 is the loss' if higher else ''}."
    ]
    if floor:
        noise = format_number(floor["std"], scale=floor["mean"])
        notes.append(
            f"Floor: two disjoint halves of the real images ({count_range(floor['num_images'])} each), {PLUS_MINUS} "
            f"its spread over resampling, averaged over tasks; a difference below {noise} is noise."
        )
    devices = sorted({f"{run.run['device']} ({run.run['threads']} threads)" for run in runs if run.run})
    return [*notes, f"Minutes: the whole run, on {', '.join(devices) or 'n/a'}."]


def main(argv: list[str] | None = None) -> None:
    """
    The command line.

    Args:
        argv (`list[str]`, *optional*): the arguments; those of the process by default.
    """
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="output folders of train_continual.py, or results files")
    parser.add_argument("--metric", help="the metric of table and plot (default: fid, else the first fd_*)")
    parser.add_argument("--output", help="write the table to this file instead of the terminal")
    parser.add_argument("--plot", help="draw the average after every task into this PNG file")
    parser.add_argument("--save", help="join one finished run into this results file; makes no table")
    parser.add_argument("--made_by", help="with --save: the command that made the run, as it was typed")
    args = parser.parse_args(argv)
    try:
        if args.save:
            if len(args.runs) != 1 or args.output or args.plot:
                raise ValueError("--save takes one run and neither --output nor --plot")
            _write(args.save, json.dumps(join_result(args.runs[0], args.made_by), indent=1) + "\n")
            return
        runs = [load_run(path) for path in args.runs]
        for run in runs:
            if not run.finished:
                print(f"warning: {run.path} is left out: its tasks are not all finished", file=sys.stderr)
        runs = [run for run in runs if run.finished]
        if not runs:
            raise ValueError(f"no finished run among {', '.join(args.runs)}")
        metric = args.metric or headline_metric(runs[0].metrics)
        check_comparable(runs, metric)
        groups = group_runs(runs)
        table = render_table(groups, metric)
        if args.output:
            _write(args.output, table)
        else:
            print(table, end="")
        if args.plot:
            curves = {
                name: [run.metrics["metrics"][metric]["average"] for run in group] for name, group in groups.items()
            }
            better = "higher" if metric in HIGHER_IS_BETTER else "lower"
            label = f"average {metric} ({better} is better)"
            plot_curves(Path(args.plot), curves, runs[0].metrics["tasks"], label, mean_floor(runs, metric))
    except (ValueError, OSError) as error:
        print(f"compare_runs.py: error: {error}", file=sys.stderr)
        sys.exit(2)


def _write(path: str, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
