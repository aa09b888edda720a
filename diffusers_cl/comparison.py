"""The comparison of methods as data, and its pictures."""

from pathlib import Path

import numpy as np

from .plots import plot_curves, plot_one_class
from .report import HIGHER_IS_BETTER, headline_metric
from .results import Run, check_comparable, group_runs, mean_and_error


def mean_floor(runs: list[Run], metric: str) -> dict | None:
    """Returns the floor, averaged over runs: their held-out images may differ. `None` if the metric has none."""
    floors = [run.metrics["floor"].get(metric) for run in runs]
    if None in floors:
        return None
    mean = {key: np.mean([floor[key] for floor in floors], axis=0).tolist() for key in ("mean", "std", "per_task")}
    return floors[0] | mean


def paired_difference(group: list[Run], reference: list[Run], metric: str) -> tuple[float, float | None, int] | None:
    """
    Returns how far a method's average lies above another's on the same seeds and orders of the classes: mean, standard
    error over pairs (`None` for one) and the number of pairs; `None` without a pair.
    """
    average = {run.pair: run.metrics["metrics"][metric]["average"][-1] for run in reference}
    differences = [
        run.metrics["metrics"][metric]["average"][-1] - average[run.pair] for run in group if run.pair in average
    ]
    found = mean_and_error(differences)
    return found and (*found, len(differences))


def accuracy(group: list[Run]) -> tuple[float, float | None] | None:
    """Returns the share of the last model's images that are recognised: mean and standard error; `None` if a run lacks it."""
    found = [run.metrics["metrics"].get("accuracy") for run in group]
    return None if None in found else mean_and_error([values["average"][-1] for values in found])


def classification(group: list[Run], key: str) -> tuple[float, float | None] | None:
    """Returns a value of `metrics.json`'s `classification`: mean and standard error; `None` if a run lacks it."""
    return mean_and_error([run.metrics.get("classification", {}).get(key) for run in group])


def parameters_per_class(group: list[Run]) -> int | None:
    """Returns how many parameters of its own a class has (PPC of arXiv 2510.02631); `None` if a run does not say."""
    found = {run.metrics.get("parameters", {}).get("per_class") for run in group}
    return None if None in found else max(found)


def classification_minutes(group: list[Run]) -> float | None:
    """Returns the mean minutes of generating images for classifiers, and of training these; `None` where none was."""
    phases = ("classify_generate", "classify_train")
    clocks = [run.machine["seconds"] for run in group if run.machine and "classify_train" in run.machine["seconds"]]
    return float(np.mean([sum(clock[phase] for phase in phases) / 60 for clock in clocks])) if clocks else None


def stored_bytes(run: Run) -> int | None:
    """
    Returns the bytes that the method keeps between tasks beside the model. Of results that do not say, only what is
    exactly nothing; `None` for the others, and where the stream has the real images again.
    """
    if run.config["stream"] != "sequential":
        return None
    if run.machine and "stored_bytes" in run.machine:
        return sum(run.machine["stored_bytes"].values())
    method = run.method
    nothing = method["penalty"] == "none" and method.get("replay_refresh", "latest") == "latest"
    return 0 if nothing and method["replay"] != "memory" else None


def generated_images(run: Run) -> int | None:
    """Returns how many images were generated to train on, those of the evaluation left out."""
    # The first rows of a run that went on from a model are not its own.
    own_rows = run.metrics["num_images"][run.metrics.get("first_task", 0) :]
    return run.machine and run.machine["images"]["generated"] - sum(map(sum, own_rows))


def published_values(name: str, group: list[Run], metric: str, published: dict) -> list | None:
    """
    Returns a method's published average and forgetting, `None` unless every run has the paper's data, extractor,
    resolution and settings.

    Args:
        name (`str`): of the method, as [`group_runs`] gives it.
        group (`list[Run]`): its runs.
        metric (`str`).
        published (`dict`): the content of `results/published.json`.
    """
    for table in published["tables"]:
        settings = published["config"] | table["config"]
        if metric == published["metric"] and all(
            run.scale is None
            and run.config["dataset_name"] in table["dataset_names"]
            and sum(run.metrics["num_images"][-1]) == table["num_images"]
            # What a method does not read is not in its configuration.
            and all(run.method.get(key, value) == value for key, value in settings.items())
            for run in group
        ):
            return table["average_and_forgetting"].get(name.split(" [")[0])
    return None


def compare(runs: list[Run], metric: str | None = None, published: dict | None = None) -> dict:
    """
    Returns the comparison of methods as data.

    Args:
        runs (`list[Run]`): finished runs.
        metric (`str`, *optional*): the metric that is compared; by default the distance that leads every table.
        published (`dict`, *optional*): the content of `results/published.json`.

    Returns:
        `dict`: `rows`, the best average first, a `dict` each in which a pair is mean and standard error over runs
        (`None` for one run) and `None` is what is not known; `floor`, `gap` (fine-tuning minus joint), `metric`,
        `runs`, `groups` (the runs by method) and, for the notes, `source` and `bounds`, how many fine-tuning and joint
        methods there are.

    Raises:
        ValueError: if the runs do not belong in one table, naming them and why.
    """
    metric = metric or headline_metric(runs[0].metrics)
    check_comparable(runs, metric)
    groups = group_runs(runs)
    base = {name: name.split(" [")[0] for name in groups}
    results = {name: [run.metrics["metrics"][metric] for run in group] for name, group in groups.items()}
    average = {name: mean_and_error([seed["average"][-1] for seed in results[name]]) for name in groups}
    lower, upper, plain = ([n for n in groups if base[n] == b] for b in ("fine-tuning", "joint", "distillation"))
    gap = average[lower[0]][0] - average[upper[0]][0] if len(lower) == len(upper) == 1 else None
    rows = []
    for name in sorted(groups, key=lambda name: average[name][0], reverse=metric in HIGHER_IS_BETTER):
        group, seeds = groups[name], results[name]
        stored = {stored_bytes(run) for run in group}
        paired = len(plain) == 1 and name != plain[0]
        minutes = [run.machine["seconds"]["total"] / 60 for run in group if run.machine]
        generated = [generated_images(run) for run in group if run.machine]
        rows.append(
            {
                "method": name,
                "seeds": sorted({run.seed for run in group}),
                "num_orders": len({run.pair[1] for run in group}),
                "num_runs": len(group),
                "average": average[name],
                **{key: mean_and_error([s[key] for s in seeds]) for key in ("learning", "forgetting", "worst")},
                "accuracy": accuracy(group) if metric != "accuracy" else None,
                **{key: classification(group, key) for key in ("la", "aia", "aia_generated")},
                "per_class": parameters_per_class(group),
                "gap_closed": (average[lower[0]][0] - average[name][0]) / gap if gap else None,
                "paired": paired_difference(group, groups[plain[0]], metric) if paired else None,
                "is_reference": [name] == plain,
                "published": published and published_values(name, group, metric, published),
                "stored": max(stored) if None not in stored else None,
                "generated": float(np.mean(generated)) if generated else None,
                "minutes": float(np.mean(minutes)) if minutes else None,
                "classification_minutes": classification_minutes(group),
                "per_task": np.mean([seed["matrix"][-1] for seed in seeds], axis=0).tolist(),
            }
        )
    return {
        "rows": rows,
        "floor": mean_floor(runs, metric),
        "gap": gap,
        "metric": metric,
        "runs": runs,
        "groups": groups,
        "source": published and published["source"],
        "bounds": (len(lower), len(upper)),
    }


def plot_averages(path: Path, table: dict) -> None:
    """Saves the average after every task as a picture, a line a method of the comparison, the best first."""
    metric, tasks = table["metric"], table["runs"][0].metrics["tasks"]
    curves = {
        row["method"]: [run.metrics["metrics"][metric]["average"] for run in table["groups"][row["method"]]]
        for row in table["rows"]
    }
    better = "higher" if metric in HIGHER_IS_BETTER else "lower"
    plot_curves(path, curves, tasks, f"average {metric} ({better} is better)", table["floor"], log_if_wide=True)


def plot_first_class(path: Path, table: dict, grids: dict[Path, list[Path]]) -> None:
    """
    Saves the first class of the stream as it was drawn after every task, a row a method, all of one seed (and order of
    the classes): that of which most methods have pictures.

    Args:
        path (`Path`): the PNG file; none is written without pictures.
        table (`dict`): from [`compare`].
        grids (`dict[Path, list[Path]]`): a run's sample grids by its results file.
    """
    found: dict[tuple, dict[str, Run]] = {}
    for row in table["rows"]:
        for run in table["groups"][row["method"]]:
            if grids.get(run.path):
                found.setdefault(run.pair, {})[row["method"]] = run
    if found:
        methods = max(found.values(), key=len)
        run = next(iter(methods.values()))
        tasks, resolution = run.metrics["tasks"], run.config["resolution"]
        title = f"class {tasks[0][0]}, of the first task, as drawn after every task (seed {run.seed})"
        pictures = {name: grids[run.path] for name, run in methods.items()}
        plot_one_class(path, pictures, 0, resolution, len(tasks), title)
