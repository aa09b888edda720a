"""The network of a run, and the images it samples: neither depends on what it should not depend on."""

import json
import random

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel

from diffusers_cl.config import TrainingConfig
from diffusers_cl.errors import ConfigError
from diffusers_cl.models import PAPER_UNET, create_unet, load_unet_config
from diffusers_cl.pipeline import ClassConditionalPipeline, to_uint8
from diffusers_cl.randomness import generator
from diffusers_cl.sampling import image_grid, sample_images


EMBEDDING = "class_embedding.weight"


@pytest.fixture
def build(tiny_model_config):
    """Returns a function of class names and options that creates the tiny network as the script does."""

    def create(class_names: list[str], channels: int = 1, **options) -> UNet2DModel:
        config = TrainingConfig(model_config_name_or_path=str(tiny_model_config), resolution=8, **options)
        return create_unet(
            load_unet_config(config), channels, {name: row for row, name in enumerate(class_names)}, config
        )

    return create


# The network


def test_other_weights_do_not_depend_on_the_classes(build):
    states = [
        build(names, **options).state_dict()
        for names, options in (
            (["cat", "dog"], {}),
            (["cat", "dog", "7", "bird", "fish"], {}),
            (["horse"], {}),
            (["cat", "dog"], {"num_class_embeds": 9}),
        )
    ]
    assert [len(state[EMBEDDING]) for state in states] == [2, 5, 1, 9]
    for state in states[1:]:
        assert state.keys() == states[0].keys()
        assert all(torch.equal(state[name], states[0][name]) for name in state if name != EMBEDDING)


def test_row_of_a_class_depends_on_its_name_alone(build):
    row = build(["cat", "dog"]).class_embedding.weight[0]
    assert torch.equal(build(["7", "bird", "cat"]).class_embedding.weight[2], row)
    assert torch.equal(build(["cat"], num_class_embeds=5).class_embedding.weight[0], row)
    assert torch.equal(build(["cat"], channels=3).class_embedding.weight[0], row)
    names = ["cat", "dog", "7", "8"]
    rows = build(names).class_embedding.weight
    assert len({tuple(row.tolist()) for row in rows}) == 4
    # Standard normal, as nn.Embedding: 4 * 32 numbers, five standard errors.
    assert abs(rows.mean()) < 5 / rows.numel() ** 0.5
    assert abs(rows.std() - 1) < 5 / (2 * rows.numel()) ** 0.5


def test_rows_without_a_class_are_zero_and_are_trained_like_the_others(build):
    unet = build(["cat", "dog"], num_class_embeds=4)
    assert unet.class_embedding.weight[:2].all() and not unet.class_embedding.weight[2:].any()
    assert all(parameter.requires_grad for parameter in unet.parameters())
    assert EMBEDDING in dict(unet.named_parameters())


def test_network_is_a_function_of_the_seed(build):
    state = build(["cat", "dog"], seed=3).state_dict()
    again, other = build(["cat", "dog"], seed=3).state_dict(), build(["cat", "dog"], seed=4).state_dict()
    assert all(torch.equal(again[name], state[name]) for name in state)
    for name in (EMBEDDING, "conv_in.weight"):
        assert not torch.equal(other[name], state[name])


def test_creating_leaves_the_global_random_state_alone(build):
    states = []
    for seed in (1, 2):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            before = torch.get_rng_state()
            states.append(build(["cat", "dog"]).state_dict())
            assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_network_is_a_diffusers_model(build, tmp_path):
    unet = build(["cat", "dog", "7"], channels=3, num_class_embeds=5)
    assert (unet.config.sample_size, unet.config.in_channels, unet.config.out_channels) == (8, 3, 3)
    assert unet.config.num_class_embeds == 5
    unet.save_pretrained(tmp_path)
    loaded, info = UNet2DModel.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info.values())
    state = loaded.state_dict()
    assert all(torch.equal(tensor, state[name]) for name, tensor in unet.state_dict().items())
    images, timesteps, class_labels = torch.zeros(2, 3, 8, 8), torch.tensor([0, 999]), torch.tensor([0, 4])
    assert loaded(images, timesteps, class_labels=class_labels).sample.shape == (2, 3, 8, 8)


def test_papers_network():
    config = TrainingConfig()
    assert load_unet_config(config) == PAPER_UNET
    # Shapes only.
    with torch.device("meta"):
        unet = UNet2DModel.from_config(
            {
                **load_unet_config(config),
                "sample_size": 32,
                "in_channels": 3,
                "out_channels": 3,
                "num_class_embeds": 10,
            }
        )
    # METHOD.md, section 1.
    assert round(sum(parameter.numel() for parameter in unet.parameters()) / 1e6, 1) == 37.2
    assert unet.dtype == torch.float32 and unet.config.dropout == 0.0


def test_unreadable_architecture_is_a_config_error(tmp_path):
    for path, content in ((tmp_path / "missing.json", None), (tmp_path / "broken.json", "{")):
        if content is not None:
            path.write_text(content)
        with pytest.raises(ConfigError, match=f"model_config_name_or_path: .*{path.name}"):
            load_unet_config(TrainingConfig(model_config_name_or_path=str(path), resolution=8))


def test_impossible_architecture_is_a_config_error(tmp_path, tiny_model_config):
    path = tmp_path / "impossible.json"
    # Eight channels do not divide into three groups.
    path.write_text(json.dumps({**json.loads(tiny_model_config.read_text()), "norm_num_groups": 3}))
    config = TrainingConfig(model_config_name_or_path=str(path), resolution=8)
    with pytest.raises(ConfigError, match="model_config_name_or_path: .*divisible"):
        create_unet(load_unet_config(config), 1, {"cat": 0}, config)


def test_resolution_that_cannot_be_halved_is_a_config_error(tiny_model_config):
    for path, resolution, factor in ((str(tiny_model_config), 9, 2), (None, 12, 8)):
        with pytest.raises(ConfigError, match=f"resolution is {resolution}; allowed: multiples of {factor}"):
            load_unet_config(TrainingConfig(model_config_name_or_path=path, resolution=resolution))


# Sampling

LABELS = [0, 3, 1, 1, 2, 0, 3]
KEYS = [("eval", label, index) for index, label in enumerate(LABELS)]


def sample(unet, labels=LABELS, keys=KEYS, seed=0, batch_size=2, **kwargs) -> torch.Tensor:
    pipeline = ClassConditionalPipeline(unet, DDIMScheduler())
    return sample_images(pipeline, labels, keys, seed, 3, batch_size, disable_progress_bar=True, **kwargs)


def sample_in_processes(unet, num_processes: int, **kwargs) -> list[torch.Tensor]:
    """What every one of several processes returns; their shards are collected first, then gathered."""
    shards = [[] for _ in range(num_processes)]
    for rank, collected in enumerate(shards):

        def collect(shard, collected=collected):
            collected.append(shard)
            return shard.repeat(num_processes, 1, 1, 1)

        sample(unet, process_index=rank, num_processes=num_processes, gather=collect, **kwargs)
    # All take part in every round, or the others would wait for ever; a round is a shard for everyone, of one shape.
    num_rounds = -(-len(LABELS) // (kwargs["batch_size"] * num_processes))
    assert [len(collected) for collected in shards] == [num_rounds] * num_processes
    assert len({shard.shape for collected in shards for shard in collected}) == 1

    results = []
    for rank in range(num_processes):
        rounds = iter(zip(*shards, strict=True))

        def gather(shard, rank=rank, rounds=rounds):
            everyones = next(rounds)
            assert torch.equal(everyones[rank], shard)
            return torch.cat(everyones)

        results.append(sample(unet, process_index=rank, num_processes=num_processes, gather=gather, **kwargs))
    return results


# Seven images in shards of 2 are 4 shards, of 3 are 3: with and without a process that idles in the last round.
@pytest.mark.parametrize("batch_size", [2, 3, 8])
@pytest.mark.parametrize("num_processes", [1, 2, 3])
def test_images_are_bit_equal_for_any_number_of_processes(tiny_unet, num_processes, batch_size):
    alone = sample(tiny_unet, batch_size=batch_size)
    assert alone.shape == (7, 1, 8, 8) and alone.dtype == torch.uint8
    for images in sample_in_processes(tiny_unet, num_processes, batch_size=batch_size):
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
