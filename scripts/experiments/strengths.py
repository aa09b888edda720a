"""
Draws what the strength of a penalty does: average and forgetting over `ewc_lambda`, each held against no penalty on the same
seeds, a line a penalty_mode.

    python scripts/experiments/strengths.py results/digits/{distillation,rank1_ewc_distillation,paper_rank1_ewc_distillation}-seed*.json \
      results/digits/strength/*-seed*.json --plot strengths.png

Multiples of `auto` stand in their order and the numbers to their right.
"""

import argparse
import sys
from pathlib import Path

from matplotlib.figure import Figure

from diffusers_cl.comparison import compare
from diffusers_cl.results import Run, load_run, mean_and_error
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


def changes(group: list[Run], without: list[Run], metric: str, quantity: str) -> tuple[float, float | None]:
    """Returns how far a quantity lies above that without a penalty on the same seeds: mean, standard error (`None` for one)."""
    base = {run.pair: run.metrics["metrics"][metric] for run in without}

    def value(values: dict) -> float:
        return values["average"][-1] if quantity == "average" else values[quantity]

    pairs = [(run.metrics["metrics"][metric], base[run.pair]) for run in group if run.pair in base]
    return mean_and_error([value(own) - value(other) for own, other in pairs])


def plot(path: Path, table: dict) -> None:
    """Saves the picture: paired differences to no penalty, error bars of one standard error, logarithmic beyond 0.1."""
    strengths, modes, without = lines(table)
    figure = Figure(figsize=(9.6, 4.4), layout="constrained")
    for axes, quantity in zip(figure.subplots(1, 2), QUANTITIES, strict=True):
        axes.axhline(0, color="0.4", linewidth=1, label="no penalty")
        for index, (mode, rows) in enumerate(sorted(modes.items())):
            # Numbers weigh the Fisher, multiples of auto the curvature: no line goes from one to the other.
            for part, automatic in enumerate((True, False)):
                own = [s for s in strengths if s in rows and parse_ewc_lambda(s)[1] == automatic]
                found = [
                    changes(
                        table["groups"][rows[s]["method"]],
                        table["groups"][without["method"]],
                        table["metric"],
                        quantity,
                    )
                    for s in own
                ]
                axes.errorbar(
                    [strengths.index(s) + 0.08 * index for s in own],
                    [mean for mean, _ in found],
                    [error or 0 for _, error in found],
                    color=f"C{index}",
                    marker="os"[index],
                    capsize=3,
                    label=f"penalty_mode: {mode}" if part == 0 else None,
                )
        axes.set_xticks(range(len(strengths)), [f"{s:g}" if isinstance(s, float) else s for s in strengths])
        axes.set_xlabel("ewc_lambda")
        axes.set_ylabel(f"{quantity}: {table['metric']} above no penalty's")
        axes.set_yscale("symlog", linthresh=0.1)
        axes.yaxis.set_major_formatter("{x:g}")
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
