"""Adapters of a tiny network, for the tests of FunLoRA."""

import torch

from diffusers_cl.funlora import FunLoRA


def rows(num_rows: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(num_rows, 1, 8, 8, generator=generator)
    timesteps = torch.randint(0, 1000, (num_rows,), generator=generator)
    return images, timesteps, torch.tensor([3, 0, 2, 1, 3, 2, 0])[:num_rows]


def adapted(unet, function="cosine", classes=(2, 3), **options) -> FunLoRA:
    adapters = FunLoRA.from_unet(unet, [0, 1], ["up_blocks.*"], function=function, **options)
    for class_id in classes:
        adapters.add_class(class_id, unet)
    return adapters


def move(adapters: FunLoRA, *class_ids: int) -> None:
    """Changes the parameters of classes as training would."""
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for class_id in class_ids:
            for parameter in adapters.classes[str(class_id)].parameters():
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)


@torch.no_grad()
def predict(adapters, unet, images, timesteps, class_labels):
    return adapters(unet, images, timesteps, class_labels).sample


def made_of(adapters: FunLoRA) -> dict:
    return {key: value for key, value in adapters.config.items() if not key.startswith("_") and key != "names"}
