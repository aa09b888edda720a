"""Mean gradients of the three SNR bands and of every task: whether they share a direction, and who carries the second moment."""

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import safe_open

from .fisher import gradient_trace, mean_gradient
from .passes import Losses


# By SNR, of 1000 timesteps: low SNR is high t.
BANDS = {"high_snr": (0, 333), "mid_snr": (333, 667), "low_snr": (667, 1000)}
ALL = "all"
HALVES = 2


def band_statistics(model: torch.nn.Module, losses: Losses, halves: list[Iterable]) -> tuple[dict, dict]:
    """
    Returns what is measured of one task in one band.

    Args:
        model (`torch.nn.Module`): the unwrapped network.
        losses: `losses(model, batch) -> (batch,)`.
        halves (list): two independent sets of re-iterable batches, of equal numbers of draws.

    Returns:
        `dict[str, torch.Tensor]`: the two mean gradients, `(D,)` float32, by `half.0` and `half.1`, and `trace` (`E|g|^2`).
    """
    tensors = {}
    for number, batches in enumerate(halves):
        mean, _, _ = mean_gradient(model, losses, batches)
        tensors[f"half.{number}"] = torch.cat([tensor.flatten() for tensor in mean.values()]).float()
    trace, _ = gradient_trace(model, losses, halves[0], chunk_size=8)
    return {**tensors, "trace": torch.tensor(trace, dtype=torch.float64)}


def gram_of_files(files: list[Path], names: list[str], chunk: int = 2**20) -> torch.Tensor:
    """
    Returns the inner products of vectors that lie in safetensors files, float64, in the order of files and then of names: a
    million numbers of each are read at a time.
    """
    slices = []
    for file in files:
        opened = safe_open(file, framework="pt")
        slices += [opened.get_slice(name) for name in names]
    size = slices[0].get_shape()[0]
    gram = torch.zeros(len(slices), len(slices), dtype=torch.float64)
    for start in range(0, size, chunk):
        part = torch.stack([found[start : min(start + chunk, size)] for found in slices]).double()
        gram += part @ part.T
    return gram


def with_all_timesteps(gram: torch.Tensor, num_tasks: int) -> torch.Tensor:
    """
    Returns the inner products with those of all timesteps added, whose mean gradient is the bands', weighted by their lengths:
    from `(tasks, bands, halves)` to `(tasks, bands and all, halves)` in rows and columns.
    """
    weights = torch.tensor([stop - start for start, stop in BANDS.values()], dtype=torch.float64)
    rows = torch.cat([torch.eye(len(BANDS), dtype=torch.float64), (weights / weights.sum())[None]])
    mixed = torch.kron(
        torch.eye(num_tasks, dtype=torch.float64), torch.kron(rows, torch.eye(HALVES, dtype=torch.float64))
    )
    return mixed @ gram @ mixed.T


def compare_bands(gram: torch.Tensor, traces: torch.Tensor, num_tasks: int, num_samples: int) -> dict:
    """
    Returns the cosines between directions of bands and tasks, as JSON.

    A cosine of two means of finitely many draws is too small, since each has its own noise. The two halves of a task's draws in
    a band share the mean and no noise, so that `<half 0, half 1>` is an unbiased `|mu|^2`: `corrected` divides by these in place
    of the squared lengths. It is left out (`None`) where a direction is nothing but noise, and may exceed 1 by chance.

    Args:
        gram (`torch.Tensor`): inner products in the order `(tasks, bands, halves)`.
        traces (`torch.Tensor` of shape `(tasks, bands)`): `E|g|^2`.
        num_tasks (`int`), num_samples (`int`): draws of a half.

    Returns:
        `dict`: `agreement` (by band, of every task: the cosine between the two halves), `between_tasks` and `between_bands` (of
        all bands: `cosine` and `corrected`, matrices), `trace_share` (of every task, by band: its share of `E|g|^2` over all
        timesteps).
    """
    names, bands = [*BANDS, ALL], len(BANDS) + 1
    full = with_all_timesteps(gram, num_tasks).view(num_tasks, bands, HALVES, num_tasks, bands, HALVES)
    products = full.mean(dim=(2, 5))  # of the means over both halves
    own = torch.einsum("abhabk->abhk", full)
    signal = own[:, :, 0, 1]
    agreement = signal / (own[:, :, 0, 0] * own[:, :, 1, 1]).sqrt()
    lengths = torch.einsum("abab->ab", products).sqrt()

    def matrices(products: torch.Tensor, lengths: torch.Tensor, signal: torch.Tensor) -> dict:
        true = torch.outer(signal, signal).clamp(min=0).sqrt()
        corrected = (products / true).tolist()
        size = range(len(lengths))
        noise = [[signal[i] <= 0 or signal[j] <= 0 for j in size] for i in size]
        return {
            "cosine": (products / torch.outer(lengths, lengths)).tolist(),
            "corrected": [[1.0 if i == j else None if noise[i][j] else corrected[i][j] for j in size] for i in size],
        }

    weights = torch.tensor([stop - start for start, stop in BANDS.values()], dtype=torch.float64)
    shares = traces * weights / (traces * weights).sum(dim=1, keepdim=True)
    return {
        "num_samples": num_samples,
        "agreement": {name: agreement[:, b].tolist() for b, name in enumerate(names)},
        "between_tasks": {
            name: matrices(products[:, b, :, b], lengths[:, b], signal[:, b]) for b, name in enumerate(names)
        },
        "between_bands": [matrices(products[k, :, k, :], lengths[k], signal[k]) for k in range(num_tasks)],
        "trace_share": [dict(zip(BANDS, row, strict=True)) for row in shares.tolist()],
    }
