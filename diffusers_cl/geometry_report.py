"""The report of a geometry, as Markdown beside its pictures and as one HTML file that opens offline."""

import base64
import html
import re
from pathlib import Path

import diffusers
import torch

from . import __version__, geometry_words
from .files import write_json, write_text
from .geometry_plots import PUBLISHED_DIAGONAL_ERROR, PUBLISHED_RATIO, PUBLISHED_RATIO_AT, write_plots
from .markup import plain
from .plots import format_number
from .subject import Subject


SCHEMA = 1
STYLE = """
body { font: 15px/1.5 sans-serif; max-width: 56em; margin: 2em auto; padding: 0 1em; color: #222 }
table { border-collapse: collapse; font-size: 13px } td, th { border: 1px solid #ccc; padding: 3px 8px; text-align: right }
img { max-width: 100% } h2 { margin-top: 2em } .note { color: #666; font-size: 13px }
"""


def describe(subject: Subject, model: str) -> dict:
    """Returns what is analysed, on what, as JSON: names, not this machine's paths."""
    return {
        "schema": SCHEMA,
        "model": Path(model).name if Path(model).is_dir() else model,
        "data": subject.data,
        "tasks": subject.tasks,
        "num_parameters": sum(parameter.numel() for parameter in subject.unet.parameters()),
        "versions": {"diffusers_cl": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__},
        "device": subject.device.type,
        "threads": torch.get_num_threads(),
    }


def _table(rows: list[dict], surrogate: list[dict] | None) -> list[list[str]]:
    """A head and a row a timestep."""
    lines = []
    for index, row in enumerate(rows):
        cells = {
            "t": str(row["t"]),
            "loss": row["loss"],
            "MSE to input": row["scaled_prediction_error"],
            "mean abs cos": sum(row["cosines"]) / len(row["cosines"]),
            "lambda_2 / lambda_1": row["ratio"],
            "the paper's": format_number(PUBLISHED_RATIO) if row["t"] == PUBLISHED_RATIO_AT else "",
            "rank-1 error": row["rank1_error"],
            "best possible": row["best_rank1_error"],
            "diagonal error": row["diagonal_error"],
            "the paper's diagonal": f"near {PUBLISHED_DIAGONAL_ERROR}",
            "v to top eigenvector": row["top_cosine"],
            "n mu^2 / trace": row["signal_ratio"],
            "R / m": row["residual_share"],
        }
        if surrogate:
            cells |= {"left by a scalar": surrogate[index]["scalar"], "by a linear map": surrogate[index]["linear"]}
        lines.append([cell if isinstance(cell, str) else format_number(cell) for cell in cells.values()])
    return [list(cells), *lines]


def sections(geometry: dict) -> list[dict]:
    """Returns the report's sections in order: `title`, `text`, and a `table` (lists of cells) or the names of `pictures`."""
    words, found = geometry_words, []

    def add(title: str, text: str, *pictures: str, table: list[list[str]] | None = None) -> None:
        found.append({"title": title, "text": text, "pictures": pictures, "table": table})

    timesteps, surrogate, movement = (geometry.get(name) for name in ("timesteps", "surrogate", "movement"))
    if timesteps:
        rows = timesteps["rows"]
        number = (
            f"{rows[0]['num_samples']} per-sample gradients a timestep, draws of different timesteps are independent."
        )
        add(
            "In numbers",
            f"{number} Published values are the paper's, of its own network on MNIST.",
            table=_table(rows, surrogate),
        )
        add("Figure 1: the scaled prediction", words.scaled_prediction(rows), "figure_1_scaled_prediction.png")
        add("Figure 2: every gradient against their mean", words.cosines(rows), "figure_2_cosines.png")
        add(
            "Figure 3a: mean gradients of different timesteps",
            words.mean_cosines(timesteps),
            "figure_3a_mean_cosines.png",
        )
        pictures = ("figure_3b_eigenvalues.png", "figure_3c_ratio.png")
        add("Figures 3b and 3c: eigenvalues, and their ratio", words.spectrum(rows), *pictures)
        add("Figure 3d: rank-1 against diagonal", words.errors(rows), "figure_3d_errors.png")
    if "bands" in geometry:
        text = words.bands(geometry["bands"])
        if "stored_cosines" in geometry:
            text = f"{text} {words.stored(geometry['stored_cosines'])}"
        add("Critique (a): the bands, and other tasks", text, "critique_a_bands.png")
    if timesteps:
        add("Critique (b): is the top eigenspace stable?", words.stability(rows), "critique_b_stability.png")
    if surrogate:
        add("Critique (c): is the network linear?", words.linear(surrogate), "critique_c_linear.png")
    if timesteps:
        add("Critique (d): sampling noise", words.noise(rows), "critique_d_noise.png")
    if movement:
        pictures = ("critique_e_rises.png", "critique_e_losses.png")
        add("Critique (e): what moving along v does", words.movement(movement), *pictures)
    if "gauss_newton" in geometry:
        add("v and the curvature", words.gauss_newton(geometry["gauss_newton"], movement))
    return found


def _introduction(geometry: dict) -> list[str]:
    tasks = "; ".join(plain(", ".join(task)) for task in geometry["tasks"])
    return [
        f"{geometry['num_parameters']:,} parameters; data: {plain(geometry['data'])}; tasks learned: {tasks}. Empirical Fisher: the"
        " uncentred second moment of per-sample gradients of the denoising loss, not the true Fisher. What is about one task is about"
        " the last one.",
        "Bold words are chosen by rule from the numbers beside them: a cosine of 0.9 is collinear, a tenth is small, an error of 0.3 is"
        " close.",
    ]


def _machine(geometry: dict) -> str:
    spent, cpu = geometry["seconds"], geometry["cpu_seconds"]
    seconds = ", ".join(f"{name} {spent[name]:.0f} s ({cpu[name]:.0f} CPU seconds)" for name in spent)
    versions = ", ".join(f"{name} {version}" for name, version in geometry["versions"].items())
    plan = geometry["plan"]
    return (
        f"{seconds}; {geometry['device']}, {geometry['threads']} thread(s), {plan['passes']} pass(es) a timestep,"
        f" {plan['bytes_at_a_time'] / 2**30:.2f} GiB of gradients at a time, peak memory of the"
        f" process {geometry['peak_memory_gib']:.2f} GiB; {versions}."
    )


def to_markdown(geometry: dict) -> str:
    """Returns the report with links to `plots/`."""
    lines = [f"# Geometry of {plain(geometry['model'])} on {plain(geometry['data'])}", ""]
    for text in _introduction(geometry):
        lines += [text, ""]
    for section in sections(geometry):
        lines += [f"## {section['title']}", ""]
        for picture in section["pictures"]:
            lines += [f"![{section['title']}](plots/{picture})", ""]
        if section["table"]:
            head, *rows = section["table"]
            lines += [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
            lines += [*(f"| {' | '.join(row)} |" for row in rows), ""]
        lines += [section["text"], ""]
    return "\n".join([*lines, _machine(geometry), "", "Made from [geometry.json](geometry.json).", ""])


def _inline(text: str) -> str:
    return re.sub(r"\*\*(.+?)\*\*", r"<b>\1</b>", html.escape(text))


def to_html(geometry: dict, plots: Path) -> str:
    """Returns the report with its pictures inside: no file and no network is needed to read it."""
    title = html.escape(f"Geometry of {geometry['model']} on {geometry['data']}")
    body = [f"<h1>{title}</h1>", *(f"<p>{_inline(text)}</p>" for text in _introduction(geometry))]
    for section in sections(geometry):
        body.append(f"<h2>{html.escape(section['title'])}</h2>")
        for picture in section["pictures"]:
            data = base64.b64encode((plots / picture).read_bytes()).decode()
            body.append(f'<p><img alt="{html.escape(section["title"])}" src="data:image/png;base64,{data}"></p>')
        if section["table"]:
            head, *rows = section["table"]
            cells = ["".join(f"<td>{html.escape(cell)}</td>" for cell in row) for row in rows]
            body.append("<table><tr>" + "".join(f"<th>{html.escape(name)}</th>" for name in head) + "</tr>")
            body.append("".join(f"<tr>{row}</tr>" for row in cells) + "</table>")
        body.append(f"<p>{_inline(section['text'])}</p>")
    body.append(f'<p class="note">{html.escape(_machine(geometry))}</p>')
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{title}</title>'
    content = "\n".join(body)
    return f"<!doctype html>\n<html><head>{head}<style>{STYLE}</style></head><body>\n{content}\n</body></html>\n"


def _rounded(value):
    """Floats to nine digits: a loss has to have them for the rise along a random direction, and none is right beyond."""
    if isinstance(value, float):
        return float(f"{value:.9g}")
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    return [_rounded(entry) for entry in value] if isinstance(value, (list, tuple)) else value


def write_geometry(output_dir: Path, geometry: dict) -> Path:
    """
    Writes `geometry.json`, `plots/`, `report.md` and `report.html`, and returns the last one.

    Args:
        output_dir (`Path`), geometry (`dict`): from [`describe`] and [`analyze`].
    """
    geometry = {**_rounded(geometry), "inputs": geometry["inputs"]}
    for row in geometry.get("timesteps", {}).get("rows", []):
        row["cosines"] = [round(cosine, 3) for cosine in row["cosines"]]
    write_plots(output_dir / "plots", geometry)
    write_text(output_dir / "report.md", to_markdown(geometry))
    write_text(output_dir / "report.html", to_html(geometry, output_dir / "plots"))
    write_json(output_dir / "geometry.json", geometry)
    return output_dir / "report.html"
