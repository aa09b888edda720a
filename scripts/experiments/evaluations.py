"""
Quality against the number of network evaluations an image takes: flows with Euler's and Heun's method, diffusion with DDIM.

    python scripts/experiments/evaluations.py runs/flow runs/diffusion --output results/flow_matching/digits.json

Every model is a task folder (of a run's folder, the last one) and is measured as its run measured it: with the extractor in
the folder, the same real images and the same noise for every image; only sampling differs. DDIM is there twice: with the
timesteps that the model is saved with, and with `timestep_spacing: trailing`, which starts from the noisiest one (arXiv
2305.08891, Table 2). diffusers has no RK4 for flows. Several models of an objective are several seeds.
"""

import argparse
import dataclasses
import statistics
import sys
from functools import partial
from pathlib import Path

import torch
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler

from diffusers_cl.config import TrainingConfig
from diffusers_cl.data import load_splits
from diffusers_cl.errors import DataError, RunError
from diffusers_cl.evaluation import Evaluation
from diffusers_cl.files import write_json
from diffusers_cl.folders import tasks_of_run
from diffusers_cl.gate import open_measure, open_model
from diffusers_cl.metrics import distance_names
from diffusers_cl.pipeline import ClassConditionalPipeline
from diffusers_cl.plots import format_number
from diffusers_cl.record import versions
from diffusers_cl.report import format_spread
from diffusers_cl.results import effective_config, mean_and_error, portable_config
from diffusers_cl.sampling import sample_images


EVALUATIONS = (1, 2, 3, 4, 5, 6, 10, 20, 50)
COLUMNS = {
    ("flow_matching", "Euler"): "flow, Euler",
    ("flow_matching", "Heun"): "flow, Heun",
    ("diffusion", "DDIM"): "diffusion, DDIM",
    ("diffusion", "DDIM trailing"): "diffusion, DDIM trailing",
}


def schedulers(own, evaluations: list[int]) -> dict[str, tuple]:
    """Returns schedulers for a model that is saved with `own`, by name, and the steps that each takes for these evaluations."""
    if isinstance(own, FlowMatchEulerDiscreteScheduler):
        heun = FlowMatchHeunDiscreteScheduler(own.config.num_train_timesteps, own.config.shift)
        # Every step but the last is two evaluations: the most steps that are no more than what is asked for.
        halves = dict.fromkeys((asked + 1) // 2 for asked in evaluations)
        return {"Euler": (own, evaluations), "Heun": (heun, list(halves))}
    trailing = DDIMScheduler.from_config(own.config, timestep_spacing="trailing")
    return {"DDIM": (own, evaluations), "DDIM trailing": (trailing, evaluations)}


def row_of(pipeline: ClassConditionalPipeline, evaluation: Evaluation, config: TrainingConfig, steps: int) -> dict:
    """Returns the measures of the images of so many steps, on average over the tasks and for each."""
    rows = []
    hook = pipeline.unet.register_forward_pre_hook(lambda module, arguments: rows.append(len(arguments[0])))
    options = {"seed": config.seed, "num_inference_steps": steps, "batch_size": config.eval_batch_size}
    found, _ = evaluation(partial(sample_images, pipeline, **options), len(evaluation.tasks))
    hook.remove()
    metrics = {name: values for name, values in found["metrics"].items() if None not in values}
    average = {name: statistics.fmean(values) for name, values in metrics.items()}
    counted = {
        "steps": steps,
        "evaluations": sum(rows) // sum(found["num_images"]),
        "images": sum(found["num_images"]),
    }
    return {**counted, "average": average, "per_task": metrics}


def measure(folder: Path, evaluations: list[int], data: str | None = None) -> tuple[dict, list[dict]]:
    """
    Returns what a model is, and its rows: one for every scheduler and number of evaluations.

    Args:
        folder (`Path`): a task's, or a run's.
        evaluations (list of `int`): of the network, an image.
        data (`str`, *optional*): `dataset_name`; by default the run's.

    Raises:
        ConfigError, CheckpointError, DataError: for a model, an extractor or data that cannot be had.
    """
    folder, device = (tasks_of_run(folder) or [folder])[-1], torch.device("cpu")
    model = open_model(str(folder), None, device)
    state, pipeline = model.start.state, model.pipeline
    known = {field.name for field in dataclasses.fields(TrainingConfig)}
    config = TrainingConfig(**{key: value for key, value in state["config"].items() if key in known})
    config = dataclasses.replace(config, generated_classifier_images=None)
    _, extractor = open_measure(model, config, device)
    if data is not None:
        config = dataclasses.replace(config, dataset_name=data, train_data_dir=None)
    _, test = load_splits(config, pipeline.unet.config.in_channels)
    evaluation = Evaluation(test, model.start.tasks, model.class_ids, extractor, config)
    metric = distance_names(extractor.name)[0]
    about = {
        "objective": config.objective,
        "seed": config.seed,
        "tasks": model.start.tasks,
        "metric": metric,
        "as the run measured it": statistics.fmean(state["rows"][-1]["metrics"][metric]),
        "floor": evaluation.floor[metric],
        "config": effective_config(portable_config(state["config"])),
    }
    rows = []
    for name, (scheduler, numbers) in schedulers(pipeline.scheduler, evaluations).items():
        pipeline.scheduler = scheduler
        for steps in numbers:
            row = row_of(pipeline, evaluation, config, steps)
            rows.append({"objective": config.objective, "seed": config.seed, "scheduler": name, **row})
            print(f"{folder}: {name}, {row['evaluations']} evaluation(s): {format_number(row['average'][metric])}")
    return about, rows


def summarize(rows: list[dict], metric: str) -> list[dict]:
    """Returns mean and standard error over seeds for every objective, scheduler and number of evaluations."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["objective"], row["scheduler"], row["evaluations"]), []).append(row)

    def over_seeds(group: list[dict], name: str) -> list[float | None]:
        return list(mean_and_error([row["average"][name] for row in group]))

    return [
        {
            **dict(zip(("objective", "scheduler", "evaluations"), key, strict=True)),
            "seeds": [row["seed"] for row in group],
            "distance": over_seeds(group, metric),
            **{name: over_seeds(group, name) for name in ("recall", "accuracy") if name in group[0]["average"]},
        }
        for key, group in groups.items()
    ]


def table(summary: list[dict]) -> str:
    """Returns the summary as Markdown, a row for every number of evaluations: the distance, and recall in brackets."""
    keys = [(row["objective"], row["scheduler"]) for row in summary]
    columns = {key: head for key, head in COLUMNS.items() if key in keys}
    lines = [f"| evaluations | {' | '.join(columns.values())} |", "| --- |" + " --- |" * len(columns)]
    for evaluations in sorted({row["evaluations"] for row in summary}):
        cells = dict.fromkeys(columns, "")
        for key, row in zip(keys, summary, strict=True):
            if row["evaluations"] == evaluations:
                mean, error = row["distance"]
                cells[key] = format_number(mean) if error is None else format_spread(mean, error)
                cells[key] += f" ({row['recall'][0]:.2f})" if "recall" in row else ""
        lines.append(f"| {' | '.join([str(evaluations), *cells.values()])} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs the script and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path, help="task folders, or run folders, whose last task is taken")
    parser.add_argument(
        "--evaluations", nargs="+", type=int, default=list(EVALUATIONS), help="of the network, an image"
    )
    parser.add_argument("--data", help="dataset_name of the real images, by default the run's")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    names = " ".join(folder.resolve().name for folder in args.models)
    content = {"made_by": f"python scripts/experiments/evaluations.py {names}", "evaluations": args.evaluations}
    content |= {"device": "cpu", "threads": 1, "versions": versions(), "models": [], "rows": []}
    try:
        for folder in args.models:
            about, rows = measure(folder, args.evaluations, args.data)
            content["models"].append(about)
            content["rows"] += rows
        content["summary"] = summarize(content["rows"], content["models"][0]["metric"])
        write_json(args.output, content)
    except (RunError, OSError) as error:
        print(f"evaluations.py: error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", DataError.exit_code)
    print(table(content["summary"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
