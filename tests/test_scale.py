"""A smaller version of a configuration, in numbers worked out by hand."""

import dataclasses
import json
from pathlib import Path

from diffusers_cl.arguments import parse_config
from diffusers_cl.config import TrainingConfig
from diffusers_cl.models import PAPER_UNET
from diffusers_cl.scale import data_sizes, scale_unet_config, scaled_arguments, scaled_settings


ROOT = Path(__file__).parents[1]


def test_scaled_networks():
    # sqrt(0.1) = 0.316: 128 -> 40.5, 256 -> 81.0; multiples of 8.
    small = scale_unet_config(PAPER_UNET, 0.1)
    assert small["block_out_channels"] == [40, 80, 80, 80] and small["norm_num_groups"] == 8
    assert small["down_block_types"] == PAPER_UNET["down_block_types"]
    # sqrt(0.25) = 0.5: all divisible by 32.
    half = scale_unet_config(PAPER_UNET, 0.25)
    assert half["block_out_channels"] == [64, 128, 128, 128] and half["norm_num_groups"] == 32
    assert scale_unet_config({"block_out_channels": [32, 64]}, 0.01)["block_out_channels"] == [16, 16]


def test_scaled_sizes():
    cifar = TrainingConfig(replay="generative_distillation", replay_images_per_class=5000, num_train_epochs=200)
    assert scaled_settings(cifar, 0.1, 50_000, 1000) == {
        "max_train_samples": 5000,
        "eval_images_per_class": 100,
        "num_train_epochs": 20,
        "replay_images_per_class": 500,
    }
    steps = TrainingConfig(replay="memory", memory_images_per_class=10, max_train_steps=[700, 3])
    assert scaled_settings(steps, 0.1, 1438, 36) == {
        "max_train_samples": 144,
        "eval_images_per_class": 4,
        "max_train_steps": [70, 1],
        "memory_images_per_class": 1,
    }
    for count, scaled in ((145, 14), (10, 2)):
        classified = dataclasses.replace(steps, generated_classifier_images=count)
        assert scaled_settings(classified, 0.1, 1438, 36)["generated_classifier_images"] == scaled
    capped = dataclasses.replace(cifar, eval_images_per_class=20)
    assert scaled_settings(capped, 0.5, 50_000, 1000)["eval_images_per_class"] == 10


def test_scaled_command_of_the_digits(tmp_path):
    config = parse_config(["--config", str(ROOT / "configs" / "digits.yaml")])
    sizes = data_sizes(config)
    assert sizes == (1438, 36)
    arguments = scaled_arguments(config, 0.1, sizes, tmp_path)
    scaled = parse_config(["--config", str(ROOT / "configs" / "digits.yaml"), *arguments])
    assert (scaled.max_train_steps, scaled.max_train_samples, scaled.eval_images_per_class) == ([70, 50], 144, 4)
    assert scaled.replay_images_per_class == round(14.5)
    content = json.loads((tmp_path / scaled.model_config_name_or_path).read_text())
    assert content["block_out_channels"] == [16, 24] and content["add_attention"] is False
    # The name tells networks apart.
    assert arguments != scaled_arguments(config, 0.5, sizes, tmp_path) and len(list(tmp_path.iterdir())) == 2
