"""Tables and plots of one run, from the files it leaves in its output folder."""

import json
import math
import re
from array import array
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.figure import Figure


HIGHER_IS_BETTER = ("accuracy", "recall")
PLUS_MINUS = "\u00b1"
PENALTY_NAMES = {"ewc": "diagonal EWC", "rank1_ewc": "rank-1 EWC"}
REPLAY_NAMES = {"generative_replay": "generative replay", "generative_distillation": "distillation"}
LOSS_PARTS = {
    "loss": "total loss",
    "loss_new": "new images",
    "loss_replay": "replayed images",
    "penalty": "penalty",
}
METRIC_MEANINGS = {
    "fid": "Frechet distance of InceptionV3 features",
    "kid": "kernel distance of InceptionV3 features",
    "fd_": "Frechet distance of this extractor's features; not FID",
    "kd_": "kernel distance of this extractor's features; not KID",
    "recall": "share of real images that have a generated one near them",
    "accuracy": "generated images that a classifier trained on real ones gives their own class",
    "kld": "KL(real, generated) over predicted classes",
}


def method_name(config: dict) -> str:
    """
    Name of the method that a configuration describes, as the tables print it.

    Args:
        config (`dict`): the flat resolved configuration (`"config"` in `metrics.json`).

    Returns:
        `str`: for instance `"fine-tuning"`, `"joint"` or `"rank-1 EWC + distillation (decoupled, auto)"`. `ewc_lambda`
        is shown where it is not the 15000 of arXiv 2509.23593, added to the loss.
    """
    if config["stream"] != "sequential":
        return config["stream"]
    parts, notes = [], []
    if config["penalty"] != "none":
        parts.append(PENALTY_NAMES.get(config["penalty"], config["penalty"]))
        decoupled, ewc_lambda = config["penalty_mode"] == "decoupled", config["ewc_lambda"]
        if decoupled:
            notes.append("decoupled")
        if ewc_lambda == "auto":
            notes.append("auto")
        elif decoupled or ewc_lambda != 15_000:
            notes.append(f"ewc_lambda {ewc_lambda:g}")
    if config["replay"] != "none":
        parts.append(REPLAY_NAMES.get(config["replay"], config["replay"]))
    name = " + ".join(parts) or "fine-tuning"
    return f"{name} ({', '.join(notes)})" if notes else name


def headline_metric(metrics: dict) -> str:
    """
    Name of the distance that leads every table: `fid`, else the first `fd_*`.

    Args:
        metrics (`dict`): the content of `metrics.json`.

    Returns:
        `str`: a key of `metrics["metrics"]`.

    Raises:
        ValueError: if there is neither.
    """
    names = [name for name in metrics["metrics"] if name == "fid" or name.startswith("fd_")]
    if not names:
        raise ValueError(f"metrics has neither `fid` nor `fd_*`, only {sorted(metrics['metrics'])}")
    return "fid" if "fid" in names else names[0]


def dataset_name(config: dict) -> str:
    """Returns the name of the data set of a configuration: its id on the Hub, or its folder."""
    return config.get("dataset_name") or config["train_data_dir"]


def count_range(counts: int | list[int]) -> str:
    """Returns counts, one for all tasks or one a task, as one number or as the least and the most."""
    least, most = int(np.min(counts)), int(np.max(counts))
    return str(least) if least == most else f"{least} to {most}"


def format_number(value: float | None, sign: bool = False, scale: float | None = None) -> str:
    """
    A number as the tables print it: three significant digits, one decimal from 10 on.

    Args:
        value (`float`, *optional*): `None` (no such number, as the forgetting of a joint run) gives `"n/a"`.
        sign (`bool`, defaults to `False`): print a plus sign too.
        scale (`float`, *optional*): print as many decimals as this number would get, for differences and errors.

    Returns:
        `str`: the number.
    """
    if value is None:
        return "n/a"
    size = abs(value if scale is None else scale)
    if not 0 < size < math.inf:
        size = 1.0
    decimals = 1 if size >= 10 else 2 - math.floor(math.log10(size))
    return f"{value:{'+' if sign else ''}.{decimals}f}"


def format_spread(mean: float, spread: float, sign: bool = False) -> str:
    """
    A mean and its spread, to the same number of decimals.

    Args:
        mean (`float`): the mean.
        spread (`float`): its standard deviation or error, at least 0.
        sign (`bool`, defaults to `False`): print a plus sign of the mean too.

    Returns:
        `str`: for instance `"0.550 +- 0.170"`, with the one character for plus or minus.
    """
    scale = max(abs(mean), spread)
    return f"{format_number(mean, sign, scale)} {PLUS_MINUS} {format_number(spread, scale=scale)}"


def read_json(path: str | Path) -> dict:
    """
    Content of a JSON file that holds an object.

    Args:
        path (`str` or `Path`): the file.

    Returns:
        `dict`: its content.

    Raises:
        ValueError: naming the file, if it is missing, unreadable or holds something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read as JSON ({error})") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: holds a {type(content).__name__}, not an object")
    return content


def read_train_log(path: str | Path) -> dict[str, np.ndarray]:
    """
    The training log as columns, in step order, one entry an optimizer step.

    Steps that a resumed run repeated count once, with the later values. Half a record, as a killed run leaves it at
    the end (or, resumed since, in the middle of a line), is passed over.

    Args:
        path (`str` or `Path`): `logs/train_log.jsonl` of a run.

    Returns:
        `dict[str, np.ndarray]`: float64 columns `step`, `task`, `loss`, `loss_new`, `loss_replay`, `penalty`; `nan`
        where a part did not exist.
    """
    columns = ("step", "task", *LOSS_PARTS)
    values = array("d")
    with Path(path).open("rb") as log:
        for line in log:
            for record in map(json.loads, re.findall(rb"\{[^{}]*\}", line)):
                values.extend(float("nan") if record.get(name) is None else record[name] for name in columns)
    rows = np.array(values).reshape(-1, len(columns))[::-1]
    _, last_written = np.unique(rows[:, 0], return_index=True)
    return dict(zip(columns, rows[last_written].T, strict=True))


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, facecolor="white")


def _label_tasks(axis, tasks: list[list[str]], num_ticks: int) -> None:
    if len(tasks) > 8:
        axis.set_ticks(range(num_ticks), [f"task-{task:02d}" for task in range(num_ticks)], fontsize=7, rotation=90)
        return
    classes = [", ".join(task) for task in tasks]
    classes = [names if len(names) <= 14 else f"{names[:12]}.." for names in classes]
    labels = [f"task-{task:02d}\n{classes[task]}" for task in range(num_ticks)]
    axis.set_ticks(range(num_ticks), labels, fontsize=8, parse_math=False)


def plot_heat_map(
    path: Path, matrix: list[list[float]], tasks: list[list[str]], title: str, noise: float, diverging: bool = False
) -> None:
    """
    Saves a ragged task matrix as a picture with its numbers: a row a finished task, a column a task.

    Args:
        path (`Path`): the PNG file.
        matrix (`list[list[float]]`): `R[i][j]`, rows of any length up to the number of tasks.
        tasks (`list[list[str]]`): class names of every task.
        title (`str`): what the numbers are.
        noise (`float`): the floor's spread. The colours span five times as much at least, so that noise stays pale.
        diverging (`bool`, defaults to `False`): colours centred on 0 (red is above) instead of from the lowest up.
    """
    num_columns = max(map(len, matrix))
    values = np.full((len(matrix), num_columns), np.nan)
    for i, row in enumerate(matrix):
        values[i, : len(row)] = row
    finite = values[np.isfinite(values)] if np.isfinite(values).any() else np.zeros(1)
    span = max(5 * noise, 1e-12)
    low = -max(abs(finite).max(), span) if diverging else finite.min()
    high = -low if diverging else max(finite.max(), low + span)
    cmap = colormaps["RdBu_r" if diverging else "YlOrRd"]
    width, height, size = (0.95, 0.62, 9) if len(tasks) <= 8 else (0.46, 0.34, 7)
    figure = Figure(figsize=(2 + width * max(num_columns, 4), 1.2 + height * len(matrix)), layout="constrained")
    axes = figure.add_subplot()
    axes.imshow(np.ma.masked_invalid(values), cmap=cmap, vmin=low, vmax=high, aspect="auto")
    for i, j in zip(*np.nonzero(np.isfinite(values)), strict=True):
        dark = np.dot(cmap((values[i, j] - low) / (high - low))[:3], (0.299, 0.587, 0.114)) < 0.5
        text = format_number(values[i, j], diverging, scale=high if diverging else None)
        axes.text(j, i, text, ha="center", va="center", color="white" if dark else "black", fontsize=size)
    _label_tasks(axes.xaxis, tasks, num_columns)
    rows = [f"after task-{i:02d}" for i in range(len(matrix))] if len(matrix[0]) == 1 else ["all at once"]
    axes.set_yticks(range(len(matrix)), rows, fontsize=min(size, 8))
    axes.set_title(title, fontsize=10)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    _save(figure, path)


def plot_curves(
    path: Path, curves: dict[str, list[list[float]]], tasks: list[list[str]], title: str, floor: dict | None
) -> None:
    """
    Saves a metric after each task, a line a method: the mean over seeds with a band of one standard error.

    Args:
        path (`Path`): the PNG file.
        curves (`dict[str, list[list[float]]]`): for each name, a list a seed with the values after task 0, 1, ...
            One single value of a stream with more tasks (a joint run) is drawn as a dashed level.
        tasks (`list[list[str]]`): class names of every task.
        title (`str`): what the numbers are.
        floor (`dict`, *optional*): `mean` and `std` of the floor, drawn as a band.
    """
    figure = Figure(figsize=(7.6, 4.2 + 0.18 * len(curves)), layout="constrained")
    axes = figure.add_subplot()
    if floor is not None:
        low, high = floor["mean"] - floor["std"], floor["mean"] + floor["std"]
        axes.axhspan(low, high, color="0.85", label=f"floor (real vs real) {PLUS_MINUS} spread", zorder=0)
    for index, (name, seeds) in enumerate(curves.items()):
        values, label = np.asarray(seeds, dtype=float), name.replace("$", r"\$")
        mean, color = values.mean(axis=0), colormaps["tab10"](index % 10)
        if len(mean) == 1 < len(tasks):
            axes.axhline(mean[0], color=color, linestyle="--", label=label)
            continue
        axes.plot(mean, color=color, marker="osD^v"[index % 5], markersize=5, label=label)
        if len(values) > 1:
            error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
            axes.fill_between(range(len(mean)), mean - error, mean + error, color=color, alpha=0.2, linewidth=0)
    _label_tasks(axes.xaxis, tasks, len(tasks))
    axes.set_xlim(-0.3, len(tasks) - 0.7)
    axes.set_xlabel("after training")
    axes.set_ylabel(title)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", fontsize=8, frameon=False)
    _save(figure, path)


def plot_losses(path: Path, log: dict[str, np.ndarray]) -> None:
    """
    Saves the loss and its parts over optimizer steps: faint as logged, strong as a running mean within each task.

    Args:
        path (`Path`): the PNG file.
        log (`dict[str, np.ndarray]`): from [`read_train_log`]. An empty one gives no picture.
    """
    parts = [name for name in LOSS_PARTS if (log[name] > 0).any()]
    if parts == ["loss", "loss_new"]:
        parts = ["loss"]
    if not parts:
        return
    tasks = np.unique(log["task"])
    figure = Figure(figsize=(8, 0.9 + 1.7 * len(parts)), layout="constrained")
    for axes, name in zip(figure.subplots(len(parts), sharex=True, squeeze=False)[:, 0], parts, strict=True):
        color = f"C{list(LOSS_PARTS).index(name)}"
        for task in tasks:
            # Zeros and missing parts have no place on a logarithmic axis.
            drawn = (log["task"] == task) & (log[name] > 0)
            step, value = log["step"][drawn], log[name][drawn]
            if len(step) == 0:
                continue
            window = np.ones(1 + len(value) // 30)
            mean = np.convolve(value, window, "same") / np.convolve(np.ones_like(value), window, "same")
            # Agg refuses lines of some 10^5 points, and a picture has about 10^3 columns.
            stride = 1 + len(step) // 2000
            axes.plot(step[::stride], value[::stride], color=color, alpha=0.25, linewidth=0.7)
            axes.plot(step[::stride], mean[::stride], color=color, linewidth=1.6)
        axes.set_yscale("log")
        axes.set_ylabel(LOSS_PARTS[name], fontsize=9)
        axes.grid(alpha=0.25, which="both")
        for task in tasks:
            start = log["step"][log["task"] == task].min()
            axes.axvline(start, color="0.4", linewidth=0.8, linestyle=":")
            if name == parts[0]:
                text = f" task-{int(task):02d}" if len(tasks) <= 10 else f" {int(task)}"
                axes.text(start, 1.02, text, transform=axes.get_xaxis_transform(), fontsize=8)
    axes.set_xlabel("optimizer step")
    _save(figure, path)


def _summary(metrics: dict) -> str:
    name, tasks = headline_metric(metrics), metrics["tasks"]
    headline, floor = metrics["metrics"][name], metrics["floor"][name]
    learning, now, forgetting = headline["learning"], headline["average"][-1], headline["forgetting"]
    against = f"({name}, lower is better; real against real images: {format_spread(floor['mean'], floor['std'])})"
    if metrics["stream"] == "joint":
        text = (
            f"**joint**, the classes of {len(tasks)} tasks trained at once, the level that continual methods are "
            f"measured against: the generated images lie {format_number(now)} from real ones {against}"
        )
    else:
        done = len(headline["matrix"])
        seen = f"{len(tasks)} tasks" if done == len(tasks) else f"{done} of {len(tasks)} tasks so far"
        text = (
            f"**{method_name(metrics['config'])}**, {seen}: "
            f"the generated images lie {format_number(learning)} from real ones when a task has just been learned and "
            f"{format_number(now)} now {against}"
        )
        if done == 1:
            text += "; there is nothing to forget yet"
        elif abs(forgetting) <= floor["std"]:
            text += (
                f"; the change, {format_number(forgetting, True, scale=now)}, is within the floor's spread, so no "
                "forgetting is shown"
            )
        else:
            what = "was forgotten" if forgetting > 0 else "was gained on old tasks"
            text += f"; so {format_number(abs(forgetting), scale=now)} {what}, more than the floor's spread"
    if "accuracy" in metrics["metrics"]:
        accuracy = metrics["metrics"]["accuracy"]["average"][-1]
        text += f"; a classifier trained on real images recognises {accuracy:.0%} of them"
    return text + "."


def key_table(metrics: dict) -> list[str]:
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
    floor, split = metrics["floor"][first], metrics["config"]["eval_split"]
    split = f"split `{split}`" if split else "its default held-out split: `test`, else `validation`, else 20 %"
    noise = format_number(floor["std"], scale=floor["mean"])
    return lines + [
        "",
        f"Measured with {count_range(metrics['num_images'][-1])} generated and as many real images a task "
        f"(`{dataset_name(metrics['config'])}`, {split}); features: {metrics['feature_extractor']}. Floor: the same "
        f"between two disjoint halves of the real images ({count_range(floor['num_images'])} each; fewer images give "
        f"a larger distance), {PLUS_MINUS} its spread over resampling, averaged over tasks. "
        f"**A difference below that spread ({noise} in {first}) is noise.** "
        "Average = learning + forgetting. Where higher is better, a forgetting below 0 is the loss.",
    ]


def _class_table(metrics: dict) -> list[str]:
    history = [accuracy for accuracy in metrics.get("class_accuracy", []) if accuracy]
    if not history:
        return []
    joint = metrics["stream"] == "joint"
    lines = [
        "## Accuracy by class",
        "",
        "Share of a class's generated images that a classifier trained on real ones gives that class.",
        "",
        "| class | task | when just learned | after the last task | change |",
        "|---|---|---|---|---|",
    ]
    rows = []
    for task, classes in enumerate(metrics["tasks"]):
        for name in (name for name in classes if name in history[-1]):
            then, now = history[0 if joint else task][name], history[-1][name]
            label = name.replace("|", "\\|")
            rows.append(f"| {label} | task-{task:02d} | {then:.0%} | {now:.0%} | {round(100 * (now - then)):+d} |")
    if len(rows) > 20:
        lines[4:4] = [f"<details><summary>{len(rows)} classes</summary>", ""]
        rows += ["", "</details>"]
    return [*lines, *rows, ""]


def _fisher_lines(metrics: dict) -> list[str]:
    lines = []
    for task, values in enumerate(metrics.get("fisher", [])):
        if not values:
            continue
        words = [f"{values['num_samples']} gradients"]
        if values.get("signal_ratio") is not None:
            ratio = values["signal_ratio"]
            noise = f"about {min(1.0, 1 / max(ratio, 1e-12)):.0%} of the squared mean gradient is sampling noise"
            words.append(f"signal ratio {format_number(ratio)}: {noise}")
        if values.get("direction_share") is not None:
            words.append(
                f"the direction carries {values['direction_share']:.1%} of the second moment (100% is rank 1)"
            )
        if values.get("second_moment") is not None and values.get("curvature") is not None:
            moment, curvature = values["second_moment"], values["curvature"]
            times = f", {curvature / moment:.3g} times as much" if moment > 0 else ""
            words.append(
                f"second moment {format_number(moment)}, measured curvature {format_number(curvature)}{times}"
            )
        lines.append(f"- task-{task:02d}: {'; '.join(words)}.")
    if not lines:
        return []
    explanation = (
        "The empirical Fisher (uncentred second moment of per-sample loss gradients) that the penalty of each task is "
        "made of. A signal ratio `n |mu|^2 / trace` near 1 means that the direction is sampling noise."
    )
    return ["## Fisher diagnostics", "", explanation, "", *lines, ""]


def _run_lines(run: dict) -> list[str]:
    seconds, images = run["seconds"], run["images"]
    total = seconds["total"]
    lines = ["## Time", "", "| phase | minutes | share |", "|---|---|---|"]
    for phase, spent in seconds.items():
        lines.append(f"| {phase} | {spent / 60:.1f} | {spent / max(total, 1e-12):.0%} |")
    counted = ", ".join(f"{count} {what}" for what, count in images.items())
    return lines + [
        "",
        f"Images: {counted}. Device {run['device']}, {run['threads']} threads, peak memory "
        f"{format_number(run['peak_memory_gib'])} GiB, {run['restarts']} restarts; "
        f"{', '.join(f'{name} {version}' for name, version in run['versions'].items())}.",
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
            "average over the tasks so far": metrics["metrics"][name]["average"],
            "the task just learned": [row[-1] for row in matrix],
        }
        curves = {label: [curve] for label, curve in curves.items()}
        plot_curves(plots / "average.png", curves, tasks, f"{name} (lower is better)", floor)
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
    grids = [picture(f"samples/{path.name}", f"Samples after {path.stem}, a row a class") for path in samples]
    recall = metrics["metrics"].get("recall")
    copies = "Generated images, each above the training image nearest to it: equal pairs are copies."
    if recall:
        copies += (
            f" Recall, the share of real images with a generated one near, is {format_number(recall['average'][-1])}."
        )
    run = output_dir / "run.json"
    lines = [
        *[f"# {method_name(config)} on {dataset_name(config)}", "", _summary(metrics), ""],
        *(grids[-1] if grids else []),
        *["## Result", "", *key_table(metrics), ""],
        *picture("plots/task_matrix.png", f"{name} of every task after every task"),
        *picture("plots/forgetting.png", f"Change of {name} since each task was learned"),
        *picture("plots/average.png", f"Average {name} after every task, with the floor"),
        *_class_table(metrics),
        *section(
            "Samples after every task",
            "A row a class, from the same noise every time: what changes in a row after its task is drift.",
            [line for path, grid in zip(samples, grids, strict=True) for line in (f"After {path.stem}:", "", *grid)],
        ),
        *section(
            "Copies or new images", copies, picture("plots/nearest.png", "Generated above nearest training images")
        ),
        *section(
            "Training",
            "Strong lines are running means, faint ones the values as logged; a dotted line is where a task starts.",
            picture("plots/losses.png", "Loss and its parts over optimizer steps"),
        ),
        *_fisher_lines(metrics),
        *(_run_lines(read_json(run)) if run.exists() else []),
        *["<details><summary>Configuration</summary>", "", "```yaml"],
        *[f"{key}: {json.dumps(value)}" for key, value in config.items()],
        *["```", "", "</details>", "", "Made from [metrics.json](metrics.json)."],
    ]
    report = output_dir / "report.md"
    report.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return report
