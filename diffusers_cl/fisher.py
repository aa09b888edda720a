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

import torch
from torch.func import grad, jvp, vmap
from torch.nn.attention import SDPBackend, sdpa_kernel

from .passes import (
    Losses,
    Reduce,
    alone,
    batches_to_do,
    estimating,
    finite,
    first_draws,
    trainable_parameters,
    with_parameters,
)


# Lengths of the central differences along a unit direction: on digits the result is flat from 0.003 to 0.1.
CURVATURE_STEPS = (0.01, 0.03)
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


def _checksum(batch: tuple[torch.Tensor, ...], start: int) -> torch.Tensor:
    """Of rows by their position, so that the same labels on other images are other draws."""
    positions = torch.arange(start + 1, start + 1 + len(batch[0]), dtype=torch.float64, device=batch[0].device)
    return sum((tensor.double().reshape(len(tensor), -1).sum(dim=1) * positions).sum() for tensor in batch)


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
) -> tuple[dict[str, torch.Tensor], int, torch.Tensor]:
    """
    Returns mu = E[g] by one ordinary backward pass a batch, in float64, and the number and a checksum of this process's
    draws.

    Raises:
        ValueError: no draws, or not one loss a row. FloatingPointError: mu is not finite.
    """
    parameters = trainable_parameters(model)
    total, count = _zeros(parameters)
    checksum = torch.zeros_like(count)
    sums = {**total, "count": count, "checksum": checksum}
    with estimating(model):
        for batch in batches_to_do(progress, batches, "mean_gradient", sums):
            values = losses(model, batch)
            if values.shape != (len(batch[0]),):
                raise ValueError(f"losses has to return one loss a row, {len(batch[0])}, not {tuple(values.shape)}")
            gradients = torch.autograd.grad(values.sum(), list(parameters.values()))
            for accumulated, gradient in zip(total.values(), gradients, strict=True):
                accumulated += gradient
            checksum += _checksum(batch, int(count))
            count += len(batch[0])
    num_samples = int(count)
    mu, _ = _means(parameters, total, count, reduce, "the Fisher's mean gradient")
    return mu, num_samples, checksum


def projections(
    model: torch.nn.Module, losses: Losses, batch: tuple[torch.Tensor, ...], direction: dict[str, torch.Tensor]
) -> torch.Tensor:
    """
    Returns `v . g_i` for every row of a batch, of shape `(batch,)`, by one forward-mode product: no per-sample gradient is
    formed. `direction` is v by parameter name, float32.
    """
    parameters = {name: parameter.detach() for name, parameter in trainable_parameters(model).items()}
    with sdpa_kernel(SDPBackend.MATH):
        _, projected = jvp(
            lambda values: losses(with_parameters(model, values), batch),
            (parameters,),
            ({name: direction[name] for name in parameters},),
        )
    return projected


@torch.no_grad()
def curvature_along(
    model: torch.nn.Module,
    losses: Losses,
    batches: Iterable,
    direction: dict[str, torch.Tensor],
    steps: tuple[float, ...] = CURVATURE_STEPS,
    reduce: Reduce = alone,
    progress=None,
    label: str = "loss",
) -> list[float]:
    """
    Returns the second derivative of the mean loss along a unit direction, by central differences at each step length.

    `kappa = (L(theta + e v) - 2 L(theta) + L(theta - e v)) / e^2`, on the same draws for every evaluation. Not clamped:
    a negative value means that theta is no minimum along v. `label` names its passes, for `progress`.
    """
    parameters = {name: parameter.detach() for name, parameter in trainable_parameters(model).items()}

    def mean_loss(step: float) -> float:
        shifted = {name: parameter + step * direction[name] for name, parameter in parameters.items()}
        sums = torch.zeros(2, dtype=torch.float64, device=next(iter(parameters.values())).device)
        for batch in batches_to_do(progress, batches, f"{label} {step:+}", {"sums": sums}):
            values = losses(with_parameters(model, shifted), batch)
            sums += torch.stack([values.double().sum(), values.new_tensor(len(values), dtype=torch.float64)])
        total, num_samples = reduce(sums)
        return finite(total / num_samples, "the loss along the Fisher's direction").item()

    with estimating(model):
        here = mean_loss(0.0)
        return [(mean_loss(step) - 2 * here + mean_loss(-step)) / step**2 for step in steps]


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
                sums[0] += sum(gradient.double().square().sum() for gradient in gradients.values())
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
    same gradients (the authors' code draws anew).

    Args:
        model (`torch.nn.Module`): the unwrapped network, at the finished task's weights.
        diagnostics (`bool`): also estimate the trace from per-sample gradients of the first 128 draws.
        curvature (`bool`): also measure the curvature along v (five more forward passes over the draws).
        chunk_size (`int`, *optional*): rows of per-sample gradients at a time, for the trace.
        reduce: sums a tensor over processes.

    Raises:
        ValueError: when there are no draws, the mean gradient is zero, or the second pass saw other draws.
        FloatingPointError: when an estimate is not finite.
    """
    mu, count, checksum = mean_gradient(model, losses, batches, reduce, progress)
    norm = math.sqrt(sum(tensor.square().sum().item() for tensor in mu.values()))
    if norm == 0.0:
        raise ValueError("Fisher estimate: the mean gradient is zero, there is no direction")
    direction = {name: (tensor / norm).float() for name, tensor in mu.items()}

    # Second moment, draws, and their checksum.
    sums = torch.zeros(3, dtype=torch.float64, device=checksum.device)
    with estimating(model):
        for batch in batches_to_do(progress, batches, "projections", {"sums": sums}):
            sums[0] += projections(model, losses, batch, direction).double().square().sum()
            sums[2] += _checksum(batch, int(sums[1]))
            sums[1] += len(batch[0])
    again = int(sums[1])
    sums[2] = again != count or not torch.equal(sums[2], checksum)
    total, num_samples, others = reduce(sums)
    if others:
        raise ValueError(f"Fisher estimate: the batches gave other draws the second time ({again} of {count})")
    fisher = Rank1Fisher(
        direction=direction,
        second_moment=finite(total / num_samples, "the Fisher's second moment").item(),
        mean_gradient_norm=norm,
        num_samples=int(num_samples),
    )
    if curvature:
        fisher.curvature, fisher.curvature_check = curvature_along(
            model, losses, batches, direction, reduce=reduce, progress=progress
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
                    total[f"sum.{name}"] += gradient.square().sum(dim=0, dtype=torch.float64)
            count += len(batch[0])
    diagonal, num_samples = _means(parameters, total, count, reduce, "the Fisher's diagonal")
    return {name: finite(tensor.float(), "the Fisher's diagonal") for name, tensor in diagonal.items()}, num_samples
