"""The draws of an estimate: which it refuses, and those that the script hands to it."""

import math

import datasets
import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from estimate_helpers import Redrawn, by_name, num_parameters
from PIL import Image

from diffusers_cl import DiagonalEWC, Rank1EWC
from diffusers_cl.along import curvature_along
from diffusers_cl.controls import L2Penalty, RandomDirectionEWC
from diffusers_cl.data import ImageSplit
from diffusers_cl.draws import FisherBatches
from diffusers_cl.fisher import diagonal_fisher, gradient_trace, mean_gradient, rank1_fisher
from diffusers_cl.losses import denoising_losses
from diffusers_cl.lowrank import LowRankEWC
from diffusers_cl.passes import first_draws
from diffusers_cl.tasks import TaskImages


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


# Ten draws: four batches, the last of one.
@pytest.mark.parametrize("processes", [2, 3, 6])
def test_processes_share_out_whole_batches(task_images, processes):
    alone = [rows_of([batch]) for batch in draw(task_images, batch_size=3)]
    assert [len(rows) for rows in alone] == [3, 3, 3, 1]
    for rank in range(processes):
        shard = draw(task_images, batch_size=3, rank=rank, processes=processes)
        assert [rows_of([batch]) for batch in shard] == alone[rank::processes]


@pytest.mark.parametrize("num_samples", [1, 3, 5, 10, 99])
def test_first_draws_are_of_all_processes(task_images, num_samples):
    rows = rows_of(draw(task_images))
    batches = draw(task_images, batch_size=3)
    assert rows_of(batches.first(num_samples)) == rows[:num_samples] == rows_of(first_draws(batches, num_samples))
    assert rows_of(batches) == rows
    shards = [draw(task_images, batch_size=3, rank=rank, processes=2).first(num_samples) for rank in (0, 1)]
    whole = [rows_of([batch]) for batch in batches.first(num_samples)]
    assert [[rows_of([batch]) for batch in shard] for shard in shards] == [whole[0::2], whole[1::2]]


def test_first_draws_of_plain_batches_are_of_this_process(make_batches):
    batches = make_batches([5, 5, 2])
    for num_samples in (1, 5, 7, 12, 99):
        assert rows_of(first_draws(batches, num_samples)) == rows_of(batches)[:num_samples]


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


# Batches of three: two processes have two each. Of ten: the second process has none.
@pytest.mark.parametrize("batch_size", [3, 10])
@pytest.mark.parametrize("kind", [Rank1EWC, DiagonalEWC, LowRankEWC, L2Penalty, RandomDirectionEWC])
def test_two_processes_measure_what_one_does(task_images, small_denoiser, losses, in_two_processes, kind, batch_size):
    images = TaskImages(task_images.split, {"a": 0, "b": 3})

    def consolidate(rank=0, processes=1, **kwargs):
        penalty = kind("auto", 2) if kind is LowRankEWC else kind("auto")
        penalty.consolidate(
            small_denoiser, losses, draw(images, None, (0, 1000), batch_size, rank=rank, processes=processes), **kwargs
        )
        return penalty

    alone = consolidate().state_dict()
    both = in_two_processes(lambda rank, reduce: consolidate(rank, 2, reduce=reduce).state_dict(), max_rounds=12)
    # All that metrics.json has of it is in the state, by name `statistics.*`.
    for state in both:
        assert state.keys() == alone.keys()
        for name, tensor in state.items():
            torch.testing.assert_close(tensor, alone[name], rtol=1e-5, atol=1e-8, equal_nan=True)
            torch.testing.assert_close(tensor, both[0][name], rtol=0, atol=0, equal_nan=True)


def test_the_trace_is_of_the_first_draws_over_all_processes(task_images, small_denoiser, losses, in_two_processes):
    images = TaskImages(task_images.split, {"a": 0, "b": 3})
    alone = gradient_trace(small_denoiser, losses, draw(images, batch_size=3), num_samples=4)
    for trace, count in in_two_processes(
        lambda rank, reduce: gradient_trace(
            small_denoiser, losses, draw(images, batch_size=3, rank=rank, processes=2), num_samples=4, reduce=reduce
        )
    ):
        assert count == alone[1] == 4 and trace == pytest.approx(alone[0], rel=1e-12)
