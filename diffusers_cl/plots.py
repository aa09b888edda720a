"""Pictures of one run or of several: task matrices, curves over tasks, losses. They need no display and no pyplot."""

import json
import math
import re
from array import array
from pathlib import Path

import numpy as np
import PIL.Image
from matplotlib import colormaps
from matplotlib.figure import Figure


LOSS_PARTS = {
    "loss": "total loss",
    "loss_new": "new images",
    "loss_replay": "replayed images",
    "penalty": "penalty",
}
# With more tasks than this, pictures name tasks by number alone and shrink.
MAX_LABELLED_TASKS = 8


def format_number(value: float | None, sign: bool = False, scale: float | None = None) -> str:
    """
    Returns a number as tables and pictures print it: three significant digits, one decimal from 10 on.

    Args:
        value (`float`, *optional*): `None` (no such number, as the forgetting of a joint run) gives `"n/a"`.
        sign (`bool`, defaults to `False`): print a plus sign too.
        scale (`float`, *optional*): print as many decimals as this number would get, for differences and errors.
    """
    if value is None:
        return "n/a"
    size = abs(value if scale is None else scale)
    if not 0 < size < math.inf:
        size = 1.0
    decimals = 1 if size >= 10 else 2 - math.floor(math.log10(size))
    return f"{value:{'+' if sign else ''}.{decimals}f}"


def read_train_log(path: str | Path) -> dict[str, np.ndarray]:
    """
    Returns the training log as float64 columns `step`, `task`, `loss`, `loss_new`, `loss_replay`, `penalty` in step
    order, `nan` where a part did not exist.

    Steps that a resumed run repeated count once, with the later values. Half a record, as a killed run leaves it at
    the end (or, resumed since, in the middle of a line), is passed over.

    Args:
        path (`str` or `Path`): `logs/train_log.jsonl` of a run.
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
    labels = [f"task-{task:02d}" for task in range(num_ticks)]
    if len(tasks) > MAX_LABELLED_TASKS:
        axis.set_ticks(range(num_ticks), labels, fontsize=7, rotation=90)
        return
    classes = [", ".join(task) for task in tasks]
    classes = [names if len(names) <= 14 else f"{names[:12]}.." for names in classes]
    labels = [f"{label}\n{names}" for label, names in zip(labels, classes, strict=False)]
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
    width, height, size = (0.95, 0.62, 9) if len(tasks) <= MAX_LABELLED_TASKS else (0.46, 0.34, 7)
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
    path: Path,
    curves: dict[str, list[list[float]]],
    tasks: list[list[str]],
    title: str,
    floor: dict | None,
    log_if_wide: bool = False,
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
        log_if_wide (`bool`, defaults to `False`): a logarithmic axis where positive values differ by a factor above 10.
    """
    figure = Figure(figsize=(7.6, 4.2 + 0.18 * len(curves)), layout="constrained")
    axes = figure.add_subplot()
    if floor is not None:
        low, high = floor["mean"] - floor["std"], floor["mean"] + floor["std"]
        axes.axhspan(low, high, color="0.85", label="floor (real vs real) and its spread", zorder=0)
    for index, (name, seeds) in enumerate(curves.items()):
        values, label = np.asarray(seeds, dtype=float), name.replace("$", r"\$")
        mean, color = values.mean(axis=0), colormaps["tab10"](index % 10)
        if len(mean) == 1 < len(tasks):
            axes.axhline(mean[0], color=color, linestyle="--", label=label)
            continue
        axes.plot(mean, color=color, marker="osD^v"[(index + index // 10) % 5], markersize=5, label=label)
        if len(values) > 1:
            error = values.std(axis=0, ddof=1) / np.sqrt(len(values))
            axes.fill_between(range(len(mean)), mean - error, mean + error, color=color, alpha=0.2, linewidth=0)
    _label_tasks(axes.xaxis, tasks, len(tasks))
    axes.set_xlim(-0.3, len(tasks) - 0.7)
    axes.set_xlabel("after training")
    axes.set_ylabel(title)
    levels = [value for seeds in curves.values() for values in seeds for value in values]
    if log_if_wide and 0 < 10 * min(levels) < max(levels):
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:g}")
    else:
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
        # A student starts as its teacher: the first distillation losses are rounding errors.
        axes.set_ylim(bottom=max(axes.get_ylim()[0], 1e-4 * np.nanmax(log[name])))
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


def plot_importance(path: Path, importance: dict[str, dict[str, float]]) -> None:
    """
    Saves how far every adapted layer is from where it started: the mean over classes, with their standard deviation.

    Args:
        path (`Path`): the PNG file.
        importance (`dict[str, dict[str, float]]`): by class and layer, from [`FunLoRA.importance`].
    """
    layers = list(next(iter(importance.values())))
    values = np.array([[found[layer] for layer in layers] for found in importance.values()])
    figure = Figure(figsize=(8, 1.2 + 0.19 * len(layers)), layout="constrained")
    axes = figure.add_subplot()
    axes.barh(range(len(layers)), values.mean(axis=0), xerr=values.std(axis=0), color="C0", ecolor="0.3", height=0.7)
    axes.set_yticks(range(len(layers)), layers, fontsize=7, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel(f"mean |entry - 1| of a class's vectors, over {len(values)} class{'es' * (len(values) > 1)}")
    axes.grid(alpha=0.25, axis="x")
    _save(figure, path)


def crop_class(path: str | Path, row: int, resolution: int, columns: int) -> np.ndarray:
    """
    Returns the first images of one class in a sample grid ([`sampling.image_grid`]), side by side, without the frame.

    Args:
        path (`str` or `Path`): `samples/task-NN.png` of a run, a row a class.
        row (`int`): the class.
        resolution (`int`): of the images; the grid may show them enlarged.
        columns (`int`): how many images, if there are so many.
    """
    from .sampling import GRID_IMAGE_SIZE, GRID_PADDING

    size = resolution * -(-GRID_IMAGE_SIZE // resolution)
    top = GRID_PADDING + row * (size + GRID_PADDING)
    with PIL.Image.open(path) as grid:
        right = min(columns * (size + GRID_PADDING), grid.width - GRID_PADDING)
        return np.asarray(grid.convert("RGB").crop((GRID_PADDING, top, right, top + size)))


def plot_one_class(
    path: Path, methods: dict[str, list[Path]], row: int, resolution: int, num_tasks: int, title: str
) -> None:
    """
    Saves what became of one class: a row a method, a column a task after which it was drawn.

    Args:
        path (`Path`): the PNG file.
        methods (`dict[str, list[Path]]`): for each name, the run's sample grids after the last tasks; one alone (a joint
            run) stands in the last column.
        row (`int`), resolution (`int`): where the class is in the grids ([`crop_class`]).
        num_tasks (`int`): the columns.
        title (`str`): what is drawn.
    """
    columns = int(np.clip(18 // num_tasks, 1, 4))
    pictures = {
        name: [crop_class(grid, row, resolution, columns) for grid in grids] for name, grids in methods.items()
    }
    # In inches; one pixel of a strip is one of the picture.
    strip = np.array(next(iter(pictures.values()))[0].shape[1::-1]) / 120
    left, top, gap = 0.3 + 0.07 * max(map(len, methods)), 0.55, 0.08
    width, height = size = np.array([left, top]) + (strip + gap) * (num_tasks, len(methods))
    figure = Figure(figsize=tuple(size))
    figure.text(gap / width, 1 - 0.05 / height, title, fontsize=10, ha="left", va="top", parse_math=False)
    for i, (name, strips) in enumerate(pictures.items()):
        bottom = height - top - (i + 1) * (strip[1] + gap) + gap
        middle = (bottom + strip[1] / 2) / height
        figure.text((left - 0.1) / width, middle, name, fontsize=9, ha="right", va="center", parse_math=False)
        for task, picture in enumerate(strips, start=num_tasks - len(strips)):
            x = left + task * (strip[0] + gap)
            axes = figure.add_axes((x / width, bottom / height, strip[0] / width, strip[1] / height))
            axes.imshow(picture, interpolation="nearest")
            axes.set_axis_off()
    for task in range(num_tasks):
        x = (left + task * (strip[0] + gap) + strip[0] / 2) / width
        figure.text(x, 1 - (top - 0.05) / height, f"task-{task:02d}", fontsize=8, ha="center", va="bottom")
    _save(figure, path)
