"""The report of one run, from the files it leaves in its output folder."""

import json
from pathlib import Path

import numpy as np

from .markup import plain
from .names import dataset_name, method_name
from .plots import format_number, plot_curves, plot_heat_map, plot_importance, plot_losses, read_train_log


HIGHER_IS_BETTER = ("accuracy", "precision", "recall")
PLUS_MINUS = "\u00b1"
METRIC_MEANINGS = {
    "fid": "Frechet distance of InceptionV3 features",
    "kid": "kernel distance of InceptionV3 features; equal class counts put it below 0, so read it against its floor",
    "fd_": "Frechet distance of this extractor's features; not FID",
    "kd_": "kernel distance of this extractor's features; not KID; equal class counts put it below 0: read it against its floor",
    "precision": "share of generated images that have a real one near them",
    "recall": "share of real images that have a generated one near them",
    "accuracy": "generated images that a classifier trained on real ones gives their own class",
    "kld": "KL(real, generated) over predicted classes",
}
FISHER_COLUMNS = {
    "num_samples": "gradients",
    "signal_ratio": "signal ratio",
    "second_moment": "second moment",
    "direction_share": "its share of the trace",
    "curvature": "measured curvature",
}
# Longer tables of classes are folded away.
MAX_OPEN_CLASSES = 20
# Distances of fewer images a task get a warning.
FEW_IMAGES = 50


def headline_metric(metrics: dict) -> str:
    """Returns the name of the distance that leads every table: `fid`, else the one `fd_*`."""
    return next(name for name in metrics["metrics"] if name == "fid" or name.startswith("fd_"))


def format_spread(mean: float, spread: float) -> str:
    """Returns a mean and its spread to the same number of decimals."""
    scale = max(abs(mean), spread)
    return f"{format_number(mean, scale=scale)} {PLUS_MINUS} {format_number(spread, scale=scale)}"


def read_json(path: str | Path) -> dict:
    """Returns the object in a JSON file; raises a `ValueError` that names the file if there is none."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not an object")
    return content


def measurement_note(metrics: dict, name: str, floor: dict | None) -> str:
    """Returns what a table of a metric is read with: images, data, features and, where there is one, the floor."""

    def count_range(counts: list[int]) -> str:
        return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"

    split = metrics["config"]["eval_split"]
    split = f"split `{split}`" if split else "its default held-out split: `test`, else `validation`, else 20 %"
    note = (
        f"Measured with {count_range(metrics['num_images'][-1])} generated and as many real images a task "
        f"(`{dataset_name(metrics['config'])}`, {split}); features: {metrics['feature_extractor']}."
    )
    if floor is not None:
        note += (
            f" Floor: the same between two disjoint halves of the real images ({count_range(floor['num_images'])} "
            f"each; fewer images give a larger distance), {PLUS_MINUS} its spread over resampling, averaged over "
            f"tasks. **A difference below that spread ({format_number(floor['std'])} in {name}) is noise**; a larger one "
            "counts if it repeats over seeds."
        )
    return f"{note} Average = learning + forgetting. Where higher is better, a forgetting below 0 is the loss."


def key_table(metrics: dict) -> list[str]:
    """
    Returns the results of a run as lines of Markdown: a table with a row a metric, and what is needed to read it.

    Args:
        metrics (`dict`): the content of `metrics.json`.
    """
    lines = [
        "| metric | average | learning | forgetting | worst task | floor (real vs real) | what it is |",
        "|---|---|---|---|---|---|---|",
    ]
    first = headline_metric(metrics)
    for name in [first, *(name for name in metrics["metrics"] if name != first)]:
        values = metrics["metrics"][name]
        better = "higher" if name in HIGHER_IS_BETTER else "lower"
        floor = metrics["floor"].get(name)
        floor = format_spread(floor["mean"], floor["std"]) if floor else "n/a"
        meaning = next((text for start, text in METRIC_MEANINGS.items() if name.startswith(start)), "")
        average, learning, worst = map(format_number, (values["average"][-1], values["learning"], values["worst"]))
        forgetting = format_number(values["forgetting"], True, scale=values["average"][-1])
        lines.append(
            f"| {name} ({better} is better) | {average} | {learning} | {forgetting} | {worst} | {floor} | {meaning} |"
        )
    return [*lines, "", measurement_note(metrics, first, metrics["floor"][first]), *_classification_lines(metrics)]


def _classification_lines(metrics: dict) -> list[str]:
    """What classifiers learned from the images, where any were trained: one paragraph."""
    if (found := metrics.get("classification")) is None:
        return []
    average, real = (", ".join(map(format_number, side["average_accuracy"])) for side in (found, found["real"]))
    la, aia, aia_generated = (format_number(found[key]) for key in ("la", "aia", "aia_generated"))
    text = (
        f"A classifier ({found['network']}) trained on {found['images_per_class']} generated images a class alone, anew after "
        f"every task, has the accuracy {average} on the real test images of the tasks so far. LA {la}, AIA {aia} "
        f"({aia_generated} with generated images for the first task too; arXiv 2510.02631)."
    )
    if found["real"]["images_per_class"] is not None:
        text += f" Trained on real images, at most {found['real']['images_per_class'][1]} a class: {real}."
    return ["", text]


def _summary(metrics: dict) -> str:
    name, tasks = headline_metric(metrics), metrics["tasks"]
    headline, floor = metrics["metrics"][name], metrics["floor"][name]
    now, forgetting, num_done = headline["average"][-1], headline["forgetting"], len(headline["matrix"])
    against = f"({name}, lower is better; real against real images: {format_spread(floor['mean'], floor['std'])})"
    if metrics["stream"] == "joint":
        text = (
            f"**joint**, the classes of {len(tasks)} tasks trained at once, the level that continual methods are "
            f"measured against: the generated images lie {format_number(now)} from real ones {against}"
        )
    else:
        seen = f"{len(tasks)} tasks" if num_done == len(tasks) else f"{num_done} of {len(tasks)} tasks so far"
        text = (
            f"**{method_name(metrics['config'])}**, {seen}: the generated images lie "
            f"{format_number(headline['learning'])} from real ones when a task has just been learned and "
            f"{format_number(now)} now {against}"
        )
        if num_done == 1:
            text += "; there is nothing to forget yet"
        elif abs(forgetting) <= floor["std"]:
            change = format_number(forgetting, True, scale=now)
            text += f"; the change, {change}, is within the floor's spread, so no forgetting is shown"
        else:
            what = "was forgotten" if forgetting > 0 else "was gained on old tasks"
            text += f"; so {format_number(abs(forgetting), scale=now)} {what}, more than the floor's spread"
        if np.min(metrics["num_images"][-1]) < FEW_IMAGES:
            text += f" (with fewer than {FEW_IMAGES} images a task that says little)"
    accuracy = metrics["metrics"].get("accuracy", {"average": [None]})["average"][-1]
    if accuracy is not None:
        text += f"; a classifier trained on real images recognises {accuracy:.0%} of them"
        if "test_accuracy" in metrics.get("feature_extractor_info", {}):
            text += f" (and {metrics['feature_extractor_info']['test_accuracy']:.0%} of the real test images)"
    return text + "."


def _class_table(metrics: dict) -> list[str]:
    history = metrics["class_accuracy"]
    if not history[-1]:
        return []
    rows = []
    for task, classes in enumerate(metrics["tasks"]):
        first = history[min(task, len(history) - 1)] or {}
        for name in (name for name in classes if name in history[-1] and name in first):
            then, now = first[name], history[-1][name]
            rows.append(
                f"| {plain(name)} | task-{task:02d} | {then:.0%} | {now:.0%} | {round(100 * (now - then)):+d} |"
            )
    rows = ["| class | task | when just learned | after the last task | change |", "|---|---|---|---|---|", *rows]
    if len(history[-1]) > MAX_OPEN_CLASSES:
        rows = [f"<details><summary>{len(history[-1])} classes</summary>", "", *rows, "", "</details>"]
    return [*rows, ""]


def _fisher_table(metrics: dict) -> list[str]:
    measured = [values for values in metrics["fisher"] if values]
    columns = [key for key in FISHER_COLUMNS if any(values.get(key) is not None for values in measured)]
    if not columns:
        return []
    lines = [f"| task | {' | '.join(FISHER_COLUMNS[key] for key in columns)} |", "|---" * (1 + len(columns)) + "|"]
    for task, values in enumerate(metrics["fisher"]):
        if not values:
            continue
        cells = []
        for key in columns:
            # A penalty with several directions a task has a list.
            each = values.get(key) if isinstance(values.get(key), list) else [values.get(key)]
            cells.append(", ".join(f"{one:.0f}" if key == "num_samples" else format_number(one) for one in each))
        lines.append(f"| task-{task:02d} | {' | '.join(cells)} |")
    return [*lines, ""]


def _machine_lines(run: dict) -> list[str]:
    seconds = sorted(run["seconds"].items(), key=lambda item: -item[1])
    total = max(run["seconds"]["total"], 1e-12)
    images = ", ".join(f"{count} {what}" for what, count in run["images"].items())
    versions = ", ".join(f"{name} {version}" for name, version in run["versions"].items())
    return [
        *["## Time", "", "| phase | seconds | share |", "|---|---|---|"],
        *[f"| {phase} | {spent:.0f} | {spent / total:.0%} |" for phase, spent in seconds],
        "",
        f"Images: {images}. Device {run['device']}, {run['threads']} thread(s), peak memory "
        f"{format_number(run['peak_memory_gib'])} GiB, {run['restarts']} restarts; {versions}.",
        "",
    ]


def _write_plots(output_dir: Path, metrics: dict) -> None:
    name, tasks = headline_metric(metrics), metrics["tasks"]
    plots, matrix, floor = output_dir / "plots", metrics["metrics"][name]["matrix"], metrics["floor"][name]
    title = f"{name} of each task's images (lower is better)"
    plot_heat_map(plots / "task_matrix.png", matrix, tasks, title, floor["std"])
    if len(matrix) > 1:
        forgetting = [[value - matrix[j][j] for j, value in enumerate(row)] for row in matrix]
        title = f"change of {name} since the task was learned (above 0: forgotten)"
        plot_heat_map(plots / "forgetting.png", forgetting, tasks, title, floor["std"], diverging=True)
        curves = {
            "average over the tasks so far": [metrics["metrics"][name]["average"]],
            "the task just learned": [[row[-1] for row in matrix]],
        }
        plot_curves(plots / "average.png", curves, tasks, f"{name} (lower is better)", floor)
    if importance := metrics.get("parameters", {}).get("importance"):
        plot_importance(plots / "importance.png", importance)
    learned = metrics.get("classification", {"average_accuracy": []})["average_accuracy"]
    if len(learned) > 1 and None not in learned:
        curves = {"classifier of generated images": [learned]}
        plot_curves(plots / "classification.png", curves, tasks, "accuracy on real test images", None)
    log = output_dir / "logs" / "train_log.jsonl"
    if log.exists():
        plot_losses(plots / "losses.png", read_train_log(log))


def write_report(output_dir: str | Path) -> Path:
    """
    Writes `report.md` and `plots/*.png` of a run, finished or not, from `metrics.json` and what else is there of
    `run.json`, `logs/train_log.jsonl`, `samples/task-*.png` and `plots/nearest.png`. Only the main process calls this.

    Args:
        output_dir (`str` or `Path`): the run's folder.

    Returns:
        `Path`: the report.

    Raises:
        ValueError: if `metrics.json` or `run.json` cannot be read, naming the file.
    """
    output_dir = Path(output_dir)
    metrics = read_json(output_dir / "metrics.json")
    name, config = headline_metric(metrics), metrics["config"]
    _write_plots(output_dir, metrics)

    def picture(path: str, text: str) -> list[str]:
        return [f"![{text}]({path})", ""] if (output_dir / path).exists() else []

    def section(title: str, text: str, lines: list[str]) -> list[str]:
        return [f"## {title}", "", text, "", *lines] if lines else []

    samples = sorted((output_dir / "samples").glob("task-*.png"))
    learned = list(dict.fromkeys(sum(metrics["tasks"][: len(metrics["num_images"][-1])], [])))
    rows = f"Rows from the top: {', '.join(map(plain, learned[:100]))}."
    grids = [picture(f"samples/{path.name}", f"Samples after {path.stem}, a row a class") for path in samples]
    recall = metrics["metrics"]["recall"]["average"][-1]
    precision = metrics["metrics"].get("precision", {"average": [None]})["average"][-1]
    run = output_dir / "run.json"
    lines = [
        *[f"# {method_name(config)} on {dataset_name(config)}", "", _summary(metrics), ""],
        *([*grids[-1], rows, ""] if grids else []),
        *["## Result", "", *key_table(metrics), ""],
        *picture("plots/task_matrix.png", f"{name} of every task after every task"),
        *picture("plots/forgetting.png", f"Change of {name} since each task was learned"),
        *picture("plots/average.png", f"Average {name} after every task, with the floor"),
        *picture("plots/classification.png", "Accuracy of a classifier trained on generated images, after every task"),
        *section(
            "Accuracy by class",
            "Share of a class's generated images that a classifier trained on real ones gives that class.",
            _class_table(metrics),
        ),
        *section(
            "Samples after every task",
            "A row a class, from the same noise every time: what changes in a row after its task is drift.",
            [line for path, grid in zip(samples, grids, strict=True) for line in (f"After {path.stem}:", "", *grid)],
        ),
        *section(
            "Copies or new images",
            "Generated images, each above the training image nearest to it: equal pairs are copies. Recall "
            f"({format_number(recall)}) is about variety, low where a few images are drawn again and again; precision "
            f"({format_number(precision)}) is low where images are like no real one. They mean nothing with few images.",
            picture("plots/nearest.png", "Generated above nearest training images"),
        ),
        *section(
            "Training",
            "Strong lines are running means, faint ones the values as logged; a dotted line is where a task starts.",
            picture("plots/losses.png", "Loss and its parts over optimizer steps"),
        ),
        *section(
            "Fisher diagnostics",
            "The empirical Fisher (uncentred second moment of per-sample loss gradients) that the penalty of each task "
            "is made of. Signal ratio `n |mu|^2 / trace`: about 1 / ratio of the squared mean gradient is sampling "
            "noise. Second moment: of the gradients along their mean's direction; its share of the trace would be 1 for "
            "a Fisher of rank 1. Measured curvature: of the task's loss in that direction.",
            _fisher_table(metrics),
        ),
        *section(
            "Adapted layers",
            "How far a layer's vectors are from the ones that they started from, in the mean over its entries: the mean over"
            " classes, and their standard deviation (arXiv 2510.02631, Eq. 20 and 21).",
            picture("plots/importance.png", "Importance of every adapted layer"),
        ),
        *(_machine_lines(read_json(run)) if run.exists() else []),
        *["<details><summary>Configuration</summary>", "", "```yaml"],
        *[f"{key}: {json.dumps(value)}" for key, value in config.items()],
        *["```", "", "</details>", "", "Made from [metrics.json](metrics.json)."],
    ]
    report = output_dir / "report.md"
    report.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return report
