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
MIN_AGREEMENT = 0.1


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
        mean = mean_gradient(model, losses, batches).mu
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


def without_noise(products: torch.Tensor, signal: torch.Tensor, agreement: torch.Tensor) -> list[list[float | None]]:
    """
    Returns the cosines of the true mean gradients, from products of estimates that share no draw.

    Args:
        products (`torch.Tensor` of shape `(n, n)`): of the estimates; the diagonal is not used.
        signal (`torch.Tensor` of shape `(n,)`): unbiased estimates of the true means' squares.
        agreement (`torch.Tensor` of shape `(n,)`): how much of an estimate is signal; below `MIN_AGREEMENT` there is no cosine to
            it (`None`), since that would be one noise over another.
    """
    known = (agreement >= MIN_AGREEMENT) & (signal > 0)
    cosines = (products / torch.outer(signal, signal).clamp(min=1e-300).sqrt()).tolist()
    size = range(len(signal))
    return [[1.0 if i == j else cosines[i][j] if known[i] and known[j] else None for j in size] for i in size]


def compare_bands(gram: torch.Tensor, traces: torch.Tensor, num_tasks: int, num_samples: int) -> dict:
    """
    Returns the cosines between directions of bands and tasks, as JSON.

    A cosine of two means of finitely many draws is too small, since each has its own noise. The two halves of a task's draws in
    a band share the mean and no noise, so that `<half 0, half 1>` is an unbiased `|mu|^2`: `corrected` divides by these in place
    of the squared lengths. It is left out (`None`) where a direction is little but noise
    ([`without_noise`]), and may exceed 1 by chance.

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

    # A band and all timesteps share draws: of one task only the products of different halves are without their noise.
    between = (full[:, :, 0, :, :, 1] + full[:, :, 1, :, :, 0]) / 2

    def matrices(
        products: torch.Tensor, unbiased: torch.Tensor, signal: torch.Tensor, agreement: torch.Tensor
    ) -> dict:
        lengths = products.diagonal().sqrt()
        cosine = products / torch.outer(lengths, lengths)
        return {"cosine": cosine.tolist(), "corrected": without_noise(unbiased, signal, agreement)}

    weights = torch.tensor([stop - start for start, stop in BANDS.values()], dtype=torch.float64)
    shares = traces * weights / (traces * weights).sum(dim=1, keepdim=True)
    return {
        "num_samples": num_samples,
        "agreement": {name: agreement[:, b].tolist() for b, name in enumerate(names)},
        "between_tasks": {
            name: matrices(products[:, b, :, b], products[:, b, :, b], signal[:, b], agreement[:, b])
            for b, name in enumerate(names)
        },
        "between_bands": [
            matrices(products[k, :, k, :], between[k, :, k, :], signal[k], agreement[k]) for k in range(num_tasks)
        ],
        "trace_share": [dict(zip(BANDS, row, strict=True)) for row in shares.tolist()],
    }
