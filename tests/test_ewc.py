"""Both penalties against the explicit D x D quadratic form, both decoupled steps against a numerical minimiser."""

import copy
import inspect
import math
import subprocess
import sys
from pathlib import Path

import pytest
import scipy.optimize
import torch
from safetensors import safe_open

import diffusers_cl
from diffusers_cl import DiagonalEWC, Rank1EWC
from diffusers_cl.fisher import curvature_along, diagonal_fisher, rank1_fisher


PENALTIES = [DiagonalEWC, Rank1EWC]
NUM_TASKS = 3


def flat(tensors) -> torch.Tensor:
    """One float64 vector."""
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors])


def weights(model) -> torch.Tensor:
    return flat(model.parameters())


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance of two vectors in units of the expected one's length."""
    return ((actual - expected).norm() / expected.norm()).item()


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


@pytest.fixture
def tasks(small_denoiser, make_batches) -> list[tuple]:
    return stream(small_denoiser, make_batches)


def consolidated(kind, ewc_lambda, tasks, losses, **kwargs):
    penalty = kind(ewc_lambda)
    for model, batches in tasks:
        penalty.consolidate(model, losses, batches, **kwargs)
    return penalty


@pytest.fixture
def dense_fishers(tasks, losses, gradient_loop):
    """Returns a function of the penalty's class: the D x D matrix of every task, from one backward pass a row."""

    def build(kind) -> list[torch.Tensor]:
        matrices = []
        for model, batches in tasks:
            gradients = gradient_loop(model, losses, batches)
            if kind is DiagonalEWC:
                matrices.append(torch.diag(gradients.square().mean(dim=0)))
            else:
                # arXiv 2509.23593, Sec. 3.3 and Eq. 6: c* mu mu^T with c* = E[(mu . g)^2] / |mu|^4.
                mu = gradients.mean(dim=0)
                c_star = (gradients @ mu).square().mean() / mu.norm() ** 4
                matrices.append(c_star * torch.outer(mu, mu))
        return matrices

    return build


# The penalty's value and gradient


@pytest.mark.parametrize("kind", PENALTIES)
def test_nothing_before_the_first_task(small_denoiser, kind):
    penalty = kind()
    assert penalty.ewc_lambda == 15_000.0 and penalty.num_tasks == 0 and penalty.summary() == []
    loss = weights_loss = sum(parameter.sum() for parameter in small_denoiser.parameters())
    loss = loss + penalty(small_denoiser)
    assert torch.equal(loss, weights_loss)
    loss.backward()
    before = copy.deepcopy(small_denoiser.state_dict())
    penalty.step(small_denoiser, 1.0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in small_denoiser.state_dict().items())


@pytest.mark.parametrize("kind", PENALTIES)
def test_penalty_equals_the_explicit_quadratic_form_after_three_tasks(tasks, losses, dense_fishers, kind):
    penalty = consolidated(kind, 15_000.0, tasks, losses)
    assert penalty.num_tasks == NUM_TASKS
    matrices = dense_fishers(kind)
    for seed in (10, 11):
        model = moved(tasks[-1][0], 0.05, seed)
        differences = [weights(model) - weights(anchor) for anchor, _ in tasks]
        expected = 7500.0 * sum(d @ matrix @ d for d, matrix in zip(differences, matrices, strict=True))
        gradient = 15_000.0 * sum(matrix @ d for d, matrix in zip(differences, matrices, strict=True))
        value, actual = value_and_gradient(penalty, model)
        # Float32 gradients squared (1e-5 of their size, see test_fisher) on one side, float64 sums on the other.
        assert value == pytest.approx(expected.item(), rel=1e-4)
        assert relative(actual, gradient) < 1e-4


def test_collapsed_diagonal_equals_the_sum_over_tasks(tiny_unet, make_batches, losses):
    tasks = stream(tiny_unet, make_batches)
    penalty = DiagonalEWC(15_000.0)
    fishers = [flat(penalty.consolidate(model, losses, batches).values()) for model, batches in tasks]
    # What consolidate returns is the task's own Fisher, not the collapsed one.
    for (model, batches), fisher in zip(tasks, fishers, strict=True):
        assert torch.equal(fisher, flat(diagonal_fisher(model, losses, batches)[0].values()))
    model = moved(tasks[-1][0], 0.02, seed=9)
    differences = [weights(model) - weights(anchor) for anchor, _ in tasks]
    expected = 7500.0 * sum((fisher * d.square()).sum() for fisher, d in zip(fishers, differences, strict=True))
    gradient = 15_000.0 * sum(fisher * d for fisher, d in zip(fishers, differences, strict=True))
    value, actual = value_and_gradient(penalty, model)
    # The same Fishers on both sides: float32 sums over 43 thousand terms, and M rounded to float32.
    assert value == pytest.approx(expected.item(), rel=1e-5)
    assert relative(actual, gradient) < 1e-5


def test_diagonal_is_exactly_zero_at_the_first_anchor(tiny_unet, make_batches, losses):
    penalty = DiagonalEWC(15_000.0)
    penalty.consolidate(tiny_unet, losses, make_batches([4]))
    value, gradient = value_and_gradient(penalty, tiny_unet)
    assert value == 0.0
    assert not gradient.any()


def test_diagonal_between_two_anchors_keeps_the_constant(small_denoiser, make_batches, losses):
    # C: at the weighted mean of two anchors the gradient is zero and the value is not.
    tasks = stream(small_denoiser, make_batches)[:2]
    penalty = consolidated(DiagonalEWC, 15_000.0, tasks, losses)
    fishers = [flat(diagonal_fisher(model, losses, batches)[0].values()) for model, batches in tasks]
    (first, second), (a, b) = fishers, [weights(model) for model, _ in tasks]
    mean = torch.where(first + second > 0, (first * a + second * b) / (first + second), b)
    model = copy.deepcopy(tasks[0][0])
    torch.nn.utils.vector_to_parameters(mean.float(), model.parameters())
    value, gradient = value_and_gradient(penalty, model)
    expected = 7500.0 * (first * (mean - a).square() + second * (mean - b).square()).sum().item()
    assert value == pytest.approx(expected, rel=1e-5)
    # Zero up to the rounding of the weights to float32, beside the gradient at the second anchor.
    assert gradient.norm() < 1e-4 * value_and_gradient(penalty, tasks[1][0])[1].norm()


def test_parameters_without_fisher_follow_the_newest_anchor(make_batches):
    # A' = 0: the anchor is theta*, nothing is divided by zero.
    model = torch.nn.Linear(2, 1, bias=False)
    batches = [(torch.tensor([[1.0, 0.0]]), torch.tensor([1.0]))]
    penalty = DiagonalEWC(1.0)
    for _ in range(2):
        torch.nn.init.normal_(model.weight, generator=torch.Generator().manual_seed(penalty.num_tasks))
        penalty.consolidate(model, lambda m, b: (m(b[0])[:, 0] - b[1]).square(), batches)
    assert penalty.tensors["fisher"]["weight"][0, 1] == 0
    assert penalty.tensors["anchor"]["weight"][0, 1] == model.weight[0, 1]
    value, gradient = value_and_gradient(penalty, model)
    assert math.isfinite(value) and torch.isfinite(gradient).all() and gradient[1] == 0


def test_rank1_is_zero_at_its_anchors_up_to_rounding(tiny_unet, make_batches, losses):
    penalty = Rank1EWC(15_000.0)
    fisher = penalty.consolidate(tiny_unet, losses, make_batches([4]))
    # v . theta in float32 is off by 1e-7 of |theta|, random in sign over 43 thousand terms; ten times that is allowed.
    rounding = 1e-6 * weights(tiny_unet).norm().item()
    (strength,) = penalty.strengths()
    assert strength == 15_000.0 * fisher.second_moment
    value, gradient = value_and_gradient(penalty, tiny_unet)
    assert 0 <= value <= 0.5 * strength * rounding**2
    assert gradient.norm() <= strength * rounding
    # A hundredth of a unit along v is 1e6 times more: the bound above says something.
    value, gradient = value_and_gradient(penalty, moved_along(tiny_unet, fisher.direction, 0.01))
    assert value == pytest.approx(0.5 * strength * 1e-4, rel=1e-3)
    assert gradient.norm().item() == pytest.approx(strength * 0.01, rel=1e-3)


def test_rank1_ignores_what_is_orthogonal_to_its_directions(tasks, losses):
    penalty = consolidated(Rank1EWC, 15_000.0, tasks[:1], losses)
    model, _ = tasks[0]
    v = flat(penalty.tensors["direction"].values())
    other = torch.randn(len(v), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    other = weights(model) + other - (other @ v) * v
    model = copy.deepcopy(model)
    torch.nn.utils.vector_to_parameters(other.float(), model.parameters())
    # The weights are 35 away; along v that would be 15000 * 27 / 2 * 35^2 = 2e8. Rounding of v . theta is 1e-6 of that.
    assert (other - weights(tasks[0][0])).norm() > 30
    assert penalty(model).item() < 1e-3


@pytest.mark.parametrize("kind", PENALTIES)
def test_gradient_is_scaled_and_added(tasks, losses, kind):
    # As a loss scaler and gradient accumulation do.
    penalty = consolidated(kind, 100.0, tasks[:2], losses)
    model = moved(tasks[1][0], 0.05, seed=10)
    _, expected = value_and_gradient(penalty, model)
    model.conv_in.bias.square().sum().backward()
    data = model.conv_in.bias.grad.clone()
    (0.5 * penalty(model)).backward()
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    gradients["conv_in.bias"] = gradients["conv_in.bias"] - data
    assert relative(flat(gradients.values()), 0.5 * expected) < 1e-6


@pytest.mark.parametrize("kind", PENALTIES)
def test_lambda_scales_the_penalty(tasks, losses, kind):
    model = moved(tasks[0][0], 0.05, seed=10)
    values = [consolidated(kind, ewc_lambda, tasks[:2], losses)(model).item() for ewc_lambda in (3, 6.0)]
    assert values[1] == pytest.approx(2 * values[0], rel=1e-6)


@pytest.mark.parametrize("ewc_lambda", [0, -1.0, math.inf, math.nan, "Auto", "1"])
@pytest.mark.parametrize("kind", PENALTIES)
def test_impossible_lambda_is_an_error(kind, ewc_lambda):
    with pytest.raises(ValueError, match="ewc_lambda is .* positive numbers and 'auto'"):
        kind(ewc_lambda)


@pytest.mark.parametrize("kind", PENALTIES)
def test_penalty_is_the_same_under_autocast(tasks, losses, kind):
    # A plain script computes `loss + penalty(unet)` inside `torch.autocast`. In bfloat16 v . theta would be off by
    # 4e-3 of itself, which 15000 multiplies.
    penalty = consolidated(kind, 15_000.0, tasks, losses)
    model = moved(tasks[-1][0], 0.01, seed=10)
    value, gradient = value_and_gradient(penalty, model)
    with torch.autocast("cpu", torch.bfloat16):
        cast_value = penalty(model)
    assert cast_value.dtype == torch.float32
    assert cast_value.item() == pytest.approx(value, rel=1e-5)
    cast_gradient = flat(torch.autograd.grad(cast_value, list(model.parameters())))
    assert relative(cast_gradient, gradient) < 1e-5


@pytest.mark.parametrize("kind", PENALTIES)
def test_models_in_another_precision(tasks, losses, kind):
    penalty = consolidated(kind, 15_000.0, tasks, losses)
    model = moved(tasks[-1][0], 0.05, seed=10)
    value, gradient = value_and_gradient(penalty, model)
    other_value, other_gradient = value_and_gradient(penalty, copy.deepcopy(model).double())
    # v . theta - b is 1e-3 here, its rounding in float32 1e-8 or more.
    assert other_value == pytest.approx(value, rel=1e-4)
    assert relative(other_gradient, gradient) < 1e-4


@pytest.mark.parametrize("kind", PENALTIES)
def test_models_with_a_scalar_parameter(kind):
    class Scaled(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([1.0, -2.0]))
            self.scale = torch.nn.Parameter(torch.tensor(2.0))

        def forward(self, rows):
            return self.scale * (rows @ self.weight)

    model = Scaled()
    penalty = kind(1.0)
    penalty.consolidate(model, lambda m, b: (m(b[0]) - b[1]).square(), [(torch.eye(2), torch.ones(2))])
    assert penalty(model).item() == pytest.approx(0, abs=1e-10)
    penalty.step(model, 1.0)


# What is kept


def test_rank1_keeps_one_vector_a_task_and_no_anchor(tasks, losses):
    num_parameters = len(weights(tasks[0][0]))
    penalty = Rank1EWC()
    for number, (model, batches) in enumerate(tasks, start=1):
        penalty.consolidate(model, losses, batches)
        state = penalty.state_dict()
        vectors = {key: tensor for key, tensor in state.items() if not key.startswith("statistics.")}
        assert all(key.startswith("direction.") and tensor.dtype == torch.float32 for key, tensor in vectors.items())
        assert sum(tensor.numel() for tensor in vectors.values()) == number * num_parameters
        scalars = [tensor for key, tensor in state.items() if key.startswith("statistics.")]
        assert all(tensor.shape == (number,) and tensor.dtype == torch.float64 for tensor in scalars)
        assert len(scalars) < 15


def test_diagonal_keeps_two_vectors_whatever_the_number_of_tasks(tasks, losses):
    num_parameters = len(weights(tasks[0][0]))
    penalty = DiagonalEWC()
    for number, (model, batches) in enumerate(tasks, start=1):
        penalty.consolidate(model, losses, batches)
        state = penalty.state_dict()
        vectors = {key: tensor for key, tensor in state.items() if not key.startswith("statistics.")}
        assert sum(tensor.numel() for tensor in vectors.values()) == 2 * num_parameters
        assert all(tensor.dtype == torch.float32 for tensor in vectors.values())
        assert penalty.num_tasks == number
        assert penalty.statistics["constant"][-1] >= 0


def test_rank1_reports_what_was_measured(tasks, losses):
    (model, batches), (second_model, _), _ = tasks
    penalty = Rank1EWC(1.0)
    fisher = penalty.consolidate(model, losses, batches)
    penalty.consolidate(second_model, losses, batches, diagnostics=False)
    first, second = penalty.summary()
    expected = rank1_fisher(model, losses, batches)
    for name in ("second_moment", "curvature", "curvature_check", "mean_gradient_norm", "num_samples", "trace"):
        assert first[name] == getattr(expected, name) == getattr(fisher, name), name
    assert first["num_samples"] == first["trace_num_samples"] == 9
    # Both in float64.
    assert first["offset"] == pytest.approx((flat(fisher.direction.values()) @ weights(model)).item(), abs=1e-12)
    assert first["signal_ratio"] == pytest.approx(9 * fisher.mean_gradient_norm**2 / fisher.trace, rel=1e-12)
    assert first["direction_share"] == pytest.approx(fisher.second_moment / fisher.trace, rel=1e-12)
    for name in ("curvature", "curvature_check", "trace", "signal_ratio", "direction_share"):
        assert second[name] is None, name
    assert second["second_moment"] > 0


def test_diagonal_reports_what_was_measured(tasks, losses):
    (model, batches), _, _ = tasks
    penalty = DiagonalEWC(1.0)
    fisher = penalty.consolidate(model, losses, batches)
    penalty.consolidate(model, losses, batches, diagnostics=False)
    first, second = penalty.summary()
    assert first["num_samples"] == second["num_samples"] == 9
    assert first["trace"] == pytest.approx(flat(fisher.values()).sum().item(), rel=1e-6)
    assert first["curvature"] is None and second["trace"] is None


@pytest.mark.parametrize("kind", PENALTIES)
def test_consolidate_leaves_model_and_random_state_alone(small_denoiser, make_batches, losses, kind):
    model = small_denoiser.train()
    before, state = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    consolidated(kind, "auto", [(model, make_batches([4]))], losses)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("ewc_lambda", [15_000.0, "auto"])
@pytest.mark.parametrize("kind", PENALTIES)
def test_two_processes_consolidate_what_one_does(tasks, losses, in_two_processes, kind, ewc_lambda):
    alone = consolidated(kind, ewc_lambda, tasks[:1], losses)
    model, (first_shard, second_shard) = tasks[0]

    def consolidate(rank, reduce):
        penalty = kind(ewc_lambda)
        penalty.consolidate(model, losses, [(first_shard, second_shard)[rank]], reduce=reduce)
        return penalty

    first, second = (penalty.state_dict() for penalty in in_two_processes(consolidate))
    assert first.keys() == second.keys() == alone.state_dict().keys()
    for name, expected in alone.state_dict().items():
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, equal_nan=True)
        # Another order of summation; curvatures magnify it (test_fisher), and scale the diagonal under `auto`.
        torch.testing.assert_close(first[name], expected, rtol=1e-3, atol=1e-7, equal_nan=True)


# The decoupled step


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


# auto


def test_auto_rank1_is_the_laplace_term(small_denoiser, make_batches, losses):
    batches = make_batches([9, 7])
    penalty = Rank1EWC("auto")
    # The curvature is measured without diagnostics too: auto needs it.
    fisher = penalty.consolidate(small_denoiser, losses, batches, diagnostics=False)
    (kappa, _) = curvature_along(small_denoiser, losses, batches, fisher.direction)
    assert kappa > 0 and fisher.trace is None
    assert penalty.strengths() == [kappa]
    # kappa / 2 e^2 at a distance e, with no knob.
    value = penalty(moved_along(small_denoiser, fisher.direction, 0.5)).item()
    assert value == pytest.approx(0.125 * kappa, rel=1e-4)
    # The decoupled step takes the same strength.
    model = moved_along(small_denoiser, fisher.direction, 0.5)
    penalty.step(model, 0.1)
    along = flat(fisher.direction.values()) @ (weights(model) - weights(small_denoiser))
    assert along.item() == pytest.approx(0.5 / (1 + 0.1 * kappa), rel=1e-4)


def test_auto_diagonal_has_the_measured_curvature_along_v(small_denoiser, make_batches, losses):
    batches = make_batches([9, 7])
    penalty = DiagonalEWC("auto")
    fisher = penalty.consolidate(small_denoiser, losses, batches)
    unscaled, _ = diagonal_fisher(small_denoiser, losses, batches)
    direction = rank1_fisher(small_denoiser, losses, batches).direction
    kappa = curvature_along(small_denoiser, losses, batches, direction)[0]
    assert kappa > 0 and penalty.summary()[0]["curvature"] == pytest.approx(kappa, rel=1e-3)
    along = sum((fisher[name].double() * v.double().square()).sum() for name, v in direction.items()).item()
    # The curvature is of float32 losses, over a step length squared of 1e-4.
    assert along == pytest.approx(kappa, rel=1e-3)
    # Scaled as a whole: the shape is the Fisher's.
    scale = along / sum((unscaled[name].double() * v.double().square()).sum() for name, v in direction.items()).item()
    assert relative(flat(fisher.values()), scale * flat(unscaled.values())) < 1e-5
    # kappa / 2 e^2 at a distance e along v, and no factor of 15000.
    value = penalty(moved_along(small_denoiser, direction, 0.5)).item()
    assert value == pytest.approx(0.125 * kappa, rel=1e-3)


@pytest.mark.parametrize("kind", PENALTIES)
def test_auto_is_clamped_where_the_loss_curves_down(kind):
    model = torch.nn.Linear(3, 1, bias=False)
    torch.nn.init.ones_(model.weight)
    batches = [(torch.eye(3), torch.zeros(3))]
    penalty = kind("auto")
    penalty.consolidate(model, lambda m, b: b[1] - m(b[0])[:, 0].square(), batches)
    # -mean(theta_j^2) has the Hessian -2/3.
    assert penalty.summary()[0]["curvature"] == pytest.approx(-2 / 3, rel=1e-2)
    torch.nn.init.zeros_(model.weight)
    value, gradient = value_and_gradient(penalty, model)
    assert value == 0 and not gradient.any()
    penalty.step(model, 1.0)
    assert not model.weight.any()


def test_auto_refuses_a_state_without_curvature(tasks, losses):
    # Consolidated with a number and without diagnostics: under auto its strength is unknown, not 0.
    state = consolidated(Rank1EWC, 15_000.0, tasks[:1], losses, diagnostics=False).state_dict()
    penalty = Rank1EWC("auto")
    with pytest.raises(ValueError, match="curvature"):
        penalty.load_state_dict(state)
        penalty(tasks[0][0])


class Redrawn:
    """As many draws every time, but others."""

    def __init__(self, make_batches):
        self.make_batches, self.passes = make_batches, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.make_batches([4], seed=self.passes))


@pytest.mark.parametrize("kind", PENALTIES)
def test_other_draws_in_a_later_pass_are_an_error(small_denoiser, make_batches, losses, kind):
    # Both take several passes under auto, and their parts belong together only if the draws are the same.
    with pytest.raises(ValueError, match="other draws"):
        kind("auto").consolidate(small_denoiser, losses, Redrawn(make_batches))


@pytest.mark.parametrize("kind", PENALTIES)
def test_no_direction_under_auto_is_an_error(kind):
    # There is no v to measure the curvature along.
    model = torch.nn.Linear(3, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    with pytest.raises(ValueError, match="mean gradient is zero"):
        kind("auto").consolidate(model, lambda m, b: (m(b[0])[:, 0] - b[1]).square(), [(torch.eye(3), torch.zeros(3))])


@pytest.mark.parametrize("kind", PENALTIES)
def test_a_failed_consolidation_leaves_the_state_as_it_was(tasks, losses, kind):
    penalty = consolidated(kind, 1.0, tasks[:1], losses)
    before = {name: tensor.clone() for name, tensor in penalty.state_dict().items()}
    for batches, error in (([], ValueError), (tasks[1][1], FloatingPointError)):
        with pytest.raises(error):
            penalty.consolidate(tasks[1][0], lambda m, b: losses(m, b) / 0, batches)
        assert penalty.num_tasks == 1 and penalty.state_dict().keys() == before.keys()
        for name, tensor in penalty.state_dict().items():
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


# Saving and loading


def assert_equal_states(first, second) -> None:
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("ewc_lambda", [0.1, "auto"])
@pytest.mark.parametrize("kind", PENALTIES)
def test_round_trips_are_bit_equal_and_go_on(tmp_path, tasks, losses, kind, ewc_lambda):
    penalty = consolidated(kind, ewc_lambda, tasks[:2], losses)
    penalty.save_pretrained(tmp_path / "consolidation")
    assert [path.name for path in (tmp_path / "consolidation").iterdir()] == ["ewc.safetensors"]
    with safe_open(tmp_path / "consolidation" / "ewc.safetensors", framework="pt") as file:
        assert file.metadata()["penalty"] == kind.kind
    from_file = kind.from_pretrained(tmp_path / "consolidation")
    from_dict = kind(ewc_lambda)
    from_dict.load_state_dict(penalty.state_dict())
    model = moved(tasks[1][0], 0.05, seed=10)
    value, gradient = value_and_gradient(penalty, model)
    for other in (from_file, from_dict):
        assert type(other) is kind and other.ewc_lambda == ewc_lambda and other.num_tasks == 2
        assert_equal_states(other, penalty)
        assert other.summary() == penalty.summary()
        other_value, other_gradient = value_and_gradient(other, model)
        assert other_value == value and torch.equal(other_gradient, gradient)
    # The third task after loading is the third task without saving.
    for other in (penalty, from_file, from_dict):
        other.consolidate(tasks[2][0], losses, tasks[2][1])
    assert_equal_states(from_file, penalty)
    assert_equal_states(from_dict, penalty)


@pytest.mark.parametrize("kind", PENALTIES)
def test_summary_is_in_the_same_order_after_loading(tmp_path, tasks, losses, kind):
    # metrics.json holds it: a run that was continued should leave the same bytes.
    penalty = consolidated(kind, 1.0, tasks[:1], losses)
    penalty.save_pretrained(tmp_path)
    assert list(kind.from_pretrained(tmp_path).summary()[0]) == list(penalty.summary()[0])


def test_loading_replaces_the_state(tasks, losses):
    penalty = consolidated(Rank1EWC, 1.0, tasks, losses)
    one_task = consolidated(Rank1EWC, 1.0, tasks[:1], losses)
    penalty.load_state_dict(one_task.state_dict())
    assert_equal_states(penalty, one_task)
    penalty.load_state_dict(Rank1EWC().state_dict())
    assert penalty.num_tasks == 0 and penalty(tasks[0][0]).item() == 0


def test_wrong_kind_of_file_is_an_error(tmp_path, tasks, losses):
    consolidated(Rank1EWC, 1.0, tasks[:1], losses).save_pretrained(tmp_path / "rank1")
    consolidated(DiagonalEWC, 1.0, tasks[:1], losses).save_pretrained(tmp_path / "diagonal")
    with pytest.raises(ValueError, match="holds penalty 'rank1_ewc', not 'ewc'"):
        DiagonalEWC.from_pretrained(tmp_path / "rank1")
    with pytest.raises(ValueError, match="holds the penalty 'ewc', not 'rank1_ewc'"):
        Rank1EWC.from_pretrained(tmp_path / "diagonal")


@pytest.mark.parametrize(("kind", "other"), [PENALTIES, PENALTIES[::-1]])
def test_wrong_kind_of_state_is_an_error(tasks, losses, kind, other):
    state = consolidated(other, 1.0, tasks[:1], losses).state_dict()
    with pytest.raises(ValueError):
        penalty = kind(1.0)
        penalty.load_state_dict(state)
        penalty(tasks[0][0])


@pytest.mark.parametrize("kind", PENALTIES)
def test_other_parameters_are_an_error(tasks, losses, kind):
    model, batches = tasks[0]
    penalty = consolidated(kind, 1.0, tasks[:1], losses)

    renamed = copy.deepcopy(model)
    renamed.another = torch.nn.Linear(2, 2)
    frozen = copy.deepcopy(model)
    frozen.mix.requires_grad_(False)
    wider = type(model)(channels=8)
    for other, message in ((renamed, "another"), (frozen, "mix"), (wider, "conv_in.weight is .* in the state")):
        for use in (penalty, lambda m: penalty.step(m, 1.0), lambda m: penalty.consolidate(m, losses, batches)):
            with pytest.raises(ValueError, match=f"{kind.__name__}: .*{message}"):
                use(other)
    assert penalty.num_tasks == 1


# In someone's script


@pytest.mark.parametrize("mode", ["loss", "decoupled"])
@pytest.mark.parametrize("kind", PENALTIES)
def test_penalty_in_a_plain_training_loop(tiny_unet, make_batches, losses, kind, mode):
    old, new = make_batches([6], seed=1, classes=(0, 1)), make_batches([6], seed=2, classes=(2, 3))
    penalty = kind(ewc_lambda=15_000.0)
    penalty.consolidate(tiny_unet, losses, old)

    def train(model, use_penalty: bool) -> tuple[float, float]:
        """Adam on the new task alone; what the penalty and the new task's loss are in the end."""
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(10):
            loss = losses(model, new[0]).mean()
            if use_penalty and mode == "loss":
                loss = loss + penalty(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if use_penalty and mode == "decoupled":
                penalty.step(model, 1e-3)
        return penalty(model).item(), losses(model, new[0]).mean().item()

    before = losses(tiny_unet, new[0]).mean().item()
    free, _ = train(copy.deepcopy(tiny_unet), use_penalty=False)
    held, learned = train(copy.deepcopy(tiny_unet), use_penalty=True)
    assert free > 1
    assert held < 0.5 * free
    # The new task is learned all the same.
    assert learned < before


SCRIPT = """
import sys

import torch

from diffusers_cl import DiagonalEWC, Rank1EWC

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
batches = [(torch.randn(6, 4), torch.randn(6, 1)) for _ in range(2)]


def losses(model, batch):
    return (model(batch[0]) - batch[1]).square().mean(dim=1)


penalty = Rank1EWC(ewc_lambda=15_000.0)
loss = losses(model, batches[0]).mean()
loss = loss + penalty(model)
loss.backward()
penalty.consolidate(model, losses, batches, diagnostics=False)
penalty.save_pretrained(sys.argv[1])
assert Rank1EWC.from_pretrained(sys.argv[1]).num_tasks == 1
assert DiagonalEWC().num_tasks == 0
print(*sorted({name for name in sys.modules if name.startswith("diffusers_cl")}))
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


def test_penalties_need_torch_and_safetensors_only(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path],
        cwd=Path(diffusers_cl.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    ours, all_modules = map(str.split, result.stdout.splitlines())
    assert ours == ["diffusers_cl", "diffusers_cl.ewc", "diffusers_cl.fisher"]
    # What else the project depends on was not imported, by us or by what we import.
    others = {"accelerate", "datasets", "diffusers", "huggingface_hub", "jsonargparse", "matplotlib", "scipy"}
    assert not others & set(all_modules)


def test_public_arguments_are_those_of_the_design():
    for kind in PENALTIES:
        assert list(inspect.signature(kind).parameters) == ["ewc_lambda"]
        assert list(inspect.signature(kind.step).parameters) == ["self", "model", "lr"]
        assert list(inspect.signature(kind.consolidate).parameters)[:5] == [
            "self",
            "model",
            "losses",
            "batches",
            "reduce",
        ]
