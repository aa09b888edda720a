"""The model card of a task folder, its README.md: metadata for the Hub and text for a reader."""

import json
import re
import shlex
from dataclasses import asdict
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from . import __version__
from .card_sampling import sampling_lines
from .config import TrainingConfig
from .markup import code_span, plain
from .names import method_name
from .pipeline import ClassConditionalPipeline
from .plots import format_number
from .report import FEW_IMAGES, FISHER_COLUMNS, format_spread, headline_metric, key_table
from .results import effective_config, portable_name


# Classes that a card names.
MAX_NAMED_CLASSES = 50
TASK = "unconditional-image-generation"
TAGS = ["diffusers-cl", "continual-learning", "class-conditional"]
STREAMS = {
    "sequential": "It learned them in the order below; no task had the data of those before it",
    "joint": "It learned them all at once, from the data of all tasks",
    "cumulative": "It learned them in the order below; every task had the data of those before it too",
}
# What the card says of the configuration, as far as the run read it.
HYPER_PARAMETERS = """
    stream replay replay_weighting distillation_weight replay_images_per_class replay_num_inference_steps replay_refresh
    memory_images_per_class memory_bytes penalty penalty_mode ewc_lambda fisher_rank fisher_samples fisher_timesteps
    num_train_epochs max_train_steps train_batch_size gradient_accumulation_steps learning_rate lr_scheduler
    lr_warmup_steps max_grad_norm mixed_precision use_ema ema_inv_gamma ema_power ema_max_decay objective prediction_type
    adapter adapter_layers adapter_ratio adapter_learning_rate funlora_function funlora_terms funlora_learn_terms
    train_class_embedding seed
""".split()


def is_hub_id(name: str | None) -> bool:
    """Returns whether this is what a repo or data set on the Hub is called (`user/name`), and no file or folder here."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return name is not None and "/" in name and not Path(name).exists()


def count(number: int, noun: str) -> str:
    """Returns a number of things."""
    return f"{number} {noun}{'' if number == 1 else 'es' if noun.endswith('s') else 's'}"


def _metadata(
    dataset: str, name: str, state: dict, metrics: dict, config: TrainingConfig, repo_id: str | None
) -> ModelCardData:
    """`metrics` and the names of its data set and distance are [`plain`]."""
    on_hub = is_hub_id(config.dataset_name)
    previous = (state["lineage"]["previous"] or {}).get("model")
    values = {
        (name, f"{name}, average over the tasks"): metrics["metrics"][name]["average"][-1],
        (name, f"{name}, forgetting"): metrics["metrics"][name]["forgetting"],
    }
    if "accuracy" in metrics["metrics"]:
        values["accuracy", "accuracy, average over the tasks"] = metrics["metrics"]["accuracy"]["average"][-1]
    results = [
        EvalResult(
            task_type=TASK,
            # The Hub takes what a data set's id may look like and nothing else.
            dataset_type=config.dataset_name if on_hub else re.sub(r"[^A-Za-z0-9_.-]+", "-", dataset),
            dataset_name=dataset,
            dataset_config=plain(config.dataset_config_name),
            dataset_split=plain(config.eval_split),
            metric_type=kind,
            metric_name=title,
            metric_value=value,
        )
        for (kind, title), value in values.items()
        if value is not None
    ]
    return ModelCardData(
        license=plain(config.license),
        library_name="diffusers",
        pipeline_tag=TASK,
        tags=TAGS,
        datasets=[config.dataset_name] if on_hub else None,
        base_model=previous if is_hub_id(previous) else None,
        model_name=plain((repo_id or f"{dataset}-task-{state['task']:02d}").rpartition("/")[2]) if results else None,
        eval_results=results or None,
    )


def _class_lines(pipeline: ClassConditionalPipeline, learned: list[list[str]]) -> list[str]:
    class_ids = {name: class_id for class_id, name in pipeline.known_classes.items()}
    lines, num_left = [], MAX_NAMED_CLASSES
    for task, names in enumerate(learned):
        shown = [f"{code_span(name)} ({class_ids[name]})" for name in names[:num_left]]
        if len(names) > num_left:
            shown.append(f"{len(names) - num_left} more" if shown else count(len(names), "class"))
        num_left = max(num_left - len(names), 0)
        lines.append(f"- task-{task:02d}: {', '.join(shown)}")
    return lines


def _matrix_lines(name: str, metrics: dict, num_tasks: int) -> list[str]:
    """The task matrix, a row a model and a column a task, with the floor and what was forgotten."""
    matrix, averages = metrics["metrics"][name]["matrix"], metrics["metrics"][name]["average"]
    floor, forgetting = metrics["floor"].get(name), metrics["metrics"][name]["forgetting"]

    def row(title: str, values: list[str], average: str) -> str:
        return f"| {' | '.join([title, *values, *[''] * (num_tasks - len(values)), average])} |"

    lines = [
        row("model", [f"task-{task:02d}" for task in range(num_tasks)], "average"),
        "|---" * (num_tasks + 2) + "|",
    ]
    for values, average in zip(matrix, averages, strict=True):
        title = "all tasks at once" if len(matrix[0]) > 1 else f"after task-{len(values) - 1:02d}"
        lines.append(row(title, list(map(format_number, values)), format_number(average)))
    if len(matrix) > 1:
        changes = []
        for task, now in enumerate(matrix[-1]):
            then = next(values[task] for values in matrix if len(values) > task)
            changes.append(None if now is None or then is None else now - then)
        scale = averages[-1]
        shown = [format_number(change, True, scale=scale) for change in changes]
        lines.append(row("**forgetting**", shown, f"**{format_number(forgetting, True, scale=scale)}**"))
    if floor is not None:
        known = list(map(format_number, floor["per_task"][:num_tasks]))
        lines.append(row("floor (real against real)", known, format_spread(floor["mean"], floor["std"])))
    return lines


def _method_lines(config: dict) -> list[str]:
    read = effective_config(config)
    values = {key: plain(read[key]) for key in HYPER_PARAMETERS if read.get(key) is not None}
    return [
        f"**{plain(method_name(config))}**, by diffusers-cl {__version__}. The configuration in full is in "
        "`consolidation/state.json`.",
        "",
        "| setting | value |",
        "|---|---|",
        *[f"| {key} | {value if isinstance(value, str) else json.dumps(value)} |" for key, value in values.items()],
    ]


def _fisher_lines(fisher: list[dict | None] | None) -> list[str]:
    lines = []
    for task, values in enumerate(fisher or []):
        parts = []
        for key, title in FISHER_COLUMNS.items():
            value = (values or {}).get(key)
            # A penalty with several directions a task has a list.
            each = [one for one in (value if isinstance(value, list) else [value]) if one is not None]
            if each:
                shown = ", ".join(f"{one:.0f}" if key == "num_samples" else format_number(one) for one in each)
                parts.append(f"{title} {shown}")
        if parts:
            lines.append(f"- task-{task:02d}: {'; '.join(parts)}")
    note = (
        "Of the empirical Fisher that the penalty of each task is made of. Signal ratio: about 1 / ratio of the squared mean "
        "gradient is sampling noise. Second moment: of the gradients along their mean's direction; its share of the trace "
        "would be 1 for a Fisher of rank 1. Measured curvature: of the task's loss in that direction."
    )
    return ["## Fisher diagnostics", "", note, "", *lines, ""] if lines else []


def _forgetting_line(name: str, metrics: dict) -> str:
    values, floor = metrics["metrics"][name], metrics["floor"].get(name)
    change, now = values["forgetting"], values["average"][-1]
    shown = f"{name} of its tasks {format_number(change, True, scale=now)} on average since each was learned"
    if len(values["matrix"]) == 1:
        return "Forgetting: with one phase of training there is nothing to forget yet."
    if change is None:
        return "Forgetting: not known."
    if floor is not None and abs(change) <= floor["std"]:
        return f"Forgetting: none is shown ({shown}, within the floor's spread)."
    return f"Forgetting: {'it has forgotten' if change > 0 else 'old tasks gained'} ({shown})."


def _limit_lines(name: str, state: dict, metrics: dict, config: TrainingConfig, num_tasks: int) -> list[str]:
    num_images, num_later = min(metrics["num_images"][-1]), len(state["tasks"]) - num_tasks
    few = f", which is few: below {FEW_IMAGES} they say little" if num_images < FEW_IMAGES else ""
    later = f", nor the classes of the {count(num_later, 'task')} still to come in its stream" if num_later else ""
    lines = [
        f"It draws no other classes than those above{later}; it knows no text and no guidance, and one size of image.",
        _forgetting_line(name, metrics),
        f"Every number is of one run (seed {config.seed}) and of {num_images} images in the smallest task{few}.",
        "It was trained to reproduce its data, with what bias and private content that has, and may come close to single "
        "images of it.",
    ]
    if state.get("references", "data") != "data":
        also = metrics["feature_extractor_info"].get("trained_on", "data") != "data"
        lines.append(
            f"task-00 was adopted without its data: it is measured against its own samples{', by a classifier trained on such' * also}"
            ", and not against real images. Its column says how far a model is from what was adopted."
        )
    recall = metrics["metrics"]["recall"]["matrix"][-1] if "recall" in metrics["metrics"] else []
    if kept := [f"task-{task:02d}" for task, value in enumerate(recall) if value is None]:
        lines.append(
            f"The real images of {', '.join(kept)} were not there: {name} of those columns is measured against the "
            "statistics of their features that came with the model gone on from, and what needs the images is n/a."
        )
    if config.replay == "memory":
        lines.append("`consolidation/memory.safetensors` holds real training images.")
    return [f"- {line}" for line in lines]


def model_card(
    pipeline: ClassConditionalPipeline,
    state: dict,
    metrics: dict,
    config: TrainingConfig,
    repo_id: str | None = None,
) -> str:
    """
    Returns the README.md of a task folder: what the model draws, how to sample it and go on from it, how it was made and
    measured, and what it does not do.

    Names of classes, data sets and settings may come from someone else's repo: whatever is in them, they stay text.

    Args:
        pipeline ([`ClassConditionalPipeline`]): the model, with the classes that it has seen.
        state (`dict`): of `consolidation/state.json`: task, tasks, fisher, lineage, dataset.
        metrics (`dict`): the content of `metrics.json` so far; `None` where something could not be measured.
        config ([`TrainingConfig`]).
        repo_id (`str`, *optional*): the Hub repo that the folder is pushed to; by default it is not.
    """
    dataset = plain(state["dataset"])
    measured = plain({**metrics, "feature_extractor": portable_name(metrics["feature_extractor"])})
    measured["config"] |= {"dataset_name": dataset, "train_data_dir": None}
    name = headline_metric(measured)
    learned = state["tasks"][: len(measured["num_images"][-1])]
    num_classes = count(len(pipeline.known_classes), "class")

    num_parameters = format_number(sum(parameter.numel() for parameter in pipeline.unet.parameters()) / 1e6)
    colours = {1: "greyscale", 3: "RGB"}.get(pipeline.unet.config.in_channels, "latent")
    size = f"{config.resolution}x{config.resolution} {colours}"
    how = STREAMS[config.stream] if len(learned) > 1 else "It learned them in one task"
    if pipeline.adapters is not None:
        num_own, first = pipeline.adapters.parameters_per_class, len(pipeline.adapters.config.first_class_ids)
        how += (
            f". The network was frozen after its first {count(first, 'class')}; every later one has {num_own:,} parameters of its"
            " own (FunLoRA, arXiv 2510.02631), in `adapters/`"
        )
    if config.replay == "memory":
        how += ", but for a few real images of every class that are kept"
    if previous := state["lineage"]["previous"]:
        revision = f" (revision {code_span(previous['revision'])})" if previous["revision"] else ""
        how += f". It {'goes on' if state['task'] else 'was adopted'} from {code_span(portable_name(previous['model']))}{revision}"
    data = _metadata(dataset, name, state, measured, config, repo_id)
    command = f"--pretrained_model_name_or_path {shlex.quote(repo_id or 'path/to/this/folder')}"
    lines = [
        *["---", data.to_yaml(), "---", ""],
        *[f"# {dataset}: {num_classes} in {count(len(learned), 'task')}", ""],
        f"A class-conditional {config.objective.replace('_', '-')} model (`{type(pipeline.unet).__name__}`, {num_parameters} M parameters, {size} images)"
        f" of {num_classes}. {how}.",
        *["", "![Samples, a row a class in the order in which they were learned](samples.png)", ""],
        *["Classes, with their ids:", "", *_class_lines(pipeline, learned), ""],
        *["## Sampling", "", *sampling_lines(pipeline, config, repo_id)],
        *["## Teaching it new classes", ""],
        "With diffusers-cl, from a folder of images with one sub-folder a class; the data of the classes above is not needed:",
        *["", "```bash"],
        f"accelerate launch train_continual.py {command} --train_data_dir my_new_classes/",
        *["```", ""],
        *["## Results", ""],
        f"{name} (lower is better) of the images of every task, after every task:",
        *["", *_matrix_lines(name, measured, len(learned)), "", *key_table(measured), ""],
        *["## Method", "", *_method_lines(asdict(config)), ""],
        *_fisher_lines(state["fisher"]),
        *["## Limits", "", *_limit_lines(name, state, measured, config, len(learned))],
    ]
    return "\n".join(lines) + "\n"
