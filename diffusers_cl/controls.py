"""
Penalties to judge [`Rank1EWC`] and [`DiagonalEWC`] by: a random direction in place of theirs, and plain L2 to the anchor.

Neither is a method to use. If a random direction of equal strength holds as much as `v`, then `v` is not why.
"""

import torch

from .along import curvature_along
from .ewc import DiagonalEWC, Rank1EWC
from .fisher import Rank1Fisher
from .passes import Losses, Reduce, alone, first_draws, trainable_parameters


# Curvatures along random directions are small: a step as long as this keeps the differences above float32's noise.
ISOTROPIC_STEP = 0.1
ISOTROPIC_DIRECTIONS = 4


def random_direction(model: torch.nn.Module, generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Returns a unit vector, uniform on the sphere, by parameter name, float32; `generator` is a CPU generator."""
    parameters = trainable_parameters(model)
    direction = {
        name: torch.randn(p.shape, generator=generator, dtype=torch.float64) for name, p in parameters.items()
    }
    norm = sum(tensor.square().sum() for tensor in direction.values()).sqrt()
    return {name: (tensor / norm).float().to(parameters[name].device) for name, tensor in direction.items()}


def _generator(model: torch.nn.Module, batches, reduce: Reduce) -> torch.Generator:
    """Seeded by the first batch, a function of the run's seed and the task: the same for any number of processes."""
    total = torch.zeros((), dtype=torch.float64, device=next(model.parameters()).device)
    # Of several processes one has the first draw.
    if any(len(batch[0]) for batch in first_draws(batches, 1)):
        total += next(iter(batches))[0].double().sum()
    return torch.Generator().manual_seed(int(reduce(total).abs().item() * 2**20))


class RandomDirectionEWC(Rank1EWC):
    """
    [`Rank1EWC`] with a random unit vector in place of v, of the strength that v would have: `ewc_lambda * m` or, under
    `auto`, the measured curvature, both along the true v.
    """

    kind = "random_direction"

    def _direction(self, model: torch.nn.Module, fisher: Rank1Fisher, batches, reduce: Reduce):
        return random_direction(model, _generator(model, batches, reduce))


class L2Penalty(DiagonalEWC):
    """
    Every parameter held alike: `(ewc_lambda / 2) sum_k |theta - theta*_k|^2`, [`DiagonalEWC`] with ones for a Fisher.

    Args:
        ewc_lambda (`float` or `str`): the weight; `"auto"` takes the mean curvature of the task's loss over random
            directions, an estimate of its Hessian's trace over the number of parameters, in place of the ones.
    """

    kind = "l2"

    def _estimate(self, model: torch.nn.Module, losses: Losses, batches, reduce: Reduce = alone, progress=None):
        strength, num_samples, curvature = 1.0, 0, None
        if self.automatic:
            counted = torch.tensor(float(sum(len(batch[0]) for batch in batches)), dtype=torch.float64)
            num_samples = int(reduce(counted.to(next(model.parameters()).device)).item())
            generator = _generator(model, batches, reduce)
            measured = []
            for k in range(ISOTROPIC_DIRECTIONS):
                along, step = random_direction(model, generator), (ISOTROPIC_STEP,)
                measured += curvature_along(model, losses, batches, along, step, reduce, progress, f"loss-{k}")
            curvature = sum(measured) / len(measured)
            strength = max(0.0, curvature)
        constant = {name: torch.full_like(p, strength) for name, p in trainable_parameters(model).items()}
        return constant, num_samples, curvature
