"""Adapters of a tiny network, and what the tests of adapted runs share."""

import torch

from diffusers_cl.funlora import FunLoRA


# A stream with adapters.
ADAPTED = {
    "adapter": "funlora",
    "adapter_layers": '["up_blocks.*", "mid_block.*"]',
    "adapter_learning_rate": 0.01,
    "replay": "none",
    "penalty": "none",
    "use_ema": "true",
}
# Someone without the package: a model's folder or repo, where to save it again, and where to leave images.
STRANGER = """
import sys

sys.modules["diffusers_cl"] = None
import torch
from diffusers import DiffusionPipeline, UNet2DModel

folder, again, results = sys.argv[1:]
try:
    DiffusionPipeline.from_pretrained(folder)
except ValueError as error:
    assert "trust_remote_code" in str(error), error
else:
    raise SystemExit("the folder's code was run without trust_remote_code")
pipe = DiffusionPipeline.from_pretrained(folder, trust_remote_code=True)
pipe.save_pretrained(again)
pipe = DiffusionPipeline.from_pretrained(again, trust_remote_code=True)
noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
images = pipe(["4", "2", "0"], 3, latents=noise, output_type="latent").images
assert set(pipe.components) == {"unet", "scheduler", "adapters"}
torch.save(images, results)
"""


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


def draw(pipeline, *labels) -> torch.Tensor:
    noise = torch.randn(len(labels), 1, 8, 8, generator=torch.Generator().manual_seed(0))
    return pipeline(list(labels), 3, latents=noise, output_type="latent").images
