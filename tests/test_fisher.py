"""The empirical Fisher, rank-1 and diagonal, against one backward pass a row, dense matrices and exact curvatures."""

import copy
import math
import warnings

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_cl.data import ImageSplit
from diffusers_cl.draws import FisherBatches
from diffusers_cl.fisher import (
    curvature_along,
    diagonal_fisher,
    gradient_trace,
    mean_gradient,
    per_sample_gradients,
    projections,
    rank1_fisher,
    trainable_parameters,
)
from diffusers_cl.losses import denoising_losses
from diffusers_cl.tasks import TaskImages


# Gradients of one float32 loss by two orders of the same operations: 1e-6 of the gradient's norm was seen.
GRADIENT_RTOL = 1e-5
# Means and squares of them: twice that, with room.
MOMENT_RTOL = 1e-4


def flat(named: dict[str, torch.Tensor]) -> torch.Tensor:
    """One float64 vector of what is held by parameter name."""
    return torch.cat([tensor.double().flatten() for tensor in named.values()])


def by_name(vector: torch.Tensor, model) -> dict[str, torch.Tensor]:
    """The inverse of [`flat`], float32."""
    parameters = trainable_parameters(model)
    parts = vector.split([parameter.numel() for parameter in parameters.values()])
    return {name: part.view_as(p).to(p.dtype) for (name, p), part in zip(parameters.items(), parts, strict=True)}


def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """The distance of two vectors in units of the expected one's length."""
    return ((actual - expected).norm() / expected.norm()).item()


class Redrawn:
    """As many draws every time, but others: what a data loader with noise in its `collate_fn` does."""

    def __init__(self, make_batches, sizes):
        self.make_batches, self.sizes, self.passes = make_batches, sizes, 0

    def __iter__(self):
        self.passes += 1
        return iter(self.make_batches(self.sizes, seed=self.passes))


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


# Invariances


@pytest.mark.parametrize("sizes", [[12], [1] * 12])
def test_estimates_do_not_depend_on_the_batch_size(tiny_unet, make_batches, losses, sizes):
    fisher = rank1_fisher(tiny_unet, losses, make_batches([5, 5, 2]))
    other = rank1_fisher(tiny_unet, losses, make_batches(sizes))
    assert relative(flat(other.direction), flat(fisher.direction)) < GRADIENT_RTOL
    assert other.mean_gradient_norm == pytest.approx(fisher.mean_gradient_norm, rel=GRADIENT_RTOL)
    assert other.second_moment == pytest.approx(fisher.second_moment, rel=MOMENT_RTOL)
    assert other.trace == pytest.approx(fisher.trace, rel=MOMENT_RTOL)
    assert (other.num_samples, other.trace_num_samples) == (12, 12)
    # Rounding of the loss, 1e-7, over the step length squared, 1e-4, is 1e-3 beside a curvature of about 5.
    assert other.curvature == pytest.approx(fisher.curvature, rel=1e-3)
    diagonal, other_diagonal = (diagonal_fisher(tiny_unet, losses, make_batches(s))[0] for s in ([5, 5, 2], sizes))
    assert relative(flat(other_diagonal), flat(diagonal)) < MOMENT_RTOL


def test_estimates_do_not_depend_on_the_chunk_size(tiny_unet, make_batches, losses):
    batches = make_batches([7, 5])
    diagonals = [flat(diagonal_fisher(tiny_unet, losses, batches, chunk_size=size)[0]) for size in (None, 1, 3)]
    traces = [gradient_trace(tiny_unet, losses, batches, 10, chunk_size=size) for size in (None, 1, 3)]
    for diagonal, (trace, count) in zip(diagonals, traces, strict=True):
        assert relative(diagonal, diagonals[0]) < MOMENT_RTOL
        assert (trace, count) == (pytest.approx(traces[0][0], rel=MOMENT_RTOL), 10)
    estimates = [rank1_fisher(tiny_unet, losses, batches, chunk_size=size) for size in (None, 1)]
    assert estimates[1].trace == pytest.approx(estimates[0].trace, rel=MOMENT_RTOL)


def test_chunk_size_bounds_the_rows_at_a_time(tiny_unet, make_batches, losses):
    calls = []

    def counting(model, batch):
        calls.append(batch)
        return losses(model, batch)

    # vmap calls the losses once a chunk: 3 + 3 + 1 and 3 + 2 rows.
    diagonal_fisher(tiny_unet, counting, make_batches([7, 5]), chunk_size=3)
    assert len(calls) == 5
    gradient_trace(tiny_unet, counting, make_batches([7, 5]), num_samples=8, chunk_size=3)
    assert len(calls) == 5 + 4


# The second process has fewer draws, or none (fewer images than processes).
@pytest.mark.parametrize("shards", [(slice(0, 2), slice(2, 3)), (slice(0, 3), slice(3, 3))])
def test_two_processes_estimate_what_one_does(tiny_unet, make_batches, losses, in_two_processes, shards):
    batches = make_batches([5, 4, 3])
    alone = rank1_fisher(tiny_unet, losses, batches)
    first, second = in_two_processes(
        lambda rank, reduce: rank1_fisher(tiny_unet, losses, batches[shards[rank]], reduce=reduce)
    )
    assert all(torch.equal(first.direction[name], second.direction[name]) for name in first.direction)
    assert vars(first) | {"direction": None} == vars(second) | {"direction": None}
    assert (first.num_samples, first.trace_num_samples) == (12, 12)
    # The same per-row numbers in another order of float64 summation, rounded to float32 once.
    assert relative(flat(first.direction), flat(alone.direction)) < 1e-6
    assert first.mean_gradient_norm == pytest.approx(alone.mean_gradient_norm, rel=1e-6)
    assert first.second_moment == pytest.approx(alone.second_moment, rel=1e-6)
    assert first.trace == pytest.approx(alone.trace, rel=1e-6)
    # The direction may differ in its last bit, and the loss's rounding is divided by the step length squared.
    assert first.curvature == pytest.approx(alone.curvature, rel=1e-3)

    diagonal, _ = diagonal_fisher(tiny_unet, losses, batches)
    (first, first_count), (second, second_count) = in_two_processes(
        lambda rank, reduce: diagonal_fisher(tiny_unet, losses, batches[shards[rank]], reduce=reduce)
    )
    assert first_count == second_count == 12
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert relative(flat(first), flat(diagonal)) < 1e-6


def estimates(model, losses, batches):
    """Calls everything that promises to restore what it changes."""
    rank1_fisher(model, losses, batches)
    diagonal_fisher(model, losses, batches)
    mean_gradient(model, losses, batches)
    gradient_trace(model, losses, batches)
    curvature_along(model, losses, batches, by_name(torch.ones(1).expand(num_parameters(model)), model))


def num_parameters(model) -> int:
    return sum(parameter.numel() for parameter in trainable_parameters(model).values())


@pytest.mark.parametrize("training", [True, False])
def test_mode_weights_and_gradients_are_left_as_they_were(small_denoiser, make_batches, losses, training):
    small_denoiser.train(training)
    before = copy.deepcopy(small_denoiser.state_dict())
    estimates(small_denoiser, losses, make_batches([4]))
    assert all(module.training is training for module in small_denoiser.modules())
    assert all(torch.equal(tensor, before[name]) for name, tensor in small_denoiser.state_dict().items())
    assert all(p.grad is None and p.requires_grad for p in small_denoiser.parameters())


def test_modules_in_another_mode_than_the_model_stay_in_it(small_denoiser, make_batches, losses):
    # Frozen normalisation or dropout in a model that trains: `model.train(training)` would switch it on.
    small_denoiser.train()
    small_denoiser.dropout.eval()
    rank1_fisher(small_denoiser, losses, make_batches([4]))
    assert small_denoiser.training and not small_denoiser.dropout.training


def test_everything_is_restored_after_an_error(small_denoiser, make_batches, losses):
    small_denoiser.train()
    before = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision

    def broken(model, batch):
        raise KeyError("broken")

    for estimate in (mean_gradient, diagonal_fisher, gradient_trace):
        with pytest.raises(KeyError, match="broken"):
            estimate(small_denoiser, broken, make_batches([4]))
        assert small_denoiser.training
        assert (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision) == before


def test_estimates_are_in_eval_mode(small_denoiser, make_batches, losses):
    # In train mode dropout would draw: another result every time, and an error inside vmap.
    batches = make_batches([4])
    evaluated = rank1_fisher(small_denoiser.eval(), losses, batches)
    trained = rank1_fisher(small_denoiser.train(), losses, batches)
    assert all(torch.equal(evaluated.direction[name], trained.direction[name]) for name in evaluated.direction)
    assert vars(evaluated) | {"direction": None} == vars(trained) | {"direction": None}
    diagonals = [diagonal_fisher(small_denoiser.train(mode), losses, batches)[0] for mode in (True, False)]
    assert all(torch.equal(diagonals[0][name], diagonals[1][name]) for name in diagonals[0])


def test_global_random_state_is_untouched(small_denoiser, make_batches, losses):
    before = torch.get_rng_state()
    estimates(small_denoiser.train(), losses, make_batches([4]))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.fixture
def tf32():
    """TF32 on, as `allow_tf32` does, and afterwards as it was."""
    matmul, conv = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = matmul.fp32_precision, conv.fp32_precision
    matmul.fp32_precision = conv.fp32_precision = "tf32"
    yield
    matmul.fp32_precision, conv.fp32_precision = before


def test_tf32_is_off_inside_and_restored(tf32, small_denoiser, make_batches, losses):
    seen = set()

    def looking(model, batch):
        seen.add((torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision))
        return losses(model, batch)

    estimates(small_denoiser, looking, make_batches([4]))
    assert seen == {("ieee", "ieee")}
    assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == "tf32"


def test_autocast_is_off_inside(tiny_unet, make_batches, losses):
    batches = make_batches([4])
    expected = rank1_fisher(tiny_unet, losses, batches)
    expected_diagonal, _ = diagonal_fisher(tiny_unet, losses, batches)
    with torch.autocast("cpu", torch.bfloat16):
        fisher = rank1_fisher(tiny_unet, losses, batches)
        diagonal, _ = diagonal_fisher(tiny_unet, losses, batches)
    assert all(torch.equal(fisher.direction[name], expected.direction[name]) for name in fisher.direction)
    assert vars(fisher) | {"direction": None} == vars(expected) | {"direction": None}
    assert all(torch.equal(diagonal[name], expected_diagonal[name]) for name in diagonal)


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


# Errors


@pytest.mark.parametrize("estimate", [rank1_fisher, diagonal_fisher, mean_gradient])
def test_no_draws_is_an_error(tiny_unet, losses, estimate):
    with pytest.raises(ValueError, match="the batches are empty"):
        estimate(tiny_unet, losses, [])


def test_a_generator_is_an_error(tiny_unet, make_batches, losses):
    # It is empty the second time: m would be 0 without a word.
    with pytest.raises(ValueError, match="other draws the second time"):
        rank1_fisher(tiny_unet, losses, (batch for batch in make_batches([4, 4])))


def test_other_draws_are_an_error(tiny_unet, make_batches, losses):
    with pytest.raises(ValueError, match="other draws the second time"):
        rank1_fisher(tiny_unet, losses, Redrawn(make_batches, [4, 4]))


def test_another_number_of_draws_is_an_error(small_denoiser, make_batches, losses):
    class Growing:
        """Once more each time, a row of zeros, which leaves every sum over the draws as it was."""

        def __init__(self):
            self.batches = make_batches([4])

        def __iter__(self):
            yield from self.batches
            self.batches.append(tuple(torch.zeros_like(tensor[:1]) for tensor in self.batches[0]))

    with pytest.raises(ValueError, match="other draws the second time .5 of 4."):
        rank1_fisher(small_denoiser, losses, Growing())


def test_zero_mean_gradient_is_an_error(small_denoiser, make_batches, losses):
    ((noisy_images, timesteps, class_labels, _),) = make_batches([4])
    exact = small_denoiser(noisy_images, timesteps, class_labels=class_labels).sample.detach()
    with pytest.raises(ValueError, match="mean gradient is zero"):
        rank1_fisher(small_denoiser, losses, [(noisy_images, timesteps, class_labels, exact)])


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_losses_that_are_not_finite_are_an_error(tiny_unet, make_batches, losses, value):
    batches = make_batches([4, 4])
    batches[1][3][0, 0, 0, 0] = value
    for estimate in (rank1_fisher, diagonal_fisher, mean_gradient):
        with pytest.raises(FloatingPointError, match="not finite"):
            estimate(tiny_unet, losses, batches)
    direction = by_name(torch.ones(1).expand(num_parameters(tiny_unet)), tiny_unet)
    with pytest.raises(FloatingPointError, match="not finite"):
        curvature_along(tiny_unet, losses, batches, direction)


# The script's draws


@pytest.fixture(scope="module")
def task_images() -> TaskImages:
    """Ten 8x8 images, image i of grey level i, of the classes 5 and 6."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    images = [Image.fromarray(np.full((8, 8), level, np.uint8)) for level in range(10)]
    labels = np.arange(10) % 2
    dataset = datasets.Dataset.from_dict({"image": images, "label": labels.tolist()}, features=features)
    dataset = dataset.cast_column("image", datasets.Image(decode=False))
    split = ImageSplit(dataset, "image", "train", labels, ["a", "b"], 8, "pad", 1, np.arange(10))
    return TaskImages(split, {"a": 5, "b": 6})


def draw(task_images, num_samples=None, timesteps=(0, 1000), batch_size=4, seed=0, task=0, rank=0, processes=1):
    return FisherBatches(
        task_images, DDIMScheduler(), num_samples, timesteps, batch_size, seed, task, "cpu", rank, processes
    )


def rows_of(batches) -> list[tuple]:
    """The draws as comparable rows, bit for bit."""
    return [
        tuple(tuple(column[row].flatten().tolist()) for column in batch)
        for batch in batches
        for row in range(len(batch[0]))
    ]


def test_draws_are_the_same_every_time_and_do_not_touch_the_global_random_state(task_images):
    before = torch.get_rng_state()
    batches = draw(task_images)
    assert rows_of(batches) == rows_of(batches)
    assert torch.equal(torch.get_rng_state(), before)


def test_draws_do_not_depend_on_batch_size_or_processes(task_images):
    rows = rows_of(draw(task_images))
    assert len(rows) == 10
    assert rows_of(draw(task_images, batch_size=10)) == rows
    shards = [rows_of(draw(task_images, batch_size=3, rank=rank, processes=3)) for rank in range(3)]
    assert [len(shard) for shard in shards] == [4, 3, 3]
    assert sorted(row for shard in shards for row in shard) == sorted(rows)


def clean(rows) -> list[tuple[int, int]]:
    """Grey levels and labels of draws, recovered from the noisy images and the noise (the target)."""
    scheduler, result = DDIMScheduler(), []
    for noisy_image, (timestep,), (label,), noise in rows:
        alpha_bar = scheduler.alphas_cumprod[timestep].item()
        # Any pixel. At t = 999 the image is 1/160 of what is noisy: 1e-5 of rounding, a grey level is 8e-3.
        image = (noisy_image[0] - math.sqrt(1 - alpha_bar) * noise[0]) / math.sqrt(alpha_bar)
        result.append((round((image + 1) * 127.5), label))
    return result


def test_every_image_is_drawn_once_and_more_draws_have_new_noise(task_images):
    rows = rows_of(draw(task_images, num_samples=20))
    expected = [(level, 5 + level % 2) for level in range(10)]
    assert sorted(clean(rows[:10])) == sorted(clean(rows[10:])) == expected
    assert len({row[3] for row in rows}) == 20
    assert rows_of(draw(task_images)) == rows[:10]


def test_fewer_draws_are_of_random_images(task_images):
    chosen = [clean(rows_of(draw(task_images, num_samples=5, seed=seed))) for seed in range(4)]
    assert all(len(set(images)) == 5 for images in chosen)
    # Five of ten by chance: four seeds with the same five have a probability of 1e-7.
    assert len({tuple(sorted(images)) for images in chosen}) > 1


def test_timesteps_are_uniform_over_the_band(task_images):
    timesteps = [
        row[1][0] for row in rows_of(draw(task_images, num_samples=400, timesteps=(667, 1000), batch_size=64))
    ]
    assert min(timesteps) >= 667 and max(timesteps) <= 999
    # 400 draws, standard deviation 96: the mean is within 5 standard errors of 833.
    assert abs(np.mean(timesteps) - 833) < 5 * 96.1 / 20
    assert min(timesteps) < 690 and max(timesteps) > 977


def test_draws_are_a_function_of_seed_and_task(task_images):
    rows = rows_of(draw(task_images))
    for options in ({"seed": 1}, {"task": 1}):
        others = rows_of(draw(task_images, **options))
        assert not {row[3] for row in others} & {row[3] for row in rows}
        assert clean(others) != clean(rows)


def test_script_draws_feed_the_estimate(task_images, tiny_unet):
    # Class ids 5 and 6 do not fit the tiny UNet's four rows.
    images = TaskImages(task_images.split, {"a": 0, "b": 3})
    fisher = rank1_fisher(tiny_unet, lambda model, batch: denoising_losses(model, *batch), draw(images))
    assert fisher.num_samples == 10 and fisher.second_moment > 0
