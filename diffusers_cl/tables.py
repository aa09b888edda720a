"""The comparison of methods as a table, in Markdown and in LaTeX."""

import re

from .plots import format_number
from .report import HIGHER_IS_BETTER, PLUS_MINUS, format_spread, measurement_note
from .results import Run


# Markdown's column names. Those that no row fills are left out.
COLUMNS = {
    "method": "method",
    "seeds": "seeds",
    "average": "average",
    "learning": "learning",
    "forgetting": "forgetting",
    "worst": "worst task",
    "accuracy": "accuracy",
    "gap_closed": "gap closed",
    "paired": "average - distillation's",
    "published": "published",
    "stored": "stored",
    "generated": "images generated",
    "minutes": "minutes",
}
FLOOR_NAME = "floor (real against real)"
LATEX_ESCAPES = {character: f"\\{character}" for character in "&%$#_{}"} | {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    "|": r"\textbar{}",
    PLUS_MINUS: r"$\pm$",
}


def format_bytes(number: int | None) -> str:
    """Returns a number of bytes with three digits, in units of 1000."""
    if number is None:
        return "n/a"
    exponent = min((len(str(number)) - 1) // 3, 4)
    digits = f"{number}" if exponent == 0 else format_number(number / 1000**exponent)
    return f"{digits} {('B', 'kB', 'MB', 'GB', 'TB')[exponent]}"


def _mean(value: tuple | None, scale: float, sign: bool = False) -> str:
    if value is None:
        return "n/a"
    mean = format_number(value[0], sign, scale)
    return mean if value[1] is None else f"{mean} {PLUS_MINUS} {format_number(value[1], scale=scale)}"


def _cells(row: dict) -> dict[str, str]:
    scale, seeds = row["average"][0], ", ".join(map(str, row["seeds"]))
    orders = f" x {row['num_orders']} orders" if row["num_orders"] > 1 else ""
    paired = _mean(row["paired"], scale, sign=True)
    if row["paired"]:
        paired += f" (n={row['paired'][2]})"
    return {
        "method": row["method"],
        "seeds": f"{seeds}{orders} (n={row['num_runs']})",
        **{key: _mean(row[key], scale, sign=key == "forgetting") for key in ("average", "learning", "forgetting")},
        "worst": _mean(row["worst"], scale),
        "accuracy": _mean(row["accuracy"], 1.0),
        "gap_closed": "n/a" if row["gap_closed"] is None else f"{row['gap_closed']:.0%}",
        "paired": "" if row["is_reference"] else paired,
        "published": " / ".join("n/a" if value is None else f"{value}" for value in row["published"] or []),
        "stored": format_bytes(row["stored"]),
        "generated": "n/a" if row["generated"] is None else f"{row['generated']:.0f}",
        "minutes": "n/a" if row["minutes"] is None else f"{row['minutes']:.1f}",
    }


def table_cells(table: dict) -> list[list[str]]:
    """Returns the comparison (from [`compare`]) as rows of text: the head, a row a method, the floor."""
    cells = [_cells(row) for row in table["rows"]]
    columns = [
        key
        for key in COLUMNS
        if key not in ("accuracy", "gap_closed", "paired", "published")
        or any(row[key] is not None for row in table["rows"])
    ]
    rows = [[COLUMNS[key] for key in columns], *([row[key] for key in columns] for row in cells)]
    if floor := table["floor"]:
        known = {"method": FLOOR_NAME, "average": format_spread(floor["mean"], floor["std"])}
        rows.append([known.get(key, "") for key in columns])
    return rows


def per_task_cells(table: dict) -> list[list[str]]:
    """Returns the metric of every task at the end, the mean over runs, as rows of text."""
    runs = table["runs"]
    tasks = runs[0].metrics["tasks"]
    alike = all(run.metrics["tasks"] == tasks for run in runs)
    classes = [f" ({', '.join(names)})" if alike and len(names) < 5 else "" for names in tasks]
    rows = [["method", *(f"task-{task:02d}{names}" for task, names in enumerate(classes))]]
    for row in table["rows"]:
        rows.append([row["method"], *(format_number(value, scale=row["average"][0]) for value in row["per_task"])])
    if table["floor"]:
        rows.append([FLOOR_NAME, *map(format_number, table["floor"]["per_task"])])
    return rows


def table_notes(table: dict) -> list[str]:
    """Returns what the comparison is read with, in Markdown: paragraphs, the first about a scaled run where there is one."""
    runs, metric, floor, gap = table["runs"], table["metric"], table["floor"], table["gap"]
    devices = sorted({f"{run.machine['device']} ({run.machine['threads']} threads)" for run in runs if run.machine})
    notes = [
        f"`{metric}` ({'higher' if metric in HIGHER_IS_BETTER else 'lower'} is better), mean {PLUS_MINUS} standard "
        "error over n runs.",
        measurement_note(runs[0].metrics, metric, floor),
    ]
    digests = sorted({run.metrics.get("feature_extractor_info", {}).get("sha256", "unknown")[:8] for run in runs})
    if len(digests) > 1:
        notes.append(
            f"**Measured with {len(digests)} feature extractors (sha256 {', '.join(digests)})**: their distances differ by "
            "1 % or so whatever the method."
        )
    if gap:
        notes.append("Gap closed: (fine-tuning - method) / (fine-tuning - joint).")
        if floor and abs(gap) <= floor["std"]:
            notes.append("That gap is itself within the floor's spread: shares of it mean nothing.")
    elif max(table["bounds"]) > 1 and min(table["bounds"]) > 0:
        notes.append("No gap closed: there is more than one fine-tuning or joint method.")
    if any(row["accuracy"] for row in table["rows"]):
        notes.append("Accuracy: images of the last model that a classifier trained on real ones gives their class.")
    if any(row["paired"] for row in table["rows"]):
        notes.append(f"Average - distillation's: over the n pairs of equal seed{_and_order(runs)}.")
    if any(row["published"] for row in table["rows"]):
        notes.append(f"Published: average / forgetting, {table['source']}.")
    notes.append("Stored: what is kept between tasks beside the model. Images generated: to train on.")
    notes.append(f"Minutes: the whole run, on {', '.join(devices) or 'n/a'}.")
    scales = sorted({run.scale for run in runs if run.scale is not None})
    scaled = [
        f"**Scaled by {', '.join(f'{scale:g}' for scale in scales)}** (`reproduce.py --scale`): fewer epochs or steps, "
        "fewer images and a smaller network than the preset's; not to be compared with published numbers."
    ]
    return [*(scaled if scales else []), " ".join(notes)]


def _and_order(runs: list[Run]) -> str:
    return " and order of the classes" if len({run.pair[1] for run in runs}) > 1 else ""


def to_markdown(rows: list[list[str]]) -> str:
    """Returns rows of text, the first of which is the head, as a Markdown table."""
    rows = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(row)} |" for row in [rows[0], ["---"] * len(rows[0]), *rows[1:]]) + "\n"


def escape_latex(text: str) -> str:
    """Returns text for LaTeX; a minus before a number is one there."""
    return re.sub(r"(?<![\w.)-])-(?=\d)", "$-$", text.translate(str.maketrans(LATEX_ESCAPES)))


def to_latex(rows: list[list[str]], notes: list[str]) -> str:
    """Returns rows of text and the notes below them, in Markdown, as LaTeX; it needs `booktabs`."""
    lines = [" & ".join(map(escape_latex, row)) + r" \\" for row in rows]
    text = "\n\n".join(map(escape_latex, notes))
    text = re.sub(r"`([^`]*)`", r"\\texttt{\1}", re.sub(r"\*\*([^*]*)\*\*", r"\\textbf{\1}", text))
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            rf"\begin{{tabular}}{{ll{'r' * (len(rows[0]) - 2)}}}",
            *[r"\toprule", lines[0], r"\midrule", *lines[1:], r"\bottomrule", r"\end{tabular}"],
            *["", rf"\par\smallskip{{\footnotesize {text}\par}}", ""],
        ]
    )


def render_markdown(table: dict, per_task: bool = False) -> str:
    """Returns the comparison (from [`compare`]) in Markdown with its notes and, if asked for, a table of the tasks."""
    parts = [to_markdown(table_cells(table)), *(f"{note}\n" for note in table_notes(table))]
    if per_task:
        parts += [f"`{table['metric']}` of every task at the end:\n", to_markdown(per_task_cells(table))]
    return "\n".join(parts)


def render_latex(table: dict) -> str:
    """Returns the comparison (from [`compare`]) in LaTeX with its notes."""
    return to_latex(table_cells(table), table_notes(table))
