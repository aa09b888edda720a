"""Both decoupled steps against a numerical minimiser."""

import copy

import pytest
import scipy.optimize
import torch
from estimate_helpers import PENALTIES, consolidated, flat, moved, relative, weights

from diffusers_cl import DiagonalEWC, Rank1EWC


def minimised(objective, start: torch.Tensor) -> torch.Tensor:
    """The minimiser of a function that returns its value and gradient, found step by step in float64."""
    result = scipy.optimize.minimize(
        lambda x: tuple(part.numpy() for part in objective(torch.from_numpy(x))),
        start.numpy(),
        jac=True,
        method="L-BFGS-B",
        options={"maxiter": 2000, "maxcor": 30, "ftol": 0, "gtol": 1e-9},
    )
    return torch.from_numpy(result.x)


# From a small pull, where (I + s L V V^T) is near the identity, to one of a thousand in the stiffest direction.
@pytest.mark.parametrize("lr", [1e-4, 1e-2])
@pytest.mark.parametrize("kind", PENALTIES)
def test_decoupled_step_is_the_proximal_minimiser(tasks, losses, dense_fishers, kind, lr):
    penalty = consolidated(kind, 1000.0, tasks, losses)
    model = moved(tasks[-1][0], 0.05, seed=10)
    start = weights(model)
    matrices, anchors = dense_fishers(kind), [weights(anchor) for anchor, _ in tasks]

    def objective(theta):
        differences = [theta - anchor for anchor in anchors]
        products = [matrix @ d for matrix, d in zip(matrices, differences, strict=True)]
        value = sum(d @ product for d, product in zip(differences, products, strict=True))
        return (
            0.5 * (theta - start).square().sum() + 0.5 * lr * 1000.0 * value,
            theta - start + lr * 1000.0 * sum(products),
        )

    expected = minimised(objective, start)
    assert objective(expected)[1].norm() < 1e-6 * objective(start)[1].norm()
    penalty.step(model, lr)
    # Float32 Fishers (1e-5) and float32 weights (1e-7 of theta) beside what the step moves.
    assert relative(weights(model) - start, expected - start) < 1e-4


@pytest.mark.parametrize("kind", PENALTIES)
def test_decoupled_step_at_learning_rate_zero_changes_no_bit(tasks, losses, kind):
    penalty = consolidated(kind, 15_000.0, tasks, losses)
    model = moved(tasks[-1][0], 0.05, seed=10)
    before = copy.deepcopy(model.state_dict())
    penalty.step(model, 0.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    # And it does change them at another.
    penalty.step(model, 1e-3)
    assert not torch.equal(model.conv_in.weight, before["conv_in.weight"])


def test_decoupled_rank1_step_at_a_large_learning_rate_is_a_projection(tasks, losses):
    penalty = consolidated(Rank1EWC, 15_000.0, tasks, losses)
    model = moved(tasks[-1][0], 0.05, seed=10)
    start = weights(model)
    directions = torch.cat([v.flatten(1) for v in penalty.tensors["direction"].values()], dim=1).double()
    offsets = torch.tensor(penalty.statistics["offset"], dtype=torch.float64)
    penalty.step(model, 1e12)
    # V theta = b, up to the rounding of the weights to float32: 3e-8 of |theta| = 10, and V is of unit rows.
    assert ((directions @ start - offsets).abs() > 1e-3).all()
    assert ((directions @ weights(model) - offsets).abs() < 1e-6).all()
    # The nearest such weights: nothing moves off the span of V.
    expected = start - torch.linalg.pinv(directions) @ (directions @ start - offsets)
    assert relative(weights(model) - start, expected - start) < 1e-4
    # Unconditionally stable: a projection twice is a projection.
    once = weights(model)
    penalty.step(model, 1e12)
    assert (weights(model) - once).abs().max() < 1e-6


def test_decoupled_rank1_step_with_equal_directions_is_regular(tasks, losses):
    # V V^T is singular here, I + s L V V^T is not.
    penalty = consolidated(Rank1EWC, 15_000.0, [tasks[0], tasks[0]], losses)
    model = moved(tasks[0][0], 0.05, seed=10)
    v, b = flat(tensor[0] for tensor in penalty.tensors["direction"].values()), penalty.statistics["offset"][0]
    before = (v @ weights(model) - b).item()
    penalty.step(model, 1e-5)
    # Two equal terms are one of twice the strength, a pull of 8 here. The rounding of the weights is 1e-7, see above.
    pull = 2 * 1e-5 * penalty.strengths()[0]
    assert (v @ weights(model) - b).item() == pytest.approx(before / (1 + pull), abs=1e-6)
    assert abs(before) / (1 + pull) > 1e-4 and pull > 1


def test_decoupled_diagonal_step_at_a_large_learning_rate_is_the_anchor(tasks, losses):
    penalty = consolidated(DiagonalEWC, 15_000.0, tasks, losses)
    model = moved(tasks[-1][0], 0.05, seed=10)
    penalty.step(model, 1e20)
    # Every parameter of this model has a Fisher of more than 1e-12.
    assert flat(penalty.tensors["fisher"].values()).min() > 1e-12 or not flat(penalty.tensors["fisher"].values()).all()
    for name, parameter in model.named_parameters():
        seen = penalty.tensors["fisher"][name] > 0
        assert torch.equal(parameter[seen], penalty.tensors["anchor"][name][seen])


@pytest.mark.parametrize("kind", PENALTIES)
def test_decoupled_step_needs_and_leaves_no_gradient(tasks, losses, kind):
    penalty = consolidated(kind, 15_000.0, tasks[:1], losses)
    model = moved(tasks[0][0], 0.05, seed=10)
    before = penalty(model).item()
    penalty.step(model, 1e-3)
    assert all(p.grad is None and p.requires_grad and p.is_leaf for p in model.parameters())
    assert penalty(model).item() < before
