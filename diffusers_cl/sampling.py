"""Sampling many images in fixed shards, so that they do not depend on how many processes share the work."""

from collections.abc import Callable, Sequence
from pathlib import Path

import PIL.Image
import torch
from torchvision.utils import make_grid
from tqdm.auto import tqdm

from .errors import CheckpointError, ConfigError, first_line
from .pipeline import ClassConditionalPipeline, to_uint8
from .randomness import starting_noise


# Smaller images are enlarged by a whole number in a grid, so that 8x8 digits are legible; in pixels.
GRID_IMAGE_SIZE = 64
GRID_PADDING = 4
GRID_PADDING_VALUE = 96


def choose_device(name: str | None) -> torch.device:
    """Returns a device by name, by default the accelerator where there is one; raises a `ConfigError` without it."""
    try:
        device = torch.device(name or torch.accelerator.current_accelerator(check_available=True) or "cpu")
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ConfigError(f"--device {name} cannot be used: {first_line(error)}") from error
    return device


def load_pipeline(
    model: str | Path, device: torch.device, what: str, revision: str | None = None
) -> ClassConditionalPipeline:
    """
    Returns the pipeline of a task folder or Hub repo, whose code is not run.

    Args:
        model (`str`): the folder or repo.
        device (`torch.device`).
        what (`str`): names it in messages.
        revision (`str`, *optional*): the repo's branch, tag or commit.

    Raises:
        CheckpointError: when it cannot be loaded, or lacks weights.
    """
    try:
        pipeline = ClassConditionalPipeline.from_pretrained(model, revision=revision, use_safetensors=True)
    except (OSError, ValueError, RuntimeError) as error:
        raise CheckpointError(f"{what} cannot be loaded: {first_line(error)}") from error
    # diffusers only warns of tensors that are not in the file, and leaves them without data.
    if missing := [name for name, parameter in pipeline.unet.named_parameters() if parameter.is_meta]:
        raise CheckpointError(f"{what} lacks weights: {', '.join(missing)}")
    return pipeline.to(device)


def to_pil(images: torch.Tensor) -> list[PIL.Image.Image]:
    """Returns uint8 images of shape `(num_images, channels, height, width)`, with 1 or 3 channels, as pictures."""
    return [PIL.Image.fromarray(array) for array in images.permute(0, 2, 3, 1).squeeze(-1).numpy()]


def image_grid(images: torch.Tensor, columns: int) -> PIL.Image.Image:
    """Returns uint8 images of shape `(rows * columns, channels, height, width)` as one picture."""
    scale = -(-GRID_IMAGE_SIZE // min(images.shape[-2:]))
    enlarged = images.repeat_interleave(scale, dim=-1).repeat_interleave(scale, dim=-2)
    grid = make_grid(enlarged, nrow=columns, padding=GRID_PADDING, pad_value=GRID_PADDING_VALUE)
    return to_pil(grid[None])[0]


@torch.no_grad()
def sample_images(
    pipeline: ClassConditionalPipeline,
    class_labels: Sequence[int],
    noise_keys: Sequence[tuple[int | str, ...]],
    seed: int,
    num_inference_steps: int,
    batch_size: int,
    process_index: int = 0,
    num_processes: int = 1,
    gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
    description: str = "Sampling",
    disable_progress_bar: bool = False,
) -> torch.Tensor:
    """
    Returns images sampled without guidance, one for every label, the same on every process.

    Images `[s * batch_size, (s + 1) * batch_size)` are one forward pass on process `s mod num_processes`; the noise of an
    image is a function of the seed and its key. So images are bit-equal for any number of processes at an equal batch
    size and number of threads, and the global random state is not touched.

    Args:
        pipeline ([`ClassConditionalPipeline`]).
        class_labels (list of `int`): class ids.
        noise_keys (list of tuples): what each image's noise is for, for example `("eval", class, index)`.
        seed (`int`).
        num_inference_steps (`int`), batch_size (`int`).
        process_index (`int`), num_processes (`int`), gather: of this process; `gather` concatenates a tensor of every
            process along the first dimension.
        description (`str`), disable_progress_bar (`bool`): the progress bar's.

    Returns:
        `torch.Tensor` of shape `(len(class_labels), channels, height, width)`, uint8, on the CPU.
    """
    config = pipeline.unet.config
    size = config.sample_size if isinstance(config.sample_size, (list, tuple)) else (config.sample_size,) * 2
    shape = (config.in_channels, *size)
    device = pipeline.unet.device
    labels = torch.as_tensor(class_labels, dtype=torch.long)
    images = torch.empty((len(labels), *shape), dtype=torch.uint8)
    pipeline.set_progress_bar_config(disable=True)
    # Every round, each process samples one shard; a process without one in the last round takes part in the gather.
    starts = range(0, len(labels), batch_size * num_processes)
    for start in tqdm(starts, desc=description, unit="shard", leave=False, disable=disable_progress_bar):
        first = start + process_index * batch_size
        shard = torch.zeros((batch_size, *shape), dtype=torch.uint8, device=device)
        rows = slice(first, min(first + batch_size, len(labels)))
        if first < len(labels):
            sampled = pipeline(
                class_labels=labels[rows].to(device),
                latents=starting_noise(noise_keys[rows], shape, seed).to(device),
                num_inference_steps=num_inference_steps,
                output_type="latent",
            ).images
            shard[: len(sampled)] = to_uint8(sampled)
        if gather is not None:
            shard = gather(shard)
        stop = min(start + batch_size * num_processes, len(labels))
        images[start:stop] = shard[: stop - start].cpu()
    return images
