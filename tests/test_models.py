"""The network of a run: it does not depend on what it should not depend on."""

import json

import pytest
import torch
from diffusers import UNet2DModel

from diffusers_cl.config import TrainingConfig
from diffusers_cl.errors import ConfigError
from diffusers_cl.models import PAPER_UNET, create_unet, load_unet_config


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
