"""What the parts of an analysis share: what is asked for, and how a part is kept once it is done."""

import json
from collections.abc import Callable
from dataclasses import dataclass

import torch

from .losses import denoising_losses
from .shards import Shards


PARTS = ("timesteps", "surrogate", "bands", "movement", "gauss_newton")


@dataclass
class Options:
    """
    What is asked for.

    Attributes:
        num_samples (`int`): N, per-sample gradients a timestep.
        timesteps (`list[int]`).
        memory_gib (`float`): for the gradients at a time.
        batch_size (`int`): rows of everything else.
        parts (`list[str]`): of `PARTS`.
        disable_progress_bar (`bool`).
    """

    num_samples: int
    timesteps: list[int]
    memory_gib: float = 4.0
    batch_size: int = 128
    parts: tuple[str, ...] = PARTS
    disable_progress_bar: bool = False


def losses(model, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The denoising loss of every row of `(noisy_images, timesteps, class_labels, target)`."""
    return denoising_losses(model, *batch)


def kept(shards: Shards, name: str, compute: Callable[[], tuple[dict, dict]]) -> dict:
    """Returns a part's JSON, computed with its tensors where it is not there yet."""
    found = shards.load(name)
    if found is None:
        content, tensors = compute()
        text = torch.frombuffer(bytearray(json.dumps(content).encode()), dtype=torch.uint8)
        shards.save(name, {**tensors, "json": text})
        return content
    return json.loads(bytes(found["json"].numpy()))


def flat(tensors: dict[str, torch.Tensor]) -> torch.Tensor:
    """Returns tensors by parameter name as one vector, on the CPU."""
    return torch.cat([tensor.flatten() for tensor in tensors.values()]).cpu()
