"""The comparison of methods as a table, in Markdown and in LaTeX."""

import re

from .plots import format_number
from .report import HIGHER_IS_BETTER, PLUS_MINUS, format_spread, measurement_note
from .results import Run, mean_and_error


# Markdown's column names.
COLUMNS = {
    "method": "method",
    "seeds": "seeds",
    "average": "average",
    "learning": "learning",
    "forgetting": "forgetting",
    "worst": "worst task",
    "accuracy": "accuracy",
    "la": "LA",
    "aia": "AIA",
    "aia_generated": "AIA, all generated",
    "per_class": "PPC",
    "gap_closed": "gap closed",
    "paired": "average - distillation's",
    "published": "published",
    "stored": "stored",
    "generated": "images generated",
    "minutes": "minutes",
    "classification_minutes": "of these for LA, AIA",
}
# Left out where no row has a value.
OPTIONAL_COLUMNS = (
    *("accuracy", "la", "aia", "aia_generated", "per_class", "classification_minutes"),
    *("gap_closed", "paired", "published"),
)
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


def format_count(number: int | None) -> str:
    """Returns a number of parameters as papers have it: 10.0K."""
    if number is None:
        return "n/a"
    return f"{number}" if number < 1000 else f"{format_number(number / 1000)}K"


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
        # Shares with three decimals: methods may differ by less than 1 %.
        **{key: _mean(row[key], 0.5) for key in ("la", "aia", "aia_generated")},
        "per_class": format_count(row["per_class"]),
        "gap_closed": "n/a" if row["gap_closed"] is None else f"{row['gap_closed']:.0%}",
        "paired": "" if row["is_reference"] else paired,
        "published": " / ".join("n/a" if value is None else f"{value}" for value in row["published"] or []),
        "stored": format_bytes(row["stored"]),
        "generated": "n/a" if row["generated"] is None else f"{row['generated']:.0f}",
        **{key: "n/a" if row[key] is None else f"{row[key]:.1f}" for key in ("minutes", "classification_minutes")},
    }


def table_cells(table: dict) -> list[list[str]]:
    """Returns the comparison (from [`compare`]) as rows of text: the head, a row a method, the floor."""
    cells = [_cells(row) for row in table["rows"]]
    columns = [
        key for key in COLUMNS if key not in OPTIONAL_COLUMNS or any(row[key] is not None for row in table["rows"])
    ]
    # A column of zeros says nothing.
    if "per_class" in columns and not any(row["per_class"] for row in table["rows"]):
        columns.remove("per_class")
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
    notes += classification_notes(table)
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


def classification_notes(table: dict) -> list[str]:
    """Returns what LA, AIA and PPC are, where a run has them, and the level of a classifier of real images."""
    found = [run.metrics["classification"] for run in table["runs"] if "classification" in run.metrics]
    notes = []
    if found:
        notes.append(
            f"LA, AIA: accuracy on real test images of a {found[0]['network']} trained on {found[0]['images_per_class']} "
            "generated images a class alone, after the last task and averaged over the tasks (AIA with real images for the "
            "first task, as arXiv 2510.02631 has it)."
        )
        levels = [one["real"]["average_accuracy"][-1] for one in found]
        if bound := mean_and_error([level for level in levels if level is not None]):
            most = max(one["real"]["images_per_class"][1] for one in found if one["real"]["images_per_class"])
            notes.append(f"On at most {most} real images a class it has {_mean(bound, 0.5)} (classifier multitask).")
        notes.append("LA of the joint method: generative multitask.")
    if any(row["per_class"] for row in table["rows"]):
        notes.append("PPC: parameters of its own that a class has.")
    return notes


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
