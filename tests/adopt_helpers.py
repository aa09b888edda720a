"""What the tests of adopting and of the gate share: a model that plain diffusers trained, and task folders of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMPipeline, DDPMScheduler
from filelock import FileLock
from PIL import Image
from pipeline_helpers import tiny_unet
from safetensors.torch import load_file, save_file
from script_helpers import shared_folder

from diffusers_cl.adopt import adopt
from diffusers_cl.config import TrainingConfig
from diffusers_cl.files import file_sha256
from diffusers_cl.source import open_source


UNET = "unet/diffusion_pytorch_model.safetensors"
NAMES = ["cat", "dog", "bird"]
CPU = torch.device("cpu")
# Of an adopted folder: sampling and measuring are as short as they can be.
SETTINGS = {"eval_images_per_class": 20, "eval_num_inference_steps": 3, "eval_batch_size": 60}


def patterns() -> torch.Tensor:
    """Returns the image of each class, `(3, 1, 8, 8)` in [-1, 1]: bright at the top, at the left, in the middle."""
    ramp = torch.linspace(1, -1, 8)
    hill = 1 - 2 * ramp.abs()
    return torch.stack(
        [ramp[:, None].expand(8, 8), ramp.expand(8, 8), torch.maximum(hill[:, None] + hill, -torch.ones(()))]
    )[:, None].clamp(-1, 1)


def draw(class_labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Returns real images of classes, in [-1, 1]: their patterns, paler or stronger, with noise."""
    strength = 0.6 + 0.4 * torch.rand(len(class_labels), 1, 1, 1, generator=generator)
    images = patterns()[class_labels] * strength
    return (images + 0.1 * torch.randn(images.shape, generator=generator)).clamp(-1, 1)


def write_real_images(folder: Path, count: int, names: list[str] = NAMES) -> Path:
    """Writes an imagefolder of `count` real images of each class."""
    generator = torch.Generator().manual_seed(1)
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for index, image in enumerate(draw(torch.full((count,), label), generator)):
            array = ((image[0] + 1) * 127.5).round().to(torch.uint8).numpy()
            Image.fromarray(array).save(folder / name / f"{index:03d}.png")
    return folder


def train_plainly(folder: Path, num_steps: int = 40) -> None:
    """Trains a class-conditional UNet as diffusers' own examples do, and saves a `DDPMPipeline`."""
    generator = torch.Generator().manual_seed(0)
    unet, scheduler = tiny_unet(num_class_embeds=len(NAMES)), DDPMScheduler(prediction_type="sample")
    optimizer = torch.optim.AdamW(unet.parameters(), lr=3e-3)
    for _ in range(num_steps):
        class_labels = torch.randint(len(NAMES), (24,), generator=generator)
        images = draw(class_labels, generator)
        noise = torch.randn(images.shape, generator=generator)
        timesteps = torch.randint(0, 1000, (len(images),), generator=generator)
        noisy_images = scheduler.add_noise(images, noise, timesteps)
        loss = F.mse_loss(unet(noisy_images, timesteps, class_labels=class_labels).sample, images)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    DDPMPipeline(unet, scheduler).save_pretrained(folder)


def plain_model(tmp_path_factory) -> Path:
    """Returns the folder of a plainly trained model, which the first worker that asks for it makes."""
    folder = shared_folder(tmp_path_factory) / "plain-ddpm"
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            train_plainly(partial := folder.with_name("plain-ddpm.partial"))
            partial.rename(folder)
    return folder


def config_for(source, files: Path, **settings) -> TrainingConfig:
    """Returns the configuration that `scripts/adopt.py` would make, with the untrained extractor of `tiny_files`."""
    return TrainingConfig(
        **{
            "resolution": 8,
            "prediction_type": source.scheduler.config.prediction_type,
            "tasks": [list(source.class_ids)],
            "feature_extractor": str(files / "extractor"),
            "cache_dir": str(files / "cache"),
            **SETTINGS,
            **settings,
        }
    )


def adopted(model: Path, files: Path, output_dir: Path, labels: str | None = None, **settings) -> Path:
    """Returns the task folder that a model was made into, in this process and without a word."""
    source = open_source(str(model), labels=labels)
    return adopt(source, config_for(source, files, **settings), output_dir, CPU, say=lambda text: None)


def names_file(folder: Path, names: list[str] | dict = NAMES) -> str:
    (folder / "labels.json").write_text(json.dumps(names))
    return str(folder / "labels.json")


def changed(model: Path, copy: Path, **files: dict) -> Path:
    """Copies a plain model with other JSON files: `unet`, `scheduler` or `index` get these values."""
    shutil.copytree(model, copy)
    names = {"unet": "unet/config.json", "scheduler": "scheduler/scheduler_config.json", "index": "model_index.json"}
    for key, values in files.items():
        content = json.loads((copy / names[key]).read_text()) | values
        (copy / names[key]).write_text(json.dumps(content))
    return copy


def edited(
    folder: Path,
    copy: Path,
    weights: Callable[[dict], None] | None = None,
    files: dict[str, Callable[[dict], None]] | None = None,
) -> Path:
    """
    Copies a task folder with other content, whole: `weights` is called with the network's tensors, and those of `files`
    with what JSON files hold.
    """
    shutil.copytree(folder, copy)
    path = copy / UNET
    if weights is not None:
        tensors = load_file(path)
        weights(tensors)
        save_file(tensors, path, {"format": "pt"})
    for name, edit in (files or {}).items():
        content = json.loads((copy / name).read_text())
        edit(content)
        (copy / name).write_text(json.dumps(content))
    manifest = copy / "consolidation" / "manifest.json"
    names = json.loads(manifest.read_text())["sha256"]
    manifest.write_text(json.dumps({"sha256": {name: file_sha256(copy / name) for name in names}}))
    return copy
