"""Stateless randomness: every draw of a run is a function of the seed and of what it is for."""

import hashlib
from collections.abc import Sequence

import torch


def derive_seed(seed: int, *purpose: int | str) -> int:
    """
    Returns the seed of one draw, a function of the run's seed and of the draw's purpose alone.

    There is no generator state to save: a run that continues draws what it would have drawn, and what evaluation
    draws cannot move training.

    Args:
        seed (`int`): the run's seed.
        purpose (`int` or `str`): what is drawn, for example `"train", task, step, micro_step, rank`.

    Returns:
        `int` in [0, 2**63): for `torch.manual_seed` or a `torch.Generator`.
    """
    # The type is part of the key: class 7 and a class named "7" are different draws.
    key = "\x1f".join(f"{type(part).__name__}:{part}" for part in (seed, *purpose))
    return int.from_bytes(hashlib.sha256(key.encode()).digest()[:8], "little") >> 1


def generator(seed: int, *purpose: int | str) -> torch.Generator:
    """Returns a CPU generator seeded with `derive_seed(seed, *purpose)`: the same numbers on every device."""
    return torch.Generator().manual_seed(derive_seed(seed, *purpose))


def permutation(length: int, seed: int, *purpose: int | str) -> torch.Tensor:
    """Returns a random order of `range(length)` (`torch.int64`) for this seed and purpose."""
    return torch.randperm(length, generator=generator(seed, *purpose))


def starting_noise(keys: Sequence[tuple[int | str, ...]], shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """
    Returns standard normal noise of shape `(len(keys), *shape)`, row `i` a function of `(seed, keys[i])` alone, so
    that an image does not depend on the batch or the process that it is sampled in.
    """
    return torch.stack([torch.randn(shape, generator=generator(seed, *key)) for key in keys])
