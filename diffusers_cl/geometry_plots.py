"""Pictures of the geometry of a checkpoint's gradients, named after the paper's figures. They need no display and no pyplot."""

import io
from pathlib import Path

import numpy as np
import PIL.Image
from matplotlib import colormaps
from matplotlib.figure import Figure

from .bands import ALL, BANDS
from .movement import rises


# arXiv 2509.23593, Sec. 3.2: the lowest ratio, at t = 700, and the diagonal's error, "near 1.0 at every timestep".
PUBLISHED_RATIO, PUBLISHED_RATIO_AT, PUBLISHED_DIAGONAL_ERROR = 0.022, 700, 1.0
BAND_NAMES = {"high_snr": "high SNR", "mid_snr": "mid SNR", "low_snr": "low SNR", ALL: "all t"}
COLORS = 128


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = io.BytesIO()
    figure.savefig(content, dpi=100, facecolor="white")
    with PIL.Image.open(content) as picture:
        # A third of the size: reports travel with their pictures inside.
        picture.convert("RGB").quantize(COLORS, dither=PIL.Image.Dither.NONE).save(path, optimize=True)


def _curves(path: Path, t: list[int], curves: dict[str, list], ylabel: str, log=False, low=None, marks=()) -> None:
    """One line a name over timesteps; `marks` are published points `(t, value, name)`, or levels where t is `None`."""
    figure = Figure(figsize=(6.4, 3.8), layout="constrained")
    axes = figure.add_subplot()
    for index, (name, values) in enumerate(curves.items()):
        axes.plot(t, values, marker="osD^v"[index % 5], markersize=4, color=f"C{index}", label=name)
    for at, value, name in marks:
        if at is None:
            axes.axhline(value, color="0.4", linestyle="--", linewidth=1, label=name)
        else:
            axes.plot([at], [value], "*", color="black", markersize=11, label=name, zorder=5)
    axes.set(xlabel="timestep t (more noise to the right)", ylabel=ylabel)
    axes.set_xticks(t)
    if log:
        axes.set_yscale("log")
    elif low is not None:
        axes.set_ylim(bottom=low)
    axes.grid(alpha=0.3)
    if len(curves) + len(marks) > 1:
        figure.legend(loc="outside lower center", ncols=3, fontsize=8, frameon=False)
    _save(figure, path)


def plot_cosine_pixels(path: Path, rows: list[dict]) -> None:
    """
    Saves |cos| of every per-sample gradient to the mean: a square a timestep, a pixel a sample, deeper red is closer to 1 (the
    paper's Figure 2).

    Args:
        path (`Path`): the PNG file.
        rows (`list[dict]`): of timesteps, with `t` and `cosines`.
    """
    columns = min(len(rows), 3)
    lines = -(-len(rows) // columns)
    figure = Figure(figsize=(2.3 * columns + 1.1, 2.45 * lines + 0.2), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, row in zip(grid.flat, rows, strict=False):
        side = int(np.ceil(len(row["cosines"]) ** 0.5))
        pixels = np.full(side**2, np.nan)
        pixels[: len(row["cosines"])] = row["cosines"]
        picture = axes.imshow(np.ma.masked_invalid(pixels.reshape(side, side)), cmap="Reds", vmin=0, vmax=1)
        axes.set_title(f"t = {row['t']}: mean {np.mean(row['cosines']):.2f}", fontsize=9)
    figure.colorbar(picture, ax=grid, shrink=0.7, label="|cos| to the mean gradient")
    _save(figure, path)


def _heat_map(axes, matrix: list[list], names: list[str], title: str, low: float = -1.0) -> None:
    values = np.array([[np.nan if value is None else value for value in row] for row in matrix], dtype=float)
    cmap = colormaps["RdBu_r" if low < 0 else "Reds"]
    axes.imshow(np.ma.masked_invalid(np.clip(values, low, 1)), cmap=cmap, vmin=low, vmax=1)
    for i, j in np.ndindex(values.shape):
        dark = abs(values[i, j]) > 0.6
        text = "noise" if np.isnan(values[i, j]) else f"{values[i, j]:.2f}"
        axes.text(j, i, text, ha="center", va="center", fontsize=7, color="white" if dark else "black")
    axes.set_xticks(
        range(len(names)), names, fontsize=7, rotation=90 if max(map(len, names)) > 4 else 0, parse_math=False
    )
    axes.set_yticks(range(len(names)), names, fontsize=7, parse_math=False)
    axes.set_title(title, fontsize=9)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)


def plot_mean_cosines(path: Path, timesteps: dict) -> None:
    """Saves the cosines between the mean gradients of different timesteps (the paper's Figure 3a)."""
    names = [str(row["t"]) for row in timesteps["rows"]]
    size = 1.6 + 0.42 * len(names)
    figure = Figure(figsize=(size + 0.4, size), layout="constrained")
    _heat_map(figure.add_subplot(), timesteps["mean_cosines"], names, "cosine between mean gradients of timesteps")
    _save(figure, path)


def plot_bands(path: Path, bands: dict, tasks: list[str]) -> None:
    """Saves the cosines between tasks, a square a band, and between the bands of the last task, without sampling noise."""
    names = [ALL, *BANDS]
    last = bands["between_bands"][-1]["corrected"]
    order = [len(BANDS), *range(len(BANDS))]
    between = [[last[i][j] for j in order] for i in order]
    count = len(names) if len(tasks) > 1 else 0
    size = max(2.3, 1.0 + 0.4 * len(tasks))
    figure = Figure(figsize=(size * max(2, (count + 2) // 2), 2 * size if count else size), layout="constrained")
    grid = figure.subplots(2 if count else 1, max(1, (count + 2) // 2), squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, name in zip(grid.flat, names[:count], strict=False):
        axes.set_axis_on()
        _heat_map(axes, bands["between_tasks"][name]["corrected"], tasks, f"between tasks, {BAND_NAMES[name]}")
    axes = grid.flat[count]
    axes.set_axis_on()
    _heat_map(axes, between, [BAND_NAMES[name] for name in names], f"between bands, {tasks[-1]}")
    _save(figure, path)


def plot_movement(path: Path, movement: dict) -> None:
    """Saves by how much the loss rises along every direction, over the length of the move: both logarithmic."""
    steps, curves = np.array(movement["steps"]), movement["curves"]
    names = [name for name in (ALL, *BANDS) if name in curves]
    figure = Figure(figsize=(9.2, 7.0), layout="constrained")
    grid = figure.subplots(2, 2, sharex=True, sharey=True)
    drawn = [curves["random"], curves["top_coordinates"], *([curves[n]["own"]] for n in names)]
    highest = max(max(rises(curve)) for group in drawn for curve in group)
    for axes, name in zip(grid.flat, names, strict=False):
        groups = {
            "v of this task": ([curves[name]["own"]], "C3", "o"),
            "the same band's v of other tasks": (curves[name]["others"], "C0", "s"),
            "the diagonal's top coordinates": (curves["top_coordinates"], "C2", "^"),
            "random directions": (curves["random"], "0.5", "v"),
        }
        for label, (group, color, marker) in groups.items():
            values = np.array([rises(curve) for curve in group])
            if not len(values):
                continue
            axes.plot(steps, np.where(values > 0, values, np.nan).T, color=color, linewidth=0.6, alpha=0.5)
            mean = values.mean(axis=0)
            axes.plot(steps, np.where(mean > 0, mean, np.nan), color=color, marker=marker, markersize=5, label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        axes.set_ylim(highest * 1e-8, highest * 3)
        axes.set_title(f"v of {BAND_NAMES[name]}", fontsize=10)
        axes.grid(alpha=0.3)
    figure.legend(
        *grid[0, 0].get_legend_handles_labels(), loc="outside lower center", ncols=4, fontsize=8, frameon=False
    )
    for axes in grid[-1]:
        axes.set_xlabel("length of the move")
    for axes in grid[:, 0]:
        axes.set_ylabel("rise of the task's loss")
    _save(figure, path)


def plot_loss_curves(path: Path, movement: dict) -> None:
    """Saves the loss itself along v of this task, of the others, the diagonal's coordinates and a random direction."""
    steps, curves = np.array(movement["steps"]), movement["curves"]
    moves = np.concatenate([-steps[::-1], [0.0], steps])
    figure = Figure(figsize=(6.8, 4.4), layout="constrained")
    axes = figure.add_subplot()
    groups = {
        "v of this task": ([curves[ALL]["own"]], "C3", "o"),
        "v of other tasks": (curves[ALL]["others"], "C0", "s"),
        "the diagonal's top coordinates": (curves["top_coordinates"], "C2", "^"),
        "random directions": (curves["random"], "0.5", "v"),
    }
    for label, (group, color, marker) in groups.items():
        if group:
            axes.plot(moves, np.array(group).T, color=color, linewidth=0.6, alpha=0.4)
            axes.plot(moves, np.mean(group, axis=0), color=color, marker=marker, markersize=4, label=label)
    axes.set(xlabel="move along the direction", ylabel="loss of the task's test images", yscale="log")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)
    _save(figure, path)


def write_plots(folder: Path, geometry: dict) -> list[str]:
    """
    Writes the pictures of what was measured, and returns their names.

    Args:
        folder (`Path`), geometry (`dict`): the content of geometry.json.
    """
    written = []

    def to(name: str) -> Path:
        written.append(name)
        return folder / name

    if "timesteps" in geometry:
        rows = geometry["timesteps"]["rows"]
        t = [row["t"] for row in rows]

        def column(name: str) -> list[float]:
            return [row[name] for row in rows]

        ratio = [(PUBLISHED_RATIO_AT, PUBLISHED_RATIO, f"the paper's lowest, {PUBLISHED_RATIO}")]
        error = [(None, PUBLISHED_DIAGONAL_ERROR, "the paper's diagonal, near 1.0")]
        scaled = {"scaled prediction": column("scaled_prediction_error")}
        _curves(to("figure_1_scaled_prediction.png"), t, scaled, "mean squared error to the input", low=0)
        plot_cosine_pixels(to("figure_2_cosines.png"), rows)
        plot_mean_cosines(to("figure_3a_mean_cosines.png"), geometry["timesteps"])
        top = {f"lambda_{i + 1}": [row["eigenvalues"][i] for row in rows] for i in range(5)}
        _curves(to("figure_3b_eigenvalues.png"), t, top, "eigenvalue of F", log=True)
        _curves(
            to("figure_3c_ratio.png"),
            t,
            {"this checkpoint": column("ratio")},
            "lambda_2 / lambda_1",
            low=0,
            marks=ratio,
        )
        errors = {
            "rank-1 (mean gradient)": column("rank1_error"),
            "best rank-1 (top eigenvector)": column("best_rank1_error"),
            "diagonal": column("diagonal_error"),
        }
        _curves(to("figure_3d_errors.png"), t, errors, "relative Frobenius error", low=0, marks=error)
        stable = {"|R| / m": column("residual_share"), "lambda_2 / lambda_1": column("ratio")}
        level = [(None, 1.0, "R as large as what is kept")]
        _curves(to("critique_b_stability.png"), t, stable, "share", log=True, marks=level)
        noise = {
            "two halves of the draws": column("half_cosine"),
            "v to the top eigenvector": column("top_cosine"),
        }
        _curves(to("critique_d_noise.png"), t, noise, "cosine")
    if "surrogate" in geometry:
        rows = geometry["surrogate"]
        shares = {name: [row[name] for row in rows] for name in ("scalar", "linear")}
        _curves(to("critique_c_linear.png"), [row["t"] for row in rows], shares, "share of |eps|^2 left", low=0)
    if "bands" in geometry:
        plot_bands(to("critique_a_bands.png"), geometry["bands"], [f"task {k}" for k in range(len(geometry["tasks"]))])
    if "movement" in geometry:
        plot_movement(to("critique_e_rises.png"), geometry["movement"])
        plot_loss_curves(to("critique_e_losses.png"), geometry["movement"])
    return written
