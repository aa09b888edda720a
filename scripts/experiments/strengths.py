"""
Draws what the strength of a penalty does: average and forgetting over `ewc_lambda`, a line a penalty_mode.

    python scripts/experiments/strengths.py results/digits/{distillation,rank1_ewc_distillation,paper_rank1_ewc_distillation}-seed*.json \
      results/digits/strength/*-seed*.json --plot strengths.png

Multiples of `auto` stand in their order and the numbers to their right; the run without a penalty is a band.
"""

import argparse
import sys
from pathlib import Path

from matplotlib.figure import Figure

from diffusers_cl.comparison import compare
from diffusers_cl.results import load_run
from diffusers_cl.strength import parse_ewc_lambda


QUANTITIES = ("average", "forgetting")


def strength_order(ewc_lambda: float | str) -> tuple[bool, float]:
    """Returns what strengths are sorted by: multiples of `auto` first."""
    factor, automatic = parse_ewc_lambda(ewc_lambda)
    return not automatic, factor


def lines(table: dict) -> tuple[list[float | str], dict[str, dict[float | str, dict]], dict]:
    """
    Returns the strengths in order, the rows of the comparison by penalty_mode and strength, and the row without a penalty.

    Raises:
        ValueError: when there is not exactly one row without a penalty.
    """
    modes: dict[str, dict[float | str, dict]] = {}
    without = []
    for row in table["rows"]:
        config = table["groups"][row["method"]][0].config
        if config["penalty"] == "none":
            without.append(row)
        else:
            modes.setdefault(config["penalty_mode"], {})[config["ewc_lambda"]] = row
    if len(without) != 1:
        raise ValueError(f"the comparison takes one method without a penalty, found {len(without)}")
    strengths = sorted({strength for rows in modes.values() for strength in rows}, key=strength_order)
    return strengths, modes, without[0]


def plot(path: Path, table: dict) -> None:
    """Saves the picture; error bars are standard errors over seeds, and both axes are logarithmic above 1."""
    strengths, modes, without = lines(table)
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    for axes, quantity in zip(figure.subplots(1, 2), QUANTITIES, strict=True):
        mean, error = without[quantity]
        axes.axhspan(mean - (error or 0), mean + (error or 0), color="0.8", label="no penalty")
        axes.axhline(mean, color="0.5", linewidth=1)
        for index, (mode, rows) in enumerate(sorted(modes.items())):
            places = [strengths.index(strength) for strength in rows]
            order = sorted(range(len(places)), key=places.__getitem__)
            values = [list(rows.values())[i][quantity] for i in order]
            axes.errorbar(
                [places[i] + 0.06 * index for i in order],
                [value[0] for value in values],
                [value[1] or 0 for value in values],
                marker="os"[index],
                capsize=3,
                label=f"penalty_mode: {mode}",
            )
        axes.set_xticks(range(len(strengths)), [f"{s:g}" if isinstance(s, float) else s for s in strengths])
        axes.set_xlabel("ewc_lambda")
        axes.set_ylabel(f"{quantity}, {table['metric']} (lower is better)")
        axes.set_yscale("symlog", linthresh=1)
        axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="runs or results files, those without a penalty among them")
    parser.add_argument("--plot", type=Path, required=True, help="the PNG file")
    args = parser.parse_args(argv)
    try:
        plot(args.plot, compare([load_run(path) for path in args.runs]))
    except (ValueError, OSError) as error:
        print(f"strengths.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
