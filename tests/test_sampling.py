"""Sampled images: they do not depend on the processes that share them out, nor on what was kept of an interrupted run."""

import copy
import random
import shutil

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from process_helpers import in_processes
from torture_sampling import NUM_SHARDS, NUM_STEPS, KilledError, interrupted_sampling, sample_in

from diffusers_cl.errors import NonFiniteError, StorageError
from diffusers_cl.pipeline import ClassConditionalPipeline, to_uint8
from diffusers_cl.randomness import generator
from diffusers_cl.sampling import image_grid, sample_images


LABELS = [0, 3, 1, 1, 2, 0, 3]
KEYS = [("eval", label, index) for index, label in enumerate(LABELS)]


def sample(unet, labels=LABELS, keys=KEYS, seed=0, batch_size=2, **kwargs) -> torch.Tensor:
    pipeline = ClassConditionalPipeline(unet, DDIMScheduler())
    return sample_images(pipeline, labels, keys, seed, 3, batch_size, disable_progress_bar=True, **kwargs)


# Seven images in shards of 2 are 4 shards, of 3 are 3: with and without a process that idles in the last round.
@pytest.mark.parametrize("batch_size", [2, 3, 8])
@pytest.mark.parametrize("num_processes", [2, 3])
def test_images_are_bit_equal_for_any_number_of_processes(tiny_unet, num_processes, batch_size):
    alone = sample(tiny_unet, batch_size=batch_size)
    assert alone.shape == (7, 1, 8, 8) and alone.dtype == torch.uint8

    def work(rank, gather):
        sharing = {"process_index": rank, "num_processes": num_processes, "gather": gather}
        return sample(copy.deepcopy(tiny_unet), batch_size=batch_size, **sharing)

    for images in in_processes(num_processes, work):
        assert torch.equal(images, alone)


def test_images_are_the_pipelines(tiny_unet):
    pipeline = ClassConditionalPipeline(tiny_unet, DDIMScheduler())
    pipeline.set_progress_bar_config(disable=True)
    # The third shard: images 4 and 5. Its noise is a function of the seed and each image's key.
    latents = torch.stack([torch.randn(1, 8, 8, generator=generator(5, *key)) for key in KEYS[4:6]])
    expected = pipeline(LABELS[4:6], num_inference_steps=3, latents=latents, output_type="latent").images
    images = sample(tiny_unet, seed=5)
    assert torch.equal(images[4:6], to_uint8(expected))
    assert images.float().std() > 10


def test_an_image_depends_on_seed_key_and_label(tiny_unet):
    images = sample(tiny_unet)
    assert torch.equal(sample(tiny_unet), images)

    def differs(other):
        return (other != images).flatten(1).any(dim=1).tolist()

    assert differs(sample(tiny_unet, seed=1)) == [True] * 7
    keys = [*KEYS[:3], ("replay", 0, *KEYS[3][1:]), *KEYS[4:]]
    assert differs(sample(tiny_unet, keys=keys)) == [False] * 3 + [True] + [False] * 3
    labels = [*LABELS[:6], 2]
    assert differs(sample(tiny_unet, labels=labels)) == [False] * 6 + [True]


def test_another_batch_size_changes_images_by_rounding(tiny_unet):
    # Float32 sums in another order move a pixel that lies between two grey levels.
    difference = sample(tiny_unet).int() - sample(tiny_unet, batch_size=7).int()
    assert difference.abs().max() <= 1


def test_sampling_leaves_mode_gradients_and_global_random_states_alone(tiny_unet):
    tiny_unet.train()
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    images = sample(tiny_unet)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]
    assert all(module.training for module in tiny_unet.modules())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in tiny_unet.parameters())
    assert not images.requires_grad


# Shards on disk


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A folder with all shards in it, and their images."""
    folder = tmp_path_factory.mktemp("whole") / "shards"
    (images,), sampled = sample_in(1, folder=folder)
    assert sampled == NUM_SHARDS == len(list(folder.glob("*.safetensors")))
    assert torch.equal(images, sample_in(1)[0][0]) and images.float().std() > 10
    return folder, images


@pytest.mark.parametrize("num_processes", [1, 2, 3])
@pytest.mark.parametrize("lost", [[], [0], [1, 3], [0, 1, 2, 3]])
def test_only_shards_that_are_missing_are_sampled(whole, tmp_path, num_processes, lost):
    folder, expected = tmp_path / "shards", whole[1]
    shutil.copytree(whole[0], folder)
    for shard in lost:
        (folder / f"{shard:06d}.safetensors").unlink()
    images, sampled = sample_in(num_processes, folder=folder)
    assert sampled == len(lost)
    assert len(images) == num_processes and all(torch.equal(found, expected) for found in images)
    # What was sampled is kept for the next time.
    assert sample_in(num_processes, folder=folder)[1] == 0


@pytest.mark.parametrize("num_processes", [1, 2])
def test_a_kill_costs_no_more_than_the_round_it_strikes(whole, tmp_path, num_processes):
    # In the second step of the round after the first one.
    kill_after = NUM_STEPS * num_processes + 1
    with pytest.raises(KilledError):
        sample_in(num_processes, kill_after, folder=tmp_path / "shards")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) == num_processes
    images, sampled = sample_in(2, folder=tmp_path / "shards")
    assert sampled == NUM_SHARDS - num_processes
    assert all(torch.equal(found, whole[1]) for found in images)


def test_kills_and_damage_change_no_image(tmp_path):
    result = interrupted_sampling(tmp_path, 8)
    assert result["tried"] == result["equal"] == result["only_missing"] == 8 and not result["missed"]
    assert result["killed"] > 0 and result["damaged"] > 0


@pytest.mark.parametrize(
    "settings", [{"unet_seed": 1}, {"seed": 1}, {"num_inference_steps": 3}, {"batch_size": 2}], ids=str
)
def test_shards_of_something_else_are_thrown_away(whole, tmp_path, settings):
    folder = tmp_path / "shards"
    shutil.copytree(whole[0], folder)
    (folder / "000009.safetensors").write_bytes(b"of a longer list")
    (expected,), sampled = sample_in(1, **settings)
    images, again = sample_in(2, folder=folder, **settings)
    assert again == sampled and all(torch.equal(found, expected) for found in images)
    assert not (folder / "000009.safetensors").exists()


def test_shards_of_other_labels_keys_or_schedulers_are_not_taken(tiny_unet, tmp_path):
    before = sample(tiny_unet, folder=tmp_path)
    others = [
        sample(tiny_unet, labels=[1, *LABELS[1:]], folder=tmp_path),
        sample(tiny_unet, keys=[("replay", 0, 0), *KEYS[1:]], folder=tmp_path),
    ]
    scheduler = DDIMScheduler(clip_sample=False)
    pipeline = ClassConditionalPipeline(tiny_unet, scheduler)
    others.append(sample_images(pipeline, LABELS, KEYS, 0, 3, 2, disable_progress_bar=True, folder=tmp_path))
    assert not any(torch.equal(found, before) for found in others)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_what_is_not_finite_stops_all_processes_and_is_not_kept(tiny_unet, tmp_path, num_processes):
    broken = copy.deepcopy(tiny_unet)
    with torch.no_grad():
        # Of one class alone: images 2 and 3, which are all of the second shard.
        broken.class_embedding.weight[1] = float("nan")

    def work(rank, gather):
        sharing = {"process_index": rank, "num_processes": num_processes, "gather": gather, "folder": tmp_path}
        with pytest.raises(NonFiniteError) as error:
            sample(copy.deepcopy(broken), description="Task 3: evaluating", **sharing)
        return str(error.value)

    messages = in_processes(num_processes, work)
    assert messages == ["Task 3: evaluating: 2 image(s) are not finite, of the class ids 1"] * num_processes
    # With two processes both first shards are of one round, of which nothing is kept.
    kept = {path.name for path in tmp_path.glob("*.safetensors")}
    assert kept == ({"000000.safetensors"} if num_processes == 1 else set())


def test_overflow_is_not_finite_either(tiny_unet):
    with torch.no_grad():
        tiny_unet.conv_out.weight.fill_(float("inf"))
    with pytest.raises(NonFiniteError, match="class ids 0, 3"):
        sample(tiny_unet)


def test_a_folder_that_cannot_be_written_is_one_sentence(tiny_unet, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write .*file"):
        sample(tiny_unet, folder=tmp_path / "file" / "shards")


# Grids


def test_image_grid_is_in_rows_and_enlarged_without_interpolation():
    greys = torch.tensor([10, 50, 90, 130, 170, 210], dtype=torch.uint8)
    images = greys[:, None, None, None].repeat(1, 1, 8, 8)
    # The last pixel of every image is another.
    images[:, :, 7, 7] += 1
    grid = np.asarray(image_grid(images, columns=3).convert("L"))
    height, width = grid.shape
    for position, grey in enumerate(greys.tolist()):
        row, column = divmod(position, 3)
        assert grid[height * (2 * row + 1) // 4, width * (2 * column + 1) // 6] == grey
        # 8 pixels become 64, so one becomes a square of 8, whatever is between the images.
        assert (grid == grey).sum() == 64 * 64 - 8 * 8
        lines, columns = np.nonzero(grid == grey + 1)
        assert np.ptp(lines) == np.ptp(columns) == 7 and len(lines) == 64
    # Large ones are as they are, and keep their colours.
    colours = torch.zeros(2, 3, 100, 100, dtype=torch.uint8)
    colours[1] = torch.tensor([200, 100, 50])[:, None, None]
    grid = np.asarray(image_grid(colours, columns=2))
    assert (grid == [200, 100, 50]).all(axis=-1).sum() == 100 * 100
