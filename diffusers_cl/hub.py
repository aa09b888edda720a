"""Task folders as they are written: a complete diffusers model repo for every finished task, and what going on needs."""

import json
from dataclasses import asdict
from pathlib import Path

import PIL.Image
import torch
from safetensors.torch import save_file

from . import __version__
from .card import model_card
from .config import OPERATIONAL_KEYS, TrainingConfig
from .evaluation import Evaluation
from .features import save_extractor
from .files import publish_folder
from .folders import CONSOLIDATION, MEMORY_NAME, SCHEMA, STATE_NAME, task_folder
from .pipeline import ClassConditionalPipeline
from .results import portable_config


def public_config(config: TrainingConfig) -> dict:
    """Returns what a model's repo says of its configuration: no secrets, and of this machine only where the extractor lies."""
    public = {key: value for key, value in asdict(config).items() if key not in OPERATIONAL_KEYS}
    return portable_config(public) | {"feature_extractor": config.feature_extractor}


def write_task_folder(
    output_dir: str | Path,
    pipeline: ClassConditionalPipeline,
    penalty,
    memory: dict[str, torch.Tensor] | None,
    evaluation: Evaluation,
    state: dict,
    samples: PIL.Image.Image,
    config: TrainingConfig,
    metrics: dict,
    repo_id: str | None = None,
) -> Path:
    """
    Publishes the folder of a finished task: what is pushed to the Hub, and where a run goes on from.

    Args:
        output_dir (`Path`).
        pipeline ([`ClassConditionalPipeline`]): the model, with the classes that it has seen.
        penalty: with `save_pretrained`, or `None`.
        memory: the real images that are kept, or `None` ([`extend_memory`]).
        evaluation ([`Evaluation`]): its extractor and references go with the model.
        state (`dict`): JSON for `consolidation/state.json`: task, tasks, class_ids, seen_classes, rows, floor, lineage.
        samples (`PIL.Image.Image`): the sample grid.
        config ([`TrainingConfig`]).
        metrics (`dict`): as in metrics.json, for the card.
        repo_id (`str`, *optional*): where the folder is going to be pushed.
    """

    def write(folder: Path) -> None:
        kept = folder / CONSOLIDATION
        pipeline.save_pretrained(folder)
        samples.save(folder / "samples.png")
        kept.mkdir()
        if penalty is not None:
            penalty.save_pretrained(kept)
        if memory is not None:
            save_file(memory, kept / MEMORY_NAME)
        save_extractor(evaluation.extractor, kept)
        evaluation.references.first(state["task"] + 1 if config.stream != "joint" else len(state["tasks"])).save(kept)
        content = {
            "schema": SCHEMA,
            "version": __version__,
            **state,
            "loss": "mean over channels and pixels of a row, then mean over rows; new and replayed rows apart",
            "config": public_config(config),
        }
        (kept / STATE_NAME).write_text(json.dumps(content, indent=1) + "\n")
        (folder / "README.md").write_text(model_card(pipeline, content, metrics, config, repo_id), encoding="utf-8")

    path = task_folder(output_dir, state["task"])
    publish_folder(path, write, CONSOLIDATION)
    return path
