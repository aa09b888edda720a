"""
Puts runs side by side: a Markdown table and, if asked for, LaTeX, a table of the tasks and the average after every task.

    python scripts/compare_runs.py runs/* results/digits/*-seed*.json --plot curve.png > table.md
    python scripts/compare_runs.py runs/digits --save results/digits/finetune-seed0.json

Inputs are output folders of `train_continual.py` and files that `--save` or `scripts/reproduce.py` made. Runs whose
configurations differ in nothing but the seed, the order of the classes and keys that nothing reads are one row, with the
mean over runs and its standard error.
"""

import argparse
import sys
from pathlib import Path

from diffusers_cl.comparison import compare, plot_averages
from diffusers_cl.files import write_json, write_text
from diffusers_cl.report import read_json
from diffusers_cl.results import ROOT, join_result, load_run
from diffusers_cl.tables import render_latex, render_markdown


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", help="output folders of train_continual.py, or results files")
    parser.add_argument("--metric", help="the metric of table and plot (default: fid, else the fd_*)")
    parser.add_argument("--per_task", action="store_true", help="also print the metric of every task at the end")
    parser.add_argument("--latex", type=Path, help="write the table into this file, too, in LaTeX")
    parser.add_argument("--plot", type=Path, help="draw the average after every task into this PNG file")
    parser.add_argument("--save", type=Path, help="join one finished run into this results file; makes no table")
    parser.add_argument("--made_by", help="with --save: the command that made the run, as it was typed")
    args = parser.parse_args(argv)
    try:
        runs = [load_run(path) for path in args.runs]
        if args.made_by and not args.save:
            raise ValueError("--made_by belongs to --save")
        if args.save:
            if len(runs) != 1 or args.plot or args.latex or args.metric or args.per_task:
                raise ValueError("--save takes one run and neither --plot, --latex, --per_task nor --metric")
            write_json(args.save, join_result(runs[0], args.made_by, runs[0].scale))
            return
        for run in runs:
            if not run.finished:
                print(f"warning: {run.path} is left out: its tasks are not all finished", file=sys.stderr)
        runs = [run for run in runs if run.finished]
        if not runs:
            raise ValueError(f"no finished run among {', '.join(args.runs)}")
        table = compare(runs, args.metric, read_json(ROOT / "results" / "published.json"))
        print(render_markdown(table, args.per_task), end="")
        if args.latex:
            write_text(args.latex, render_latex(table))
        if args.plot:
            plot_averages(args.plot, table)
    except (ValueError, OSError) as error:
        print(f"compare_runs.py: error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
