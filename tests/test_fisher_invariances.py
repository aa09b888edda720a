"""What the Fisher does not depend on: batch and chunk sizes, processes, modes, precision settings; and leaves alone."""

import copy

import pytest
import torch
from estimate_helpers import GRADIENT_RTOL, MOMENT_RTOL, by_name, flat, num_parameters, relative

from diffusers_cl.along import curvature_along
from diffusers_cl.fisher import diagonal_fisher, gradient_trace, mean_gradient, rank1_fisher


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
    # Cut into other batches it agrees to 1e-3 only (above): processes share out whole ones.
    assert first.curvature == pytest.approx(alone.curvature, rel=1e-5)

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
