"""
Quality against the number of network evaluations an image takes: flows with Euler's and Heun's method, diffusion with DDIM.

    python scripts/experiments/evaluations.py runs/flow/task-04 runs/diffusion/task-04 --output results/flow_matching/digits.json

Every model is a task folder (of a run's folder, the last one) and is measured as its run measured it: the extractor, the real
images' statistics and the noise of every image are those in the folder, only sampling differs. DDIM is there twice: with the
timesteps that the model is saved with, and with `timestep_spacing: trailing`, which starts from the noisiest one (arXiv
2305.08891, Sec. 3.4). diffusers has no RK4 for flows. Several models of an objective are several seeds.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from diffusers import DDIMScheduler, FlowMatchHeunDiscreteScheduler

from diffusers_cl.config import TrainingConfig
from diffusers_cl.errors import CheckpointError, RunError
from diffusers_cl.features import FeatureExtractor
from diffusers_cl.files import write_json
from diffusers_cl.folders import tasks_of_run
from diffusers_cl.gate import Model, open_measure, open_model
from diffusers_cl.metrics import accuracy, distance_names, frechet_distance
from diffusers_cl.plots import format_number
from diffusers_cl.record import versions
from diffusers_cl.references import References
from diffusers_cl.results import effective_config, portable_config
from diffusers_cl.sampling import sample_images


EVALUATIONS = (1, 2, 3, 4, 5, 6, 10, 20, 50)
COLUMNS = {
    ("flow_matching", "Euler"): "flow, Euler",
    ("flow_matching", "Heun"): "flow, Heun",
    ("diffusion", "DDIM"): "diffusion, DDIM",
    ("diffusion", "DDIM trailing"): "diffusion, DDIM trailing",
}


@dataclass
class Measured:
    """A model with what its images are measured by."""

    model: Model
    references: References
    extractor: FeatureExtractor

    @property
    def config(self) -> dict:
        return self.model.start.state["config"]

    @property
    def objective(self) -> str:
        return self.config["objective"]

    def schedulers(self) -> dict:
        """Returns the schedulers that the model is sampled with, and the steps that each takes for so many evaluations."""
        own = self.model.pipeline.scheduler
        if self.objective == "flow_matching":
            heun = FlowMatchHeunDiscreteScheduler(own.config.num_train_timesteps, own.config.shift)
            # Every step but the last is two evaluations: the most steps that are not more than asked for.
            return {"Euler": (own, lambda evaluations: evaluations), "Heun": (heun, lambda asked: (asked + 1) // 2)}
        trailing = DDIMScheduler.from_config(own.config, timestep_spacing="trailing")
        return {name: (kind, lambda asked: asked) for name, kind in {"DDIM": own, "DDIM trailing": trailing}.items()}

    def row(self, steps: int) -> dict:
        """Returns how far the images of so many steps are from the real ones, task by task, and what they are recognised as."""
        labels = [[name for name, count in task.items() for _ in range(count)] for task in self.references.labels]
        counts: dict[str, int] = {}
        keys = []
        for name in (name for task in labels for name in task):
            keys.append(("eval", name, counts.setdefault(name, 0)))
            counts[name] += 1
        rows_seen = 0

        def count(module, arguments) -> None:
            nonlocal rows_seen
            rows_seen += len(arguments[0])

        hook = self.model.pipeline.unet.register_forward_pre_hook(count)
        class_ids = [self.model.class_ids[name] for _, name, _ in keys]
        batch_size = self.config["eval_batch_size"]
        images = sample_images(self.model.pipeline, class_ids, keys, self.config["seed"], steps, batch_size)
        hook.remove()
        features, predictions = self.extractor(images)
        sizes = [len(task) for task in labels]
        pairs = enumerate(features.split(sizes))
        per_task = [frechet_distance(part, self.references.of_task(task)) for task, part in pairs]
        known = predictions is not None and counts.keys() <= set(self.extractor.known_classes)
        found = accuracy(predictions, [name for _, name, _ in keys]) if known else None
        seen = {"steps": steps, "evaluations": rows_seen // len(images), "images": len(images)}
        return {**seen, "average": statistics.fmean(per_task), "per_task": per_task, "accuracy": found}


def measure(folder: Path, evaluations: tuple[int, ...], device: torch.device) -> tuple[dict, list[dict]]:
    """
    Returns what a model is, and its rows: one for every scheduler and number of evaluations.

    Raises:
        ConfigError, CheckpointError, DataError: as [`open_model`] and [`open_measure`].
    """
    folder = (tasks_of_run(folder) or [folder])[-1]
    model = open_model(str(folder), None, device)
    known = TrainingConfig(feature_extractor=model.start.state["config"]["feature_extractor"])
    measured = Measured(model, *open_measure(model, known, device))
    state, config = model.start.state, effective_config(portable_config(measured.config))
    metric = distance_names(measured.extractor.name)[0]
    about = {
        "objective": measured.objective,
        "seed": config["seed"],
        "task": state["task"],
        "metric": metric,
        # As the run itself measured it.
        "average of the run": statistics.fmean(state["rows"][-1]["metrics"][metric]),
        "floor": state["floor"][metric]["mean"],
        "config": config,
    }
    rows = []
    for scheduler, (kind, steps_for) in measured.schedulers().items():
        model.pipeline.scheduler = kind
        for steps in dict.fromkeys(steps_for(asked) for asked in evaluations):
            row = measured.row(steps)
            rows.append({"objective": measured.objective, "seed": config["seed"], "scheduler": scheduler, **row})
            print(f"{folder}: {scheduler}, {row['evaluations']} evaluation(s): {format_number(row['average'])}")
    return about, rows


def summarize(rows: list[dict]) -> list[dict]:
    """Returns the means over seeds for every objective, scheduler and number of evaluations, in the order of the rows."""
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault((row["objective"], row["scheduler"], row["evaluations"]), []).append(row)
    return [
        {
            **dict(zip(("objective", "scheduler", "evaluations"), key, strict=True)),
            "seeds": len(group),
            "average": statistics.fmean(row["average"] for row in group),
            "range": [f(row["average"] for row in group) for f in (min, max)],
            "accuracy": None if group[0]["accuracy"] is None else statistics.fmean(row["accuracy"] for row in group),
        }
        for key, group in groups.items()
    ]


def table(summary: list[dict]) -> str:
    """Returns the summary as Markdown: a row for every number of evaluations; distance, and what is recognised in brackets."""
    columns = {key: head for key, head in COLUMNS.items() if any(_key(row) == key for row in summary)}
    lines = [f"| evaluations an image | {' | '.join(columns.values())} |", "| --- |" + " --- |" * len(columns)]
    for evaluations in sorted({row["evaluations"] for row in summary}):
        cells = dict.fromkeys(columns, "")
        for row in summary:
            if row["evaluations"] == evaluations:
                recognised = "" if row["accuracy"] is None else f" ({row['accuracy']:.2f})"
                cells[_key(row)] = format_number(row["average"]) + recognised
        lines.append(f"| {' | '.join([str(evaluations), *cells.values()])} |")
    return "\n".join(lines)


def _key(row: dict) -> tuple[str, str]:
    return row["objective"], row["scheduler"]


def main(argv: list[str] | None = None) -> int:
    """Runs the script and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("models", nargs="+", type=Path, help="task folders, or run folders, whose last task is taken")
    parser.add_argument("--evaluations", nargs="+", type=int, default=EVALUATIONS, help="of the network, an image")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    names = " ".join("/".join(folder.resolve().parts[-2:]) for folder in args.models)
    content = {"made_by": f"python scripts/experiments/evaluations.py {names}", "evaluations": list(args.evaluations)}
    content |= {"device": "cpu", "threads": 1, "versions": versions(), "models": [], "rows": []}
    try:
        for folder in args.models:
            about, rows = measure(folder, tuple(args.evaluations), torch.device("cpu"))
            content["models"].append(about)
            content["rows"] += rows
        content["summary"] = summarize(content["rows"])
        write_json(args.output, content)
    except (RunError, OSError) as error:
        print(f"evaluations.py: error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", CheckpointError.exit_code)
    print(table(content["summary"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
