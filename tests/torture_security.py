"""Hostile files under every name that something loads, in twelve slots: none may run, write elsewhere, or crash a loader."""

import json
import os
import re
import shutil
from pathlib import Path
from unittest import mock

import torch
from hostile_helpers import (
    CPU,
    STATE,
    WEIGHTS,
    bomb,
    brackets,
    code_beside,
    coded_classifier,
    coded_data,
    foreign_classes,
    foreign_names,
    linked,
    pickled,
    pickled_manifest,
    replaced,
    sharded,
    write,
    write_good,
)
from pipeline_helpers import tiny_unet

from diffusers_cl import Rank1EWC
from diffusers_cl.checkpoint import load_checkpoint
from diffusers_cl.config import TrainingConfig
from diffusers_cl.data import load_splits
from diffusers_cl.errors import RunError
from diffusers_cl.features import load_classifier, load_extractor, resolve_feature_extractor
from diffusers_cl.growth import load_weights, restore_penalty
from diffusers_cl.references import References
from diffusers_cl.sampling import load_pipeline
from diffusers_cl.source import open_source
from diffusers_cl.start import copy_start, fetch_task


INCEPTION = "hub/checkpoints/weights-inception-2015-12-05-6726825d.pth"


def load_task(folder: Path) -> None:
    """All by which a run goes on from a task folder."""
    start, unet = fetch_task(str(folder)), tiny_unet()
    copy_start(start, folder.parent / "run", None)
    load_weights(unet, start.folder, [0])
    restore_penalty(Rank1EWC(), start.folder / "consolidation", unet)


def load_plainly(folder: Path) -> None:
    load_pipeline(folder, CPU, "model")


def load_to_adopt(folder: Path) -> None:
    open_source(str(folder))


def load_twice(folder: Path) -> None:
    """As scripts/sample.py and scripts/adopt.py open a pipeline: where one refuses it, the other has to."""
    try:
        load_plainly(folder)
    except RunError:
        load_to_adopt(folder)


def load_judge(folder: Path) -> None:
    load_classifier("eval_classifier", str(folder), ["a"], CPU)


def load_kept(folder: Path) -> None:
    References.load(folder)
    load_extractor(folder, json.loads((folder / "info.json").read_text()), TrainingConfig(), CPU)


def load_whole_checkpoint(folder: Path) -> None:
    unet = tiny_unet()
    load_checkpoint(folder, unet, torch.optim.AdamW(unet.parameters()))


def load_inception(folder: Path) -> None:
    """The file that is named, or else the one that torch.hub keeps."""
    named = folder / "named.pth"
    config = TrainingConfig(feature_extractor_weights_path=str(named) if named.exists() else None)
    with mock.patch.dict(os.environ, {"TORCH_HOME": str(folder)}):
        resolve_feature_extractor(config, None, [], CPU)


def load_data(folder: Path) -> None:
    load_splits(TrainingConfig(dataset_name=str(folder), cache_dir=str(folder.parent / "cache")))


# For every slot: what is good, and then how it is spoilt, what loads it, and a word of the refusal, or `None` where what was
# planted is passed over.
SLOTS = {
    "weights": (
        "task",
        (replaced("unet/diffusion_pytorch_model.bin", pickled, removed=WEIGHTS), load_twice, "safetensors only"),
        (replaced(WEIGHTS, pickled), load_twice, "diffusion_pytorch_model.safetensors is damaged"),
        (replaced(WEIGHTS, pickled), load_task, "diffusion_pytorch_model.safetensors is damaged"),
    ),
    "classifier": (
        "classifier",
        (replaced("pytorch_model.bin", pickled, removed="model.safetensors"), load_judge, "model.safetensors"),
        (replaced("model.safetensors", pickled), load_judge, "model.safetensors is damaged"),
        (sharded("model.safetensors"), load_judge, "beside it"),
    ),
    "penalty": ("task", (replaced("consolidation/ewc.safetensors", pickled), load_task, "ewc.safetensors is damaged")),
    "extractor": (
        "kept",
        (replaced("extractor.safetensors", pickled), load_kept, "extractor.safetensors cannot be read"),
        (replaced("references.safetensors", pickled), load_kept, "references.safetensors cannot be read"),
    ),
    "checkpoint": (
        "checkpoint-1",
        (replaced("optimizer.safetensors", pickled), load_whole_checkpoint, "header"),
        (replaced("model.safetensors", pickled), load_whole_checkpoint, "header"),
        (replaced("state.json", pickled), load_whole_checkpoint, "state.json cannot be read"),
    ),
    "state": (
        "task",
        (replaced(STATE, pickled), load_task, "state.json cannot be read"),
        (pickled_manifest, load_task, "manifest.json cannot be read"),
    ),
    "inception": (
        "kept",
        (replaced("named.pth", pickled), load_inception, "Weights only load failed|Inception"),
        (replaced(INCEPTION, pickled), load_inception, "has sha256"),
    ),
    "code beside": (
        "task",
        (code_beside, load_plainly, None),
        (code_beside, load_to_adopt, "has a evil.Evil; allowed: a UNet2DModel"),
    ),
    "foreign classes": ("task", (foreign_classes, load_plainly, "model_index.json names")),
    "code of others": (
        "classifier",
        (coded_classifier, load_judge, "custom code"),
        (coded_data, load_data, "cannot load the dataset"),
    ),
    "paths": (
        "task",
        (sharded(WEIGHTS), load_twice, "beside it"),
        (foreign_names, load_task, "is no file of a task folder"),
        (linked(WEIGHTS), load_twice, "is a link"),
        (linked("unet/config.json"), load_task, "is a link"),
        (linked(STATE), load_task, "is a link"),
    ),
    "bombs": (
        "task",
        (replaced(WEIGHTS, bomb), load_twice, "diffusion_pytorch_model.safetensors is damaged"),
        (replaced("consolidation/ewc.safetensors", bomb), load_task, "ewc.safetensors is damaged"),
        (replaced("model_index.json", brackets), load_twice, "model_index.json cannot be read"),
        (replaced(STATE, brackets), load_task, "state.json cannot be read"),
    ),
}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def hostile_files(folder: Path, count: int = 12, seed: int = 0) -> dict:
    """
    Plants hostile files and loads them as the scripts do.

    Args:
        folder (`Path`): for all files.
        count (`int`): how many; one in each slot, then again in each with another file.
        seed (`int`): picks the first of the kinds of file.

    Returns:
        `dict`: `tried`, `refused` (with one sentence), `executed`, `written_outside`, and `problems`: what ended otherwise.
    """
    write_good(folder / "good")
    found = {"tried": 0, "refused": 0, "executed": 0, "written_outside": 0, "problems": []}
    for number in range(count):
        turn, slot = number // len(SLOTS), list(SLOTS)[number % len(SLOTS)]
        base, *cases = SLOTS[slot]
        plant, load, word = cases[turn % len(cases)]
        place, canary = folder / f"{number:04d}", folder / f"{number:04d}.canary"
        hostile = place / base
        shutil.copytree(folder / "good" / base, hostile)
        write(place / "outside" / "secret.txt", "secret")
        plant(hostile, canary, seed + turn // len(cases))
        canary.unlink(missing_ok=True)
        before, refusal, outcome = contents(place / "outside"), None, "loaded"
        try:
            load(hostile)
        except RunError as error:
            refusal = outcome = str(error)
        except Exception as error:
            outcome = f"{type(error).__name__}: {error}"
        executed, written = canary.exists(), contents(place / "outside") != before
        found["tried"] += 1
        found["refused"] += refusal is not None
        found["executed"] += executed
        found["written_outside"] += written
        as_it_should = outcome == "loaded" if word is None else refusal and re.search(f"^.*({word})", refusal)
        if not as_it_should or "\n" in outcome or executed or written:
            found["problems"].append(f"{slot}, turn {turn}: {outcome}"[:300])
        shutil.rmtree(place)
    return found
