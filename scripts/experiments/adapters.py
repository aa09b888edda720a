"""
FunLoRA beside the adapters that its paper compares with: the same frozen network, data, steps, draws and measures.

    python scripts/experiments/adapters.py runs/funlora --output results/funlora/adapters/digits_seed0.json
    python scripts/experiments/adapters.py --table results/funlora/adapters/digits_seed*.json

The run is one of `--adapter funlora`. On the network of its first task, every later task is learned with parameters of each
kind (adapter_kinds.py), with the run's settings, and measured as the run measured. The kind `funlora` trains the run's own
adapters once more, for their seconds, and says whether they are the run's bit by bit. What is in the output already stays.
"""

import argparse
import statistics
import sys
from pathlib import Path

import torch
from accelerate import Accelerator
from adapter_kinds import KINDS
from adapter_run import measure, open_run

from diffusers_cl.errors import ConfigError, DataError, RunError
from diffusers_cl.files import read_json, write_json
from diffusers_cl.plots import format_number
from diffusers_cl.processes import set_num_threads
from diffusers_cl.record import versions
from diffusers_cl.report import format_spread
from diffusers_cl.results import checkout_commit, mean_and_error
from diffusers_cl.tables import format_count, to_markdown


NAMES = {
    "scale_shift": "scale and shift",
    "lora_attention": "LoRA, attention",
    "lora_conv_v1": "LoRA, convolutions, v1",
    "lora_conv_v2": "LoRA, convolutions, v2",
    "vanilla_conditioning": "class embedding alone",
}


def about_machine(kind: str, accelerator: Accelerator, threads: int) -> dict:
    """Returns what the numbers of a row depend on beside its settings."""
    found = versions()
    if kind in ("lora_attention", "lora_conv_v2"):
        import peft

        found["peft"] = peft.__version__
    return {"device": str(accelerator.device), "threads": threads, "versions": found, "commit": checkout_commit()}


def summarize(contents: list[dict]) -> list[dict]:
    """
    Returns, for FunLoRA as the runs have it, then for every kind and learning rate, means and standard errors over the runs.

    Args:
        contents (`list[dict]`): of the files, a run each.

    Raises:
        ConfigError: when the runs are not one method on one stream, or one is there twice.
    """
    first, seeds = contents[0]["run"], [content["run"]["seed"] for content in contents]
    for content in contents:
        own, other = ({**about["config"], "seed": None} for about in (content["run"], first))
        if own != other or content["run"]["tasks"] != first["tasks"]:
            keys = sorted(key for key in own if own[key] != other.get(key))
            raise ConfigError(f"{content['run']['name']} and {first['name']} cannot stand in one table: {keys}")
    if len(set(seeds)) < len(seeds):
        raise ConfigError(f"the runs have the seeds {seeds}; allowed: each once")
    groups: dict[tuple, list[tuple[int, dict]]] = {}
    for content in contents:
        run = content["run"]
        again = [row for row in content["rows"] if is_again(row, run)]
        spent = {key: again[0][key] for key in ("seconds", "cpu_seconds")} if again else {}
        own = {"per_task": run["per_task"], "classification": run["classification"], **spent}
        own["parameters_per_class"] = run["parameters"]["per_class"]
        groups.setdefault((run["method"], run["learning_rate"]), []).append((run["seed"], own))
    for content in contents:
        for row in content["rows"]:
            if not is_again(row, content["run"]):
                rank = f" (r = {row['rank']})" if "rank" in row else ""
                name = content["run"]["method"] if row["kind"] == "funlora" else NAMES[row["kind"]] + rank
                groups.setdefault((name, row["learning_rate"]), []).append((content["run"]["seed"], row))
    clock = "cpu_seconds" if first["device"] == "cpu" else "seconds"
    summary = []
    for (name, learning_rate), members in groups.items():
        seeds, rows = zip(*members, strict=True)
        row = {"method": name, "learning_rate": learning_rate, "seeds": list(seeds)}
        row["parameters_per_class"] = rows[0]["parameters_per_class"]
        for key in (first["metric"], "recall", "accuracy", "la", "aia", clock):
            found = mean_and_error([value_of(row, key) for row in rows])
            row[key] = found and list(found)
        summary.append(row)
    return summary


def value_of(row: dict, key: str) -> float | None:
    """Returns a number of a row, of a metric of tasks the average; `None` where it has none."""
    if key in ("la", "aia"):
        return (row["classification"] or {}).get(key)
    values = row["per_task"].get(key, [row.get(key)])
    return None if None in values else statistics.fmean(values)


def is_again(row: dict, run: dict) -> bool:
    """Returns whether a row is of FunLoRA as the run has it."""
    return row["kind"] == "funlora" and row["learning_rate"] == run["learning_rate"]


def table(summary: list[dict]) -> str:
    """Returns the summary as Markdown: of the metrics of tasks the average over the last row."""
    heads = {"parameters_per_class": "PPC", "la": "LA", "aia": "AIA", "cpu_seconds": "CPU seconds"}
    cells = [[heads.get(key, key.replace("_", " ")) for key in summary[0]]]
    for row in summary:
        cells.append([])
        for key, value in row.items():
            if key == "parameters_per_class":
                value = format_count(value)
            elif isinstance(value, float):
                value = f"{value:g}"
            elif key == "seeds":
                value = ", ".join(map(str, value))
            elif not isinstance(value, str):
                mean, error = value or (None, None)
                value = format_number(mean) if error is None else format_spread(mean, error)
            cells[-1].append(value)
    return to_markdown(cells).rstrip()


def main(argv: list[str] | None = None) -> int:
    """Runs the script and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("run", nargs="?", type=Path, help="the folder of a finished run of --adapter funlora")
    kinds = ("funlora", *KINDS)
    default = [kind for kind in kinds if kind != "lora_attention"]
    parser.add_argument("--kinds", nargs="+", choices=kinds, default=default, help="by default those of convolutions")
    parser.add_argument("--learning_rate", type=float, help="by default that of the run's adapters")
    parser.add_argument("--output", type=Path, help="a JSON file, to which what it lacks is added")
    parser.add_argument("--table", nargs="+", type=Path, help="print the table of such files, a run each")
    args = parser.parse_args(argv)
    if (args.run is None or args.output is None) == (args.table is None):
        parser.error("give a run and --output, or --table and files")
    try:
        if args.table is None:
            learn(args)
        print(table(summarize([read_json(path) for path in args.table or [args.output]])))
    except (RunError, OSError) as error:
        print(f"adapters.py: error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", DataError.exit_code)
    return 0


def learn(args: argparse.Namespace) -> None:
    """Adds the rows of a run that a file lacks."""
    run = open_run(args.run)
    content = read_json(args.output) if args.output.exists() else {"run": run.about, "rows": []}
    if content["run"] != run.about:
        raise ConfigError(f"{args.output} is of another run than {args.run}")
    set_num_threads(run.config)
    precision = "tf32" if run.config.allow_tf32 else "ieee"
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = precision
    accumulation = run.config.gradient_accumulation_steps
    accelerator = Accelerator(gradient_accumulation_steps=accumulation, mixed_precision=run.config.mixed_precision)
    if accelerator.num_processes > 1:
        raise ConfigError(f"it is started in {accelerator.num_processes} processes; allowed: 1")
    learning_rate = args.learning_rate or run.about["learning_rate"]
    own = f" --learning_rate {args.learning_rate:g}" if args.learning_rate else ""
    for kind in args.kinds:
        if (kind, learning_rate) in [(row["kind"], row["learning_rate"]) for row in content["rows"]]:
            continue
        command = f"python scripts/experiments/adapters.py {run.about['name']} --kinds {kind}{own}"
        row = measure(kind, run, learning_rate, accelerator)
        row |= {**about_machine(kind, accelerator, run.about["threads"]), "command": command}
        content["rows"].append(row)
        write_json(args.output, content)
        distance = row["average"][run.about["metric"]]
        print(f"{kind}: {format_number(distance)}, {row['cpu_seconds']:.0f} CPU seconds", flush=True)


if __name__ == "__main__":
    sys.exit(main())
