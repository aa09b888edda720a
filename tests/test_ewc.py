"""Both penalties, their values and gradients, against the explicit D x D quadratic form."""

import copy
import math

import pytest
import torch
from estimate_helpers import (
    NUM_TASKS,
    PENALTIES,
    consolidated,
    flat,
    moved,
    moved_along,
    relative,
    stream,
    value_and_gradient,
    weights,
)

from diffusers_cl import DiagonalEWC, Rank1EWC
from diffusers_cl.fisher import diagonal_fisher


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
        # Float32 gradients squared (1e-5 of their size, see GRADIENT_RTOL) on one side, float64 sums on the other.
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
    with pytest.raises(ValueError, match="ewc_lambda is .* positive numbers, 'auto' and multiples"):
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
