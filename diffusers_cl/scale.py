"""A smaller version of a configuration: epochs, images and network shrunk together by one factor."""

import hashlib
import json
import math
from dataclasses import asdict
from pathlib import Path

from .config import TrainingConfig
from .results import effective_config


# Channels are multiples of this, which divides them all as `norm_num_groups`, too.
CHANNEL_STEP = 8
MIN_CHANNELS = 16
# Each half of a task's held-out images, of which the floor is made, needs two.
MIN_EVAL_IMAGES = 4


def data_sizes(config: TrainingConfig) -> tuple[int, int]:
    """Returns how many training images a data set has, and how many held-out ones a class (the mean)."""
    from .data import load_splits

    train, test = load_splits(config)
    return len(train.labels), round(len(test.labels) / len(test.names))


def scale_unet_config(unet_config: dict, scale: float) -> dict:
    """
    Returns an architecture with about `scale` times the parameters: channels times the square root of it, rounded to
    multiples of 8, 16 at least. `norm_num_groups` becomes 8 where it does not divide them.
    """
    wide = unet_config.get("block_out_channels", (224, 448, 672, 896))
    channels = [max(MIN_CHANNELS, CHANNEL_STEP * round(c * math.sqrt(scale) / CHANNEL_STEP)) for c in wide]
    groups = unet_config.get("norm_num_groups", 32)
    groups = CHANNEL_STEP if any(c % groups for c in channels) else groups
    return unet_config | {"block_out_channels": channels, "norm_num_groups": groups}


def scaled_settings(config: TrainingConfig, scale: float, num_train: int, num_eval: int) -> dict:
    """
    Returns the keys that shrink, with their values; of the steps, replay and memory only what the run reads.

    Args:
        config ([`TrainingConfig`]): with its full size.
        scale (`float`): the factor, above 0 and at most 1.
        num_train (`int`), num_eval (`int`): from [`data_sizes`].
    """
    config = effective_config(asdict(config))

    def scaled(number: int, least: int = 1) -> int:
        return max(least, round(scale * number))

    per_class = min(num_eval, config["eval_images_per_class"] or num_eval)
    settings = {
        "max_train_samples": scaled(num_train),
        "eval_images_per_class": min(per_class, scaled(per_class, MIN_EVAL_IMAGES)),
    }
    steps = config["max_train_steps"]
    if steps is None:
        settings["num_train_epochs"] = scaled(config["num_train_epochs"])
    else:
        settings["max_train_steps"] = list(map(scaled, steps)) if isinstance(steps, list) else scaled(steps)
    if config["generated_classifier_images"] is not None:
        settings["generated_classifier_images"] = scaled(config["generated_classifier_images"], 2)
    for key in ("replay_images_per_class", "memory_images_per_class", "memory_bytes"):
        if config.get(key) is not None:
            settings[key] = scaled(config[key])
    return settings


def scaled_arguments(config: TrainingConfig, scale: float, sizes: tuple[int, int], folder: Path) -> list[str]:
    """
    Returns the command line that makes a configuration smaller. The smaller network is written into `folder` under a
    name that its content gives.
    """
    from .models import load_unet_config

    content = json.dumps({"_class_name": "UNet2DModel"} | scale_unet_config(load_unet_config(config), scale), indent=1)
    file = folder / f"unet-{hashlib.sha256(content.encode()).hexdigest()[:8]}.json"
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(content + "\n")
    settings = scaled_settings(config, scale, *sizes) | {"model_config_name_or_path": file}
    return [part for key, value in settings.items() for part in (f"--{key}", str(value))]
