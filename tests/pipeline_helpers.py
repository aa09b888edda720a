"""What the tests of the pipeline, of what it saves and of scripts/sample.py share: a tiny pipeline, noise and labels."""

from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DModel

from diffusers_cl.pipeline import ClassConditionalPipeline


# Class 2 is not among them: the model has a row for it and has not seen it. The class named 7 has another id.
ID2LABEL = {0: "cat", 1: "7", 3: "dog"}
LABELS = ["cat", 3, 1, "7"]


def tiny_unet(channels: int = 1, **kwargs) -> UNet2DModel:
    torch.manual_seed(0)
    return UNet2DModel(
        sample_size=8,
        in_channels=channels,
        out_channels=channels,
        block_out_channels=(8, 16),
        layers_per_block=1,
        norm_num_groups=4,
        attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        **{"num_class_embeds": 4, **kwargs},
    )


def tiny_pipeline(channels: int = 1, scheduler=None, id2label=ID2LABEL) -> ClassConditionalPipeline:
    pipe = ClassConditionalPipeline(tiny_unet(channels), scheduler or DDIMScheduler(), id2label=id2label)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(channels: int = 1, num_images: int = 4) -> torch.Tensor:
    return torch.randn(num_images, channels, 8, 8, generator=seeded())


def saved_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
