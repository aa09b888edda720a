"""What moving the weights along a direction does to a task's loss: the question that decides what a penalty protects."""

from collections.abc import Callable

import torch

from .passes import Losses, estimating, finite, trainable_parameters, with_parameters


# Lengths of the moves. Digits' weights have a norm of some tens; five steps of Adam move them by about 0.1.
STEPS = (0.003, 0.01, 0.03, 0.1, 0.3)
# The diagonal's top coordinates are so many.
TOP_COORDINATES = 100


@torch.no_grad()
def loss_curve(
    model: torch.nn.Module,
    losses: Losses,
    batches: list,
    direction: torch.Tensor,
    steps: tuple[float, ...] = STEPS,
    on_loss: Callable[[], None] = lambda: None,
) -> list[float]:
    """
    Returns the mean loss at `theta - steps[-1] v`, ..., `theta`, ..., `theta + steps[-1] v`, in float64.

    Args:
        model (`torch.nn.Module`): the unwrapped network, whose weights are left as they are.
        losses: `losses(model, batch) -> (batch,)`, calling nothing but `model(...)`.
        batches (list of tuples of `torch.Tensor`): the same draws for every point.
        direction (`torch.Tensor` of shape `(D,)`): of unit length, or any that is to be moved along in units of its length.
        steps (tuple of `float`): growing lengths above 0.
        on_loss: called after each of `2 * len(steps) + 1` losses.

    Raises:
        FloatingPointError: when a loss is not finite.
    """
    parameters = {name: parameter.detach() for name, parameter in trainable_parameters(model).items()}
    parts = direction.float().split([parameter.numel() for parameter in parameters.values()])
    curve = []
    with estimating(model):
        for step in (*(-step for step in reversed(steps)), 0.0, *steps):
            moved = {
                name: parameter + step * part.to(parameter.device).view_as(parameter)
                for (name, parameter), part in zip(parameters.items(), parts, strict=True)
            }
            values = torch.cat([losses(with_parameters(model, moved), batch).double() for batch in batches])
            curve.append(finite(values.mean(), "the loss along a direction").item())
            on_loss()
    return curve


def rises(curve: list[float]) -> list[float]:
    """Returns by how much the loss rises at each step length, the mean of both signs: what the gradient adds cancels."""
    middle = len(curve) // 2
    return [(curve[middle - i] + curve[middle + i]) / 2 - curve[middle] for i in range(1, middle + 1)]


def coordinate_direction(
    diagonal: torch.Tensor, generator: torch.Generator, count: int = TOP_COORDINATES
) -> torch.Tensor:
    """
    Returns a unit vector that has equal shares in the diagonal's largest coordinates, with random signs, and 0 elsewhere: over
    the signs, the mean rise is what a diagonal penalty sees.

    Args:
        diagonal (`torch.Tensor` of shape `(D,)`).
    """
    count = min(count, len(diagonal))
    top = diagonal.topk(count).indices
    signs = torch.randint(0, 2, (count,), generator=generator, dtype=torch.float32) * 2 - 1
    vector = torch.zeros(len(diagonal), dtype=torch.float32)
    vector[top.cpu()] = signs / count**0.5
    return vector
