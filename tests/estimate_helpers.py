"""What the tests of the Fisher and of the penalties share: vectors, distances, draws, and a stream of finished tasks."""

import copy

import torch

from diffusers_cl import DiagonalEWC, Rank1EWC
from diffusers_cl.fisher import trainable_parameters


# Gradients of one float32 loss by two orders of the same operations: 1e-6 of the gradient's norm was seen.
GRADIENT_RTOL = 1e-5
# Means and squares of them: twice that, with room.
MOMENT_RTOL = 1e-4

PENALTIES = [DiagonalEWC, Rank1EWC]
NUM_TASKS = 3


def flat(tensors) -> torch.Tensor:
    """One float64 vector of tensors, or of what is held by parameter name."""
    tensors = tensors.values() if isinstance(tensors, dict) else tensors
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def by_name(vector: torch.Tensor, model) -> dict[str, torch.Tensor]:
    """The inverse of [`flat`], float32."""
    parameters = trainable_parameters(model)
    parts = vector.split([parameter.numel() for parameter in parameters.values()])
    return {name: part.view_as(p).to(p.dtype) for (name, p), part in zip(parameters.items(), parts, strict=True)}


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance of two vectors in units of the expected one's length."""
    return ((actual - expected).norm() / expected.norm()).item()


def num_parameters(model) -> int:
    return sum(parameter.numel() for parameter in trainable_parameters(model).values())


class Redrawn:
    """As many draws every time, but others: what a data loader with noise in its `collate_fn` does."""

    def __init__(self, make_batches, sizes=(4,)):
        self.make_batches, self.sizes, self.passes = make_batches, list(sizes), 0

    def __iter__(self):
        self.passes += 1
        return iter(self.make_batches(self.sizes, seed=self.passes))


def weights(model) -> torch.Tensor:
    return flat(model.parameters())


@torch.no_grad()
def moved(model, distance: float, seed: int):
    """A copy of a model at other weights, `distance` times a standard normal away in every one."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        parameter.add_(distance * torch.randn(parameter.shape, generator=generator))
    return model


@torch.no_grad()
def moved_along(model, direction: dict[str, torch.Tensor], distance: float):
    """A copy of a model, moved along a unit direction."""
    model = copy.deepcopy(model)
    for name, parameter in model.named_parameters():
        parameter.add_(distance * direction[name])
    return model


def value_and_gradient(penalty, model) -> tuple[float, torch.Tensor]:
    value = penalty(model)
    assert value.shape == ()
    return value.item(), flat(torch.autograd.grad(value, list(model.parameters())))


def stream(model, make_batches) -> list[tuple]:
    """Three finished tasks: the model at other weights, and draws of other classes."""
    tasks = []
    for task in range(NUM_TASKS):
        model = moved(model, 0.05, seed=task)
        tasks.append((model, make_batches([5, 4], seed=task, classes=(task, task + 1))))
    return tasks


def consolidated(kind, ewc_lambda, tasks, losses, **kwargs):
    penalty = kind(ewc_lambda)
    for model, batches in tasks:
        penalty.consolidate(model, losses, batches, **kwargs)
    return penalty
