"""What the losses do along one direction of the weights: first derivatives row by row, and the curvature of their mean."""

from collections.abc import Callable, Iterable

import torch
from torch.func import jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from .passes import (
    Losses,
    Reduce,
    alone,
    batches_to_do,
    checksum_of,
    estimating,
    finite,
    trainable_parameters,
    with_parameters,
)


# Lengths of the central differences along a unit direction: on digits the curvature is flat from 0.003 to 0.1.
CURVATURE_STEPS = (0.01, 0.03)
# And of those of single losses. Rounding grows as it shrinks, third derivatives with its square: on digits the second moment is
# within 4e-5 of forward-mode products from 0.0003 to 0.001, at raw and at EMA weights.
PROJECTION_STEP = 0.0005


def projections(
    model: torch.nn.Module, losses: Losses, batch: tuple[torch.Tensor, ...], direction: dict[str, torch.Tensor]
) -> torch.Tensor:
    """
    Returns `v . g_i` for every row of a batch, of shape `(batch,)`, by one forward-mode product: no per-sample gradient is
    formed. `direction` is v by parameter name, float32.

    Exact for any direction; along v [`second_moment_along`] is half the work.
    """
    parameters = {name: parameter.detach() for name, parameter in trainable_parameters(model).items()}
    with sdpa_kernel(SDPBackend.MATH):
        _, projected = jvp(
            lambda values: losses(with_parameters(model, values), batch),
            (parameters,),
            ({name: direction[name] for name in parameters},),
        )
    return projected


def _moved(model: torch.nn.Module, direction: dict[str, torch.Tensor], step: float) -> Callable:
    """The model with its weights moved along a direction."""
    parameters = trainable_parameters(model)
    return with_parameters(model, {name: p.detach() + step * direction[name] for name, p in parameters.items()})


@torch.no_grad()
def second_moment_along(
    model: torch.nn.Module,
    losses: Losses,
    batches: Iterable,
    direction: dict[str, torch.Tensor],
    draws: tuple[int, torch.Tensor],
    reduce: Reduce = alone,
    progress=None,
) -> tuple[float, int]:
    """
    Returns m = E[(v . g)^2] along a unit direction and the number of draws, over all processes.

    `v . g_i` is the central difference of row i's loss, by two forward passes. `draws` are the number of this process's
    draws and their [`checksum_of`]; others are a `ValueError`.
    """
    count, checksum = draws
    moved = [_moved(model, direction, step) for step in (PROJECTION_STEP, -PROJECTION_STEP)]
    # Second moment, draws, and their checksum.
    sums = torch.zeros(3, dtype=torch.float64, device=checksum.device)
    with estimating(model):
        for batch in batches_to_do(progress, batches, "projections", {"sums": sums}):
            ahead, behind = (losses(model, batch).double() for model in moved)
            sums[0] += ((ahead - behind) / (2 * PROJECTION_STEP)).square().sum()
            sums[2] += checksum_of(batch, int(sums[1]))
            sums[1] += len(batch[0])
    again = int(sums[1])
    sums[2] = again != count or not torch.equal(sums[2], checksum)
    total, num_samples, others = reduce(sums)
    if others:
        raise ValueError(f"Fisher estimate: the batches gave other draws the second time ({again} of {count})")
    return finite(total / num_samples, "the Fisher's second moment").item(), int(num_samples)


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
    here: float | None = None,
) -> list[float]:
    """
    Returns the second derivative of the mean loss along a unit direction, by central differences at each step length.

    `kappa = (L(theta + e v) - 2 L(theta) + L(theta - e v)) / e^2`, on the same draws for every evaluation. Not clamped:
    a negative value means that theta is no minimum along v. `label` names its passes, for `progress`; `here` is L(theta),
    where it is known.
    """

    def mean_loss(step: float) -> float:
        moved = _moved(model, direction, step)
        sums = torch.zeros(2, dtype=torch.float64, device=next(iter(direction.values())).device)
        for batch in batches_to_do(progress, batches, f"{label} {step:+}", {"sums": sums}):
            values = losses(moved, batch)
            sums += torch.stack([values.double().sum(), values.new_tensor(len(values), dtype=torch.float64)])
        total, num_samples = reduce(sums)
        return finite(total / num_samples, "the loss along the Fisher's direction").item()

    with estimating(model):
        here = mean_loss(0.0) if here is None else here
        return [(mean_loss(step) - 2 * here + mean_loss(-step)) / step**2 for step in steps]
