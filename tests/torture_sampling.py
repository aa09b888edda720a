"""Sampling that is killed again and again, on a disk that damages what it keeps, goes on to the same images."""

import copy
import random
import shutil
import threading
from pathlib import Path

import torch
from diffusers import DDIMScheduler
from pipeline_helpers import tiny_unet
from process_helpers import in_processes

from diffusers_cl.pipeline import ClassConditionalPipeline
from diffusers_cl.sampling import sample_images


NUM_STEPS = 2
BATCH_SIZE = 3
# Four shards, the last one of two images.
LABELS = [0, 3, 1, 1, 2, 0, 3, 2, 2, 1, 0]
KEYS = [("eval", label, index) for index, label in enumerate(LABELS)]
NUM_SHARDS = 4


class KilledError(Exception):
    """Stands for SIGKILL."""


def fixed_unet(seed: int = 0) -> torch.nn.Module:
    """Returns a tiny network, a function of the seed, and leaves the global random state alone."""
    with torch.random.fork_rng(devices=[]):
        unet = tiny_unet()
    torch.nn.init.normal_(unet.conv_out.weight, 0, 0.1, torch.Generator().manual_seed(seed))
    return unet


def sample_in(num_processes: int, kill_after: int | None = None, unet_seed: int = 0, **settings) -> tuple[list, int]:
    """
    Returns the images of every process, and how many shards were sampled by all of them.

    Args:
        num_processes (`int`).
        kill_after (`int`, *optional*): so many forward passes over all processes until a `KilledError`.
        unet_seed (`int`): of the weights.
        settings: other arguments of [`sample_images`].
    """
    original, forwards, lock = fixed_unet(unet_seed), [], threading.Lock()

    def count(*_):
        with lock:
            if len(forwards) == kill_after:
                raise KilledError
            forwards.append(None)

    def work(rank: int, gather) -> torch.Tensor:
        unet = copy.deepcopy(original)
        unet.register_forward_pre_hook(count)
        sharing = {"process_index": rank, "num_processes": num_processes, "gather": gather}
        arguments = {"seed": 0, "num_inference_steps": NUM_STEPS, "batch_size": BATCH_SIZE, **settings}
        pipeline = ClassConditionalPipeline(unet, DDIMScheduler())
        return sample_images(pipeline, LABELS, KEYS, **arguments, **sharing, disable_progress_bar=True)

    images = in_processes(num_processes, work)
    return images, len(forwards) // NUM_STEPS


def damage(folder: Path, draws: random.Random) -> str:
    """Damages what is kept in one way, and returns which."""
    parts = sorted(folder.glob("*.safetensors"))
    kind = draws.choice(["nothing", "truncate", "flip", "empty", "delete", "swap", "inputs", "leftover"])
    if not parts or kind == "nothing" or (kind == "swap" and len(parts) < 2):
        return "nothing"
    part = draws.choice(parts)
    content = bytearray(part.read_bytes())
    if kind == "truncate":
        part.write_bytes(content[: draws.randrange(len(content))])
    elif kind == "flip":
        content[draws.randrange(len(content))] ^= 1 << draws.randrange(8)
        part.write_bytes(content)
    elif kind == "empty":
        part.write_bytes(b"")
    elif kind == "delete":
        part.unlink()
    elif kind == "swap":
        other = draws.choice([p for p in parts if p != part])
        part.write_bytes(other.read_bytes())
        other.write_bytes(content)
    elif kind == "inputs":
        (folder / "inputs.json").write_text("{")
    else:
        (folder / f".{part.name}.partial").write_bytes(content[: len(content) // 2])
    return kind


def interrupted_sampling(folder: Path, count: int, seed: int = 0) -> dict:
    """
    Samples `count` times, each with up to three kills, another number of processes after each and damage in between.

    Returns:
        `dict`: how often it was `tried`, `killed` and `damaged` in all; how often images were `equal` to those of an
        undisturbed run on every process, and no intact shard was sampled again (`only_missing`); what was `missed`.
    """
    draws = random.Random(seed)
    (expected,), _ = sample_in(1, folder=folder / "whole")
    whole = {part.name: part.read_bytes() for part in (folder / "whole").glob("*.safetensors")}
    result = {"tried": 0, "killed": 0, "damaged": 0, "equal": 0, "only_missing": 0, "missed": []}
    for trial in range(count):
        where, story = folder / f"trial-{trial}", []
        for _ in range(draws.randrange(1, 4)):
            num_processes, kill_after = draws.randrange(1, 4), draws.randrange(NUM_STEPS * NUM_SHARDS)
            try:
                sample_in(num_processes, kill_after, folder=where)
            except KilledError:
                result["killed"] += 1
            story.append([num_processes, kill_after, damage(where, draws)])
            result["damaged"] += story[-1][-1] not in ("nothing", "leftover")
        intact = sum(part.read_bytes() == whole[part.name] for part in where.glob("*.safetensors"))
        images, sampled = sample_in(num_processes := draws.randrange(1, 4), folder=where)
        is_equal = all(torch.equal(found, expected) for found in images)
        is_least = sampled == NUM_SHARDS - intact
        result["tried"] += 1
        result["equal"] += is_equal
        result["only_missing"] += is_least
        if not (is_equal and is_least):
            result["missed"].append({"trial": trial, "story": story, "processes": num_processes})
        shutil.rmtree(where)
    return result
