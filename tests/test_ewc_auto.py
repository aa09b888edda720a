"""`ewc_lambda: auto`: both penalties have the measured curvature, and what stands in the way of measuring it."""

import pytest
import torch
from estimate_helpers import PENALTIES, Redrawn, consolidated, flat, moved_along, relative, value_and_gradient, weights

from diffusers_cl import DiagonalEWC, Rank1EWC
from diffusers_cl.along import curvature_along
from diffusers_cl.fisher import diagonal_fisher, rank1_fisher


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
def test_a_multiple_of_auto(small_denoiser, make_batches, losses, kind, tmp_path):
    batches = make_batches([9, 7])
    single, tenfold = kind("auto"), kind("10xauto")
    for penalty in (single, tenfold):
        penalty.consolidate(small_denoiser, losses, batches)
    direction = rank1_fisher(small_denoiser, losses, batches).direction
    moved = moved_along(small_denoiser, direction, 0.5)
    assert tenfold(moved).item() == pytest.approx(10 * single(moved).item(), rel=1e-6) and single(moved) > 0
    # The state has the measured curvature, the factor is the setting's: a later run may choose another.
    tenfold.save_pretrained(tmp_path)
    loaded = kind.from_pretrained(tmp_path)
    assert loaded.ewc_lambda == "10xauto" and loaded(moved) == tenfold(moved)
    single.load_state_dict(tenfold.state_dict())
    assert tenfold(moved).item() == pytest.approx(10 * single(moved).item(), rel=1e-6)


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
