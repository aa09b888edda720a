"""
Empirical Fisher of the denoising loss: the uncentred second moment of per-sample gradients, as rank-1 and diagonal.

Every function takes `losses(model, batch) -> (batch,)`, which calls nothing but `model(...)` (it is handed a functional
stand-in), and re-iterable `batches` of tuples of tensors that gives the same draws every time. Estimates are taken in
eval mode and in float32 with TF32 off; whatever was set before is put back. `reduce` sums a tensor over processes that
each hold a part of the draws. `progress`, where it is given, keeps the sums of every pass ([`batches_to_do`]): an estimate
that was interrupted and is asked for again takes what batches are left, and is equal to the bit. It is not the true
Fisher (no label is drawn from the model): see README, "What is computed".
"""

import math
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch.func import grad, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from .along import CURVATURE_STEPS, curvature_along, second_moment_along
from .passes import (
    Losses,
    Reduce,
    alone,
    batches_to_do,
    checksum_of,
    estimating,
    finite,
    first_draws,
    trainable_parameters,
    with_parameters,
)


# How many draws the diagnostics that need per-sample gradients use.
TRACE_SAMPLES = 128


@dataclass
class Rank1Fisher:
    """
    The rank-1 estimate of one task and what says how far to trust it.

    Attributes:
        direction (`dict[str, torch.Tensor]`): v = mu / |mu| by parameter name, float32.
        second_moment (`float`): m = E[(v . g)^2] = v^T F v, a Rayleigh quotient (at most F's largest eigenvalue).
        mean_gradient_norm (`float`): |mu|.
        num_samples (`int`): draws, over all processes.
        curvature, curvature_check (`float` or `None`): second derivative of the mean loss along v, at two step lengths.
        trace (`float` or `None`), trace_num_samples (`int`): E|g|^2 over so many draws.
    """

    direction: dict[str, torch.Tensor] = field(repr=False)
    second_moment: float
    mean_gradient_norm: float
    num_samples: int
    curvature: float | None = None
    curvature_check: float | None = None
    trace: float | None = None
    trace_num_samples: int = 0


class MeanGradient(NamedTuple):
    """mu by parameter name, float64, and the mean loss; the number and a checksum of this process's draws."""

    mu: dict[str, torch.Tensor]
    loss: float
    num_samples: int
    checksum: torch.Tensor


def _zeros(parameters: dict[str, torch.nn.Parameter]) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Float64 sums for every parameter, under names that are no others', and a count of draws."""
    total = {f"sum.{name}": torch.zeros_like(p, dtype=torch.float64) for name, p in parameters.items()}
    return total, torch.zeros((), dtype=torch.float64, device=next(iter(parameters.values())).device)


def _means(parameters, total, count: torch.Tensor, reduce: Reduce, name: str) -> tuple[dict[str, torch.Tensor], int]:
    """The means over the draws of all processes, and how many draws these are."""
    num_samples = int(reduce(count))
    if num_samples == 0:
        raise ValueError("Fisher estimate: the batches are empty")
    means = [finite(reduce(tensor) / num_samples, name) for tensor in total.values()]
    return dict(zip(parameters, means, strict=True)), num_samples


def per_sample_gradients(
    model: torch.nn.Module, losses: Losses, batch: tuple[torch.Tensor, ...]
) -> dict[str, torch.Tensor]:
    """
    Returns the gradient of every row's loss, by `vmap(grad(...))`: by parameter name, of shape `(rows, *parameter.shape)`.

    All rows are taken at once, `rows * parameters` numbers; the model is left in the mode that it is in.
    """
    parameters = {name: parameter.detach() for name, parameter in trainable_parameters(model).items()}

    def loss_of_row(parameters, row):
        return losses(with_parameters(model, parameters), tuple(tensor.unsqueeze(0) for tensor in row)).squeeze(0)

    with sdpa_kernel(SDPBackend.MATH):
        return vmap(grad(loss_of_row), in_dims=(None, 0))(parameters, tuple(batch))


def _gradient_chunks(model, losses, batch, chunk_size: int | None):
    """Yields `per_sample_gradients` of a few rows at a time: by default at most 2**28 numbers (1 GiB)."""
    num_parameters = sum(parameter.numel() for parameter in trainable_parameters(model).values())
    chunk_size = chunk_size or max(1, min(32, 2**28 // num_parameters))
    for start in range(0, len(batch[0]), chunk_size):
        yield per_sample_gradients(model, losses, tuple(tensor[start : start + chunk_size] for tensor in batch))


def mean_gradient(
    model: torch.nn.Module, losses: Losses, batches: Iterable, reduce: Reduce = alone, progress=None
) -> MeanGradient:
    """
    Returns mu = E[g] and the mean loss, by one ordinary backward pass a batch.

    Raises:
        ValueError: no draws, or not one loss a row. FloatingPointError: mu is not finite.
    """
    parameters = trainable_parameters(model)
    total, count = _zeros(parameters)
    checksum, loss = torch.zeros_like(count), torch.zeros_like(count)
    sums = {**total, "loss": loss, "count": count, "checksum": checksum}
    with estimating(model):
        for batch in batches_to_do(progress, batches, "mean_gradient", sums):
            values = losses(model, batch)
            if values.shape != (len(batch[0]),):
                raise ValueError(f"losses has to return one loss a row, {len(batch[0])}, not {tuple(values.shape)}")
            gradients = torch.autograd.grad(values.sum(), list(parameters.values()))
            for accumulated, gradient in zip(total.values(), gradients, strict=True):
                accumulated += gradient
            loss += values.detach().double().sum()
            checksum += checksum_of(batch, int(count))
            count += len(batch[0])
    own_samples = int(count)
    mu, num_samples = _means(parameters, total, count, reduce, "the Fisher's mean gradient")
    return MeanGradient(mu, (reduce(loss) / num_samples).item(), own_samples, checksum)


def gradient_trace(
    model: torch.nn.Module,
    losses: Losses,
    batches: Iterable,
    num_samples: int = TRACE_SAMPLES,
    chunk_size: int | None = None,
    reduce: Reduce = alone,
    progress=None,
) -> tuple[float, int]:
    """Returns E|g|^2 over the first `num_samples` draws ([`first_draws`]), and the number of draws over all processes."""
    sums = torch.zeros(2, dtype=torch.float64, device=next(model.parameters()).device)
    with estimating(model):
        for batch in batches_to_do(progress, first_draws(batches, num_samples), "trace", {"sums": sums}):
            for gradients in _gradient_chunks(model, losses, batch, chunk_size):
                sums[0] += sum(g.square_().sum(dtype=torch.float64) for g in gradients.values())
            sums[1] += len(batch[0])
    total, count = reduce(sums)
    return finite(total / count, "the Fisher's trace").item(), int(count)


def rank1_fisher(
    model: torch.nn.Module,
    losses: Losses,
    batches: Iterable,
    diagnostics: bool = True,
    curvature: bool = True,
    chunk_size: int | None = None,
    reduce: Reduce = alone,
    progress=None,
) -> Rank1Fisher:
    """
    Returns the rank-1 Fisher of arXiv 2509.23593, Sec. 3.3, in normalised form.

    The paper's coefficient is `c* = E[(mu . g)^2] / |mu|^4`; stored are `v = mu / |mu|` and `m = E[(v . g)^2]`, with
    `c* mu mu^T = m v v^T`, because `|mu|^4` underflows. Both passes see the same draws, so that c* and mu belong to the
    same gradients (the authors' code draws anew). No per-sample gradient is formed: mu is one backward pass a batch, and
    `v . g_i` the central difference of row i's loss along v, by two forward passes. Together that is the arithmetic of
    less than two epochs.

    Args:
        model (`torch.nn.Module`): the unwrapped network, at the finished task's weights.
        diagnostics (`bool`): also estimate the trace from per-sample gradients of the first 128 draws.
        curvature (`bool`): also measure the curvature along v (four more forward passes over the draws).
        chunk_size (`int`, *optional*): rows of per-sample gradients at a time, for the trace.
        reduce: sums a tensor over processes.

    Raises:
        ValueError: when there are no draws, the mean gradient is zero, or the second pass saw other draws.
        FloatingPointError: when an estimate is not finite.
    """
    mean = mean_gradient(model, losses, batches, reduce, progress)
    norm = math.sqrt(sum(tensor.square().sum().item() for tensor in mean.mu.values()))
    if norm == 0.0:
        raise ValueError("Fisher estimate: the mean gradient is zero, there is no direction")
    direction = {name: (tensor / norm).float() for name, tensor in mean.mu.items()}
    draws = (mean.num_samples, mean.checksum)
    second_moment, num_samples = second_moment_along(model, losses, batches, direction, draws, reduce, progress)
    fisher = Rank1Fisher(direction, second_moment, norm, num_samples)
    if curvature:
        fisher.curvature, fisher.curvature_check = curvature_along(
            model, losses, batches, direction, reduce=reduce, progress=progress, here=mean.loss
        )
        measured = fisher.curvature, fisher.curvature_check
        if abs(measured[0] - measured[1]) > 0.2 * max(map(abs, measured)):
            warnings.warn(
                f"the curvature along the direction depends on the step length: {measured[0]:.4g} at"
                f" {CURVATURE_STEPS[0]}, {measured[1]:.4g} at {CURVATURE_STEPS[1]}",
                stacklevel=2,
            )
    if diagnostics:
        fisher.trace, fisher.trace_num_samples = gradient_trace(
            model, losses, batches, chunk_size=chunk_size, reduce=reduce, progress=progress
        )
    return fisher


def diagonal_fisher(
    model: torch.nn.Module,
    losses: Losses,
    batches: Iterable,
    chunk_size: int | None = None,
    reduce: Reduce = alone,
    progress=None,
) -> tuple[dict[str, torch.Tensor], int]:
    """
    Returns the diagonal of the empirical Fisher, `E[g * g]`, from per-sample gradients in chunks.

    Squares of batch-mean gradients would be something else (0.37 of the trace at batches of 8).

    Returns:
        `dict[str, torch.Tensor]` by parameter name, float32 (summed in float64), and the number of draws.

    Raises:
        ValueError: when there are no draws.
        FloatingPointError: when an estimate is not finite.
    """
    parameters = trainable_parameters(model)
    total, count = _zeros(parameters)
    with estimating(model):
        for batch in batches_to_do(progress, batches, "diagonal", {**total, "count": count}):
            for gradients in _gradient_chunks(model, losses, batch, chunk_size):
                for name, gradient in gradients.items():
                    # In place: each pass over so many numbers costs as much as a gradient.
                    total[f"sum.{name}"] += gradient.square_().sum(dim=0, dtype=torch.float64)
            count += len(batch[0])
    diagonal, num_samples = _means(parameters, total, count, reduce, "the Fisher's diagonal")
    return {name: finite(tensor.float(), "the Fisher's diagonal") for name, tensor in diagonal.items()}, num_samples
