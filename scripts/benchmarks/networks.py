"""The networks that are measured, with batches of their sizes; nothing is trained or downloaded."""

import torch
from diffusers import DDIMScheduler, UNet2DModel

from diffusers_cl.config import TrainingConfig
from diffusers_cl.losses import denoising_losses
from diffusers_cl.models import create_unet, load_unet_config
from diffusers_cl.results import ROOT


# Resolution, channels, architecture (`None`: the paper's), rows of new images in a training batch of its preset.
NETWORKS = {"digits": (8, 1, ROOT / "configs" / "models" / "digits.json", 32), "paper": (32, 3, None, 128)}
NUM_CLASSES = 10


def losses(model, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Returns the losses of a batch, as the script does."""
    return denoising_losses(model, *batch)


def network(name: str, device: torch.device) -> UNet2DModel:
    """Returns a network of that name with random weights, in train mode."""
    resolution, channels, path, _ = NETWORKS[name]
    config = TrainingConfig(resolution=resolution, model_config_name_or_path=path and str(path))
    class_ids = {str(label): label for label in range(NUM_CLASSES)}
    return create_unet(load_unet_config(config), channels, class_ids, config).to(device)


def batches(name: str, num_rows: int, batch_size: int, device: torch.device) -> list[tuple[torch.Tensor, ...]]:
    """Returns batches `(noisy_images, timesteps, class_labels, target)` of random images."""
    resolution, channels, _, _ = NETWORKS[name]
    generator = torch.Generator().manual_seed(0)
    shape = (num_rows, channels, resolution, resolution)
    images, noise = torch.rand(shape, generator=generator) * 2 - 1, torch.randn(shape, generator=generator)
    timesteps = torch.randint(0, 1000, (num_rows,), generator=generator)
    class_labels = torch.randint(0, NUM_CLASSES, (num_rows,), generator=generator)
    columns = DDIMScheduler().add_noise(images, noise, timesteps), timesteps, class_labels, noise
    return list(zip(*(column.to(device).split(batch_size) for column in columns), strict=True))
