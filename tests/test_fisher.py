"""The empirical Fisher, rank-1 and diagonal, against one backward pass a row, dense matrices and exact curvatures."""

import copy
import warnings

import pytest
import torch
from estimate_helpers import GRADIENT_RTOL, MOMENT_RTOL, by_name, flat, relative
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_cl.along import curvature_along, projections
from diffusers_cl.fisher import diagonal_fisher, gradient_trace, per_sample_gradients, rank1_fisher


class Quadratic(torch.nn.Module):
    """`losses` below are quadratic in its only parameter, with the Hessian `2 sign mean(a a^T)`."""

    def __init__(self, size: int = 6):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.randn(size, generator=torch.Generator().manual_seed(1)))

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        return rows @ self.weight

    @staticmethod
    def losses(model, batch, sign: float = 1.0) -> torch.Tensor:
        return sign * (model(batch[0]) - batch[1]).square()

    @staticmethod
    def batches(sizes=(5, 5, 2), size: int = 6) -> list[tuple[torch.Tensor, torch.Tensor]]:
        generator = torch.Generator().manual_seed(2)
        rows = torch.randn(sum(sizes), size, generator=generator), torch.randn(sum(sizes), generator=generator)
        return list(zip(*(tensor.split(list(sizes)) for tensor in rows), strict=True))


# Per-sample gradients and projections


def test_per_sample_gradients_equal_a_loop(tiny_unet, make_batches, losses, gradient_loop):
    batches = make_batches([5])
    gradients = per_sample_gradients(tiny_unet, losses, batches[0])
    expected = gradient_loop(tiny_unet, losses, batches)
    assert gradients.keys() == dict(tiny_unet.named_parameters()).keys()
    assert all(gradients[name].shape == (5, *p.shape) for name, p in tiny_unet.named_parameters())
    for row in range(5):
        actual = flat({name: tensor[row] for name, tensor in gradients.items()})
        assert relative(actual, expected[row]) < GRADIENT_RTOL


def test_projections_equal_a_loop(tiny_unet, make_batches, losses, gradient_loop):
    batches = make_batches([5])
    expected = gradient_loop(tiny_unet, losses, batches)
    v = torch.randn(expected.shape[1], generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    v = v / v.norm()
    projected = projections(tiny_unet, losses, batches[0], by_name(v, tiny_unet))
    assert projected.shape == (5,)
    # v is random, so |v . g| is 1/200 of |g| or so: the float32 error is one of |g|.
    assert ((projected.double() - expected @ v).abs() < GRADIENT_RTOL * expected.norm(dim=1)).all()


# Rank-1


def test_rank1_equals_the_papers_formula(tiny_unet, make_batches, losses, gradient_loop):
    batches = make_batches([5, 5, 2])
    fisher = rank1_fisher(tiny_unet, losses, batches)
    gradients = gradient_loop(tiny_unet, losses, batches)
    mu = gradients.mean(dim=0)
    assert fisher.num_samples == 12
    assert fisher.mean_gradient_norm == pytest.approx(mu.norm().item(), rel=GRADIENT_RTOL)
    assert relative(flat(fisher.direction), mu / mu.norm()) < GRADIENT_RTOL
    assert all(tensor.dtype == torch.float32 for tensor in fisher.direction.values())
    v = mu / mu.norm()
    assert fisher.second_moment == pytest.approx((gradients @ v).square().mean().item(), rel=MOMENT_RTOL)
    # arXiv 2509.23593, Sec. 3.3: c* = E[(mu . g)^2] / |mu|^4.
    c_star = ((gradients @ mu).square().mean() / mu.norm() ** 4).item()
    assert fisher.second_moment / fisher.mean_gradient_norm**2 == pytest.approx(c_star, rel=MOMENT_RTOL)


def test_second_moment_diagonal_and_trace_belong_to_the_dense_fisher(
    small_denoiser, make_batches, losses, gradient_loop
):
    batches = make_batches([5, 5, 2])
    gradients = gradient_loop(small_denoiser, losses, batches)
    dense = gradients.T @ gradients / 12
    fisher = rank1_fisher(small_denoiser, losses, batches)
    v = flat(fisher.direction)
    assert fisher.second_moment == pytest.approx((v @ dense @ v).item(), rel=MOMENT_RTOL)
    # A Rayleigh quotient is at most the largest eigenvalue, which is also the Gram matrix's.
    assert fisher.second_moment < torch.linalg.eigvalsh(gradients @ gradients.T / 12)[-1] * (1 + MOMENT_RTOL)
    assert fisher.trace == pytest.approx(dense.trace().item(), rel=MOMENT_RTOL)
    assert fisher.trace_num_samples == 12
    diagonal, num_samples = diagonal_fisher(small_denoiser, losses, batches)
    assert num_samples == 12
    assert relative(flat(diagonal), dense.diagonal()) < MOMENT_RTOL


def test_tiny_gradients_do_not_underflow(tiny_unet, make_batches, losses):
    # The gradients are of length 1e-11: |mu|^4 = 1e-44 is 0 in float32, the normalised form has no such power.
    batches = make_batches([6])
    fisher = rank1_fisher(tiny_unet, losses, batches, diagnostics=False, curvature=False)
    scaled = rank1_fisher(tiny_unet, lambda m, b: 1e-11 * losses(m, b), batches, diagnostics=False, curvature=False)
    assert relative(flat(scaled.direction), flat(fisher.direction)) < GRADIENT_RTOL
    assert scaled.second_moment == pytest.approx(1e-22 * fisher.second_moment, rel=MOMENT_RTOL, abs=0)


def test_options_say_what_is_measured(tiny_unet, make_batches, losses):
    batches = make_batches([4])
    neither = rank1_fisher(tiny_unet, losses, batches, diagnostics=False, curvature=False)
    assert (neither.trace, neither.trace_num_samples) == (None, 0)
    assert (neither.curvature, neither.curvature_check) == (None, None)
    both = rank1_fisher(tiny_unet, losses, batches)
    expected = curvature_along(tiny_unet, losses, batches, both.direction)
    assert [both.curvature, both.curvature_check] == expected
    assert both.second_moment == neither.second_moment


def test_parameters_that_are_not_trained_are_left_out(tiny_unet, make_batches, losses, gradient_loop):
    tiny_unet.conv_in.requires_grad_(False)
    batches = make_batches([5])
    names = {name for name, _ in tiny_unet.named_parameters() if not name.startswith("conv_in")}
    fisher = rank1_fisher(tiny_unet, losses, batches, diagnostics=False, curvature=False)
    diagonal, _ = diagonal_fisher(tiny_unet, losses, batches)
    assert fisher.direction.keys() == diagonal.keys() == names
    mu = gradient_loop(tiny_unet, losses, batches).mean(dim=0)
    assert fisher.mean_gradient_norm == pytest.approx(mu.norm().item(), rel=GRADIENT_RTOL)


# Diagonal and trace


def test_diagonal_equals_a_loop(tiny_unet, make_batches, losses, gradient_loop):
    batches = make_batches([5, 5, 2])
    diagonal, num_samples = diagonal_fisher(tiny_unet, losses, batches)
    expected = gradient_loop(tiny_unet, losses, batches).square().mean(dim=0)
    assert num_samples == 12
    assert all(tensor.dtype == torch.float32 for tensor in diagonal.values())
    assert relative(flat(diagonal), expected) < MOMENT_RTOL


def test_diagonal_of_more_rows_than_a_default_chunk(small_denoiser, make_batches, losses, gradient_loop):
    batches = make_batches([70])
    diagonal, num_samples = diagonal_fisher(small_denoiser, losses, batches)
    assert num_samples == 70
    expected = gradient_loop(small_denoiser, losses, batches).square().mean(dim=0)
    assert relative(flat(diagonal), expected) < MOMENT_RTOL


def test_trace_of_the_first_draws(tiny_unet, make_batches, losses, gradient_loop):
    batches = make_batches([5, 5, 2])
    gradients = gradient_loop(tiny_unet, losses, batches)
    for num_samples, expected in ((7, 7), (5, 5), (100, 12)):
        trace, count = gradient_trace(tiny_unet, losses, batches, num_samples)
        assert count == expected
        assert trace == pytest.approx(gradients[:expected].square().sum(dim=1).mean().item(), rel=MOMENT_RTOL)


def test_trace_stops_reading_draws(tiny_unet, make_batches, losses):
    def batches():
        yield from make_batches([5])
        raise AssertionError("a batch was drawn that is not used")

    assert gradient_trace(tiny_unet, losses, batches(), num_samples=5)[1] == 5


def test_default_number_of_draws_for_the_trace(make_batches):
    model, batches = Quadratic(), Quadratic.batches((100, 100))
    assert gradient_trace(model, Quadratic.losses, batches)[1] == 128
    assert rank1_fisher(model, Quadratic.losses, batches).trace_num_samples == 128


# Curvature


def test_curvature_of_a_quadratic_is_exact():
    model, batches = Quadratic().double(), [tuple(t.double() for t in batch) for batch in Quadratic.batches()]
    rows = torch.cat([batch[0] for batch in batches])
    v = torch.randn(6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    v = v / v.norm()
    expected = 2 * (rows @ v).square().mean().item()
    # In float64 the rounding of the loss over the step length squared is 1e-12; a quadratic has no other error. The
    # mean is over draws: over the three unequal batches it would be another number.
    curvatures = curvature_along(model, Quadratic.losses, batches, {"weight": v}, steps=(0.01, 0.03, 1.0))
    assert curvatures == pytest.approx([expected] * 3, rel=1e-9)
    # Not clamped: here theta is a maximum along v.
    curvatures = curvature_along(model, lambda m, b: Quadratic.losses(m, b, -1.0), batches, {"weight": v})
    assert curvatures == pytest.approx([-expected] * 2, rel=1e-9)


def test_curvature_equals_a_hessian_vector_product(tiny_unet, make_batches, losses):
    batches = make_batches([5, 3])
    fisher = rank1_fisher(tiny_unet, losses, batches, diagnostics=False)
    # Double backward in float64: the exact second derivative.
    reference = copy.deepcopy(tiny_unet).double()
    parameters = list(reference.parameters())
    direction = [fisher.direction[name].double() for name, _ in reference.named_parameters()]
    with sdpa_kernel(SDPBackend.MATH):
        loss = torch.cat(
            [losses(reference, (x.double(), t, y, target.double())) for x, t, y, target in batches]
        ).mean()
        gradients = torch.autograd.grad(loss, parameters, create_graph=True)
        slope = sum((g * v).sum() for g, v in zip(gradients, direction, strict=True))
        products = torch.autograd.grad(slope, parameters)
    expected = sum((hv * v).sum() for hv, v in zip(products, direction, strict=True)).item()
    # Fourth derivatives over step lengths of 0.01 and 0.03, and float32: 0.1 % and 0.5 % were seen.
    assert fisher.curvature == pytest.approx(expected, rel=0.01)
    assert fisher.curvature_check == pytest.approx(expected, rel=0.03)


class Wave(Quadratic):
    """A loss that bends back within the step lengths."""

    @staticmethod
    def losses(model, batch, frequency: float = 200.0) -> torch.Tensor:
        return 1 - torch.cos(frequency * (model(batch[0]) - batch[1]))


def test_curvature_that_depends_on_the_step_length_is_a_warning():
    with pytest.warns(UserWarning, match="depends on the step length"):
        rank1_fisher(Quadratic(), Wave.losses, Quadratic.batches(), diagnostics=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rank1_fisher(Quadratic(), Quadratic.losses, Quadratic.batches(), diagnostics=False)
