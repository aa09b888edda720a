"""The network of a run: the paper's by default, initialised so that the number of classes moves no other weight; and its
scheduler."""

from pathlib import Path

import torch
import torch.nn as nn
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel

from .config import NUM_TRAIN_TIMESTEPS, TrainingConfig
from .errors import CheckpointError, ConfigError, first_line
from .randomness import derive_seed, generator


# arXiv 2509.23593, Sec. 4.3: four ResNet blocks, 128 channels in the first and 256 in the others, the rest as diffusers
# has it; 37.2 M parameters for RGB images and ten classes.
PAPER_UNET = {
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
    "downsample_type": "resnet",
    "upsample_type": "resnet",
}


def load_unet_config(config: TrainingConfig, folder: Path | None = None) -> dict:
    """
    Returns the network's architecture: that of the task folder that the run goes on from, or else from
    `model_config_name_or_path`, or else the paper's.

    Raises:
        ConfigError: when it cannot be read, or halves the images more often than the resolution divides.
    """
    if folder is not None:
        try:
            unet_config = dict(UNet2DModel.load_config(folder, subfolder="unet"))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise CheckpointError(f"{folder}/unet/config.json: {first_line(error)}") from error
    elif config.model_config_name_or_path is None:
        unet_config = dict(PAPER_UNET)
    else:
        try:
            unet_config = dict(UNet2DModel.load_config(config.model_config_name_or_path))
        except (OSError, ValueError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"model_config_name_or_path: {config.model_config_name_or_path}: {first_line(error)}"
            ) from error
    channels = unet_config.get("block_out_channels", PAPER_UNET["block_out_channels"])
    factor = 2 ** (len(channels) - 1)
    if config.resolution % factor:
        raise ConfigError(
            f"resolution is {config.resolution}; allowed: multiples of {factor}, because the network halves it"
            f" {len(channels) - 1} time(s)"
        )
    return unet_config


def create_unet(
    unet_config: dict, channels: int, class_ids: dict[str, int], config: TrainingConfig, min_rows: int = 0
) -> UNet2DModel:
    """
    Returns a new `UNet2DModel`, a function of the seed, in which every class has the embedding row that its name gives.

    All other weights are drawn as if the class embedding had one row, so that the number of classes moves none of them.
    Rows without a class are zero.

    Args:
        unet_config (`dict`): the architecture.
        channels (`int`): of the images.
        class_ids (`dict[str, int]`): the row of every class.
        config ([`TrainingConfig`]): seed, resolution, num_class_embeds.
        min_rows (`int`): of the class embedding.
    """
    sizes = {"sample_size": config.resolution, "in_channels": channels, "out_channels": channels}
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(derive_seed(config.seed, "model"))
        try:
            unet = UNet2DModel.from_config({**unet_config, **sizes, "num_class_embeds": 1})
        except (TypeError, ValueError) as error:
            raise ConfigError(f"model_config_name_or_path: {first_line(error)}") from error
    num_rows = max(config.num_class_embeds or 0, max(class_ids.values()) + 1, min_rows)
    rows = torch.zeros(num_rows, unet.class_embedding.embedding_dim)
    for name, row in class_ids.items():
        rows[row].normal_(generator=generator(config.seed, "class", name))
    unet.class_embedding = nn.Embedding.from_pretrained(rows, freeze=False)
    unet.register_to_config(num_class_embeds=num_rows)
    return unet


def create_scheduler(
    config: TrainingConfig, folder: Path | None = None
) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    """
    Returns the scheduler that a run noises and samples with: DDIM's, or Euler's for a flow.

    Args:
        config ([`TrainingConfig`]): objective, prediction_type.
        folder (`Path`, *optional*): of the task that the run goes on from, whose scheduler it is.

    Raises:
        CheckpointError: when the task's scheduler cannot be read, or is of another class.
    """
    settings = {"num_train_timesteps": NUM_TRAIN_TIMESTEPS}
    if config.objective == "flow_matching":
        kind = FlowMatchEulerDiscreteScheduler
    else:
        kind = DDIMScheduler
        settings["prediction_type"] = config.prediction_type
    if folder is None:
        return kind(**settings)
    try:
        found = kind.load_config(folder, subfolder="scheduler", local_files_only=True)
        # Another class's settings would be taken without a word.
        if found.get("_class_name") != kind.__name__:
            raise ValueError(f"_class_name is {found.get('_class_name')!r}; allowed: {kind.__name__!r}")
        if found.get("num_train_timesteps") != NUM_TRAIN_TIMESTEPS:
            raise ValueError(
                f"num_train_timesteps is {found.get('num_train_timesteps')}; allowed: {NUM_TRAIN_TIMESTEPS}"
            )
        return kind.from_config(found)
    except (OSError, ValueError, TypeError, RuntimeError, RecursionError) as error:
        raise CheckpointError(f"{folder}/scheduler/scheduler_config.json: {first_line(error)}") from error
