"""Sampling many images in fixed shards, so that they do not depend on how many processes share the work."""

import hashlib
import inspect
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import diffusers
import PIL.Image
import torch
from torchvision.utils import make_grid
from tqdm.auto import tqdm

from .adapters import load_adapters
from .errors import CheckpointError, ConfigError, NonFiniteError, RunError, first_line
from .fetch import PIPELINE_FILES, model_folder
from .files import read_json
from .pipeline import ClassConditionalPipeline, to_uint8
from .randomness import starting_noise
from .shards import Shards, tensors_digest


# Smaller images are enlarged by a whole number in a grid, so that 8x8 digits are legible; in pixels.
GRID_IMAGE_SIZE = 64
GRID_PADDING = 4
GRID_PADDING_VALUE = 96


def choose_device(name: str | torch.device | None) -> torch.device:
    """Returns a device by name, by default the accelerator where there is one; raises a `ConfigError` without it."""
    try:
        device = torch.device(name or torch.accelerator.current_accelerator(check_available=True) or "cpu")
        torch.empty(0, device=device)
    except (AssertionError, RuntimeError) as error:
        raise ConfigError(f"--device {name} cannot be used: {first_line(error)}") from error
    return device


def _component(folder: Path, name: str, kinds: tuple[type, ...], **options):
    """A part of a pipeline, of a class that diffusers has; no other is looked for, whatever model_index.json names."""
    named = read_json(folder / "model_index.json").get(name)
    library, kind = named if isinstance(named, list) and len(named) == 2 else (None, None)
    found = getattr(diffusers, kind, None) if library == "diffusers" and isinstance(kind, str) else None
    if not (inspect.isclass(found) and issubclass(found, kinds)):
        allowed = " or ".join(kind.__name__ for kind in kinds)
        raise CheckpointError(f"model_index.json names {named!r} for its {name}; allowed: a {allowed} of diffusers")
    return found.from_pretrained(folder, subfolder=name, local_files_only=True, **options)


def load_pipeline(
    model: str | Path, device: torch.device | str | None = None, what: str | None = None, revision: str | None = None
) -> ClassConditionalPipeline:
    """
    Returns the pipeline of a task folder or Hub repo. No code of it is run or fetched, nothing is unpickled.

    Args:
        model (`str`): the folder or repo.
        device (`torch.device`, *optional*): by default the accelerator where there is one.
        what (`str`, *optional*): names it in messages.
        revision (`str`, *optional*): the repo's branch, tag or commit.

    Raises:
        CheckpointError: when it cannot be loaded, or lacks weights.
    """
    try:
        what = what or str(model)
        folder, _ = model_folder(model, revision, PIPELINE_FILES)
        networks = (diffusers.UNet2DModel, diffusers.DiTTransformer2DModel)
        unet = _component(folder, "unet", networks, use_safetensors=True)
        scheduler = _component(folder, "scheduler", (diffusers.SchedulerMixin,))
        id2label = read_json(folder / "model_index.json").get("id2label")
        pipeline = ClassConditionalPipeline(unet, scheduler, id2label, load_adapters(folder, unet))
    except (RunError, OSError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{what} cannot be loaded: {first_line(error)}") from error
    # diffusers only warns of tensors that are not in the file, and leaves them without data.
    if missing := [name for name, parameter in pipeline.unet.named_parameters() if parameter.is_meta]:
        raise CheckpointError(f"{what} lacks weights: {', '.join(missing)}")
    return pipeline.to(choose_device(device))


def typed_label(text: str, names: Sequence[str]) -> int | str:
    """Returns a class that was typed as a pipeline takes it: a number that is none of the `names` is an id."""
    return int(text) if text.isdecimal() and text not in names else text


def to_pil(images: torch.Tensor) -> list[PIL.Image.Image]:
    """Returns uint8 images of shape `(num_images, channels, height, width)`, with 1 or 3 channels, as pictures."""
    return [PIL.Image.fromarray(array) for array in images.permute(0, 2, 3, 1).squeeze(-1).numpy()]


def image_grid(images: torch.Tensor, columns: int) -> PIL.Image.Image:
    """Returns uint8 images of shape `(rows * columns, channels, height, width)` as one picture."""
    scale = -(-GRID_IMAGE_SIZE // min(images.shape[-2:]))
    enlarged = images.repeat_interleave(scale, dim=-1).repeat_interleave(scale, dim=-2)
    grid = make_grid(enlarged, nrow=columns, padding=GRID_PADDING, pad_value=GRID_PADDING_VALUE)
    return to_pil(grid[None])[0]


def _all_inputs(pipeline, class_labels, noise_keys, seed: int, num_inference_steps: int, batch_size: int) -> dict:
    """All that sampled images are a function of, as JSON."""
    weights = [part.state_dict() for part in (pipeline.unet, pipeline.adapters) if part is not None]
    return {
        "weights": [tensors_digest(tensors) for tensors in weights],
        "scheduler": json.loads(pipeline.scheduler.to_json_string()),
        "images": hashlib.sha256(json.dumps([class_labels, list(noise_keys)]).encode()).hexdigest(),
        "seed": seed,
        "num_inference_steps": num_inference_steps,
        "batch_size": batch_size,
    }


def _sample_shard(pipeline, labels, noise_keys, seed: int, num_inference_steps: int, batch_size: int, shape):
    """The images of a shard and whether each is finite, filled up to `batch_size`; of none where there are no labels."""
    device = pipeline.unet.device
    images = torch.zeros((batch_size, *shape), dtype=torch.uint8, device=device)
    is_finite = torch.ones(batch_size, dtype=torch.uint8, device=device)
    if len(labels):
        sampled = pipeline(
            class_labels=labels.to(device),
            latents=starting_noise(noise_keys, shape, seed).to(device),
            num_inference_steps=num_inference_steps,
            output_type="latent",
        ).images
        images[: len(labels)] = to_uint8(sampled)
        is_finite[: len(labels)] = sampled.isfinite().flatten(1).all(dim=1)
    return images, is_finite


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
    folder: Path | None = None,
) -> torch.Tensor:
    """
    Returns images sampled without guidance, one for every label, the same on every process.

    Images `[s * batch_size, (s + 1) * batch_size)` are shard `s`, one forward pass on one process; the noise of an image is
    a function of the seed and its key. So images are bit-equal for any number of processes and whatever shards were there
    before, at an equal batch size and number of threads, and the global random state is not touched.

    Args:
        pipeline ([`ClassConditionalPipeline`]).
        class_labels (list of `int`): class ids.
        noise_keys (list of tuples): what each image's noise is for, for example `("eval", class, index)`.
        seed (`int`).
        num_inference_steps (`int`), batch_size (`int`).
        process_index (`int`), num_processes (`int`), gather: of this process; `gather` concatenates a tensor of every
            process along the first dimension.
        description (`str`): of what is sampled, for the progress bar and errors.
        disable_progress_bar (`bool`).
        folder (`Path`, *optional*): where process 0 keeps the shards that are sampled, and looks for those that were; the
            caller deletes it once the images are safe elsewhere. By default nothing is kept.

    Returns:
        `torch.Tensor` of shape `(len(class_labels), channels, height, width)`, uint8, on the CPU.

    Raises:
        NonFiniteError: on all processes, when an image is not finite; its shard is not kept.
        StorageError: on process 0, when a shard cannot be written.
    """
    config = pipeline.unet.config
    size = config.sample_size if isinstance(config.sample_size, (list, tuple)) else (config.sample_size,) * 2
    shape = (config.in_channels, *size)
    device = pipeline.unet.device
    labels = torch.as_tensor(class_labels, dtype=torch.long)
    images = torch.empty((len(labels), *shape), dtype=torch.uint8)
    rows = [slice(start, min(start + batch_size, len(labels))) for start in range(0, len(labels), batch_size)]
    pipeline.set_progress_bar_config(disable=True)

    def everyones(tensor: torch.Tensor) -> torch.Tensor:
        """What every process has, on the CPU: of shape `(num_processes, *tensor.shape)`."""
        return (tensor if gather is None else gather(tensor)).view(-1, *tensor.shape).cpu()

    shards, is_missing = None, torch.ones(len(rows), dtype=torch.uint8, device=device)
    if folder is not None:
        if process_index == 0:
            inputs = _all_inputs(pipeline, labels.tolist(), noise_keys, seed, num_inference_steps, batch_size)
            shards = Shards(folder, inputs)
            for shard, row in enumerate(rows):
                if (found := shards.load(f"{shard:06d}")) is not None:
                    images[row], is_missing[shard] = found["images"], 0
        # A network file system may show the other processes something else.
        is_missing = everyones(is_missing)[0]
        for shard in (is_missing == 0).nonzero().flatten().tolist() if num_processes > 1 else []:
            images[rows[shard]] = everyones(images[rows[shard]].to(device))[0]

    missing = is_missing.nonzero().flatten().tolist()
    # Every round, each process samples one shard; a process without one in the last round takes part in the gathers.
    rounds = range(0, len(missing), num_processes)
    for first in tqdm(rounds, desc=description, unit="shard", leave=False, disable=disable_progress_bar):
        this_round = missing[first : first + num_processes]
        row = rows[this_round[process_index]] if process_index < len(this_round) else slice(0)
        shard_images, is_finite = _sample_shard(
            pipeline, labels[row], noise_keys[row], seed, num_inference_steps, batch_size, shape
        )
        broken: list[int] = []
        for shard, found, finite in zip(this_round, everyones(shard_images), everyones(is_finite), strict=False):
            row = rows[shard]
            images[row] = found[: len(labels[row])]
            broken += labels[row][finite[: len(labels[row])] == 0].tolist()
        if broken:
            class_ids = ", ".join(map(str, sorted(set(broken))))
            raise NonFiniteError(f"{description}: {len(broken)} image(s) are not finite, of the class ids {class_ids}")
        for shard in this_round if shards is not None else []:
            shards.save(f"{shard:06d}", {"images": images[rows[shard]]})
    return images
