"""What is analysed: a class-conditional model as it is found, its tasks, and the real images that belong to it."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from .adopt import real_images
from .config import TrainingConfig
from .data import ImageSplit
from .draws import FisherBatches
from .errors import CheckpointError, ConfigError, DataError
from .ewc import WEIGHTS_NAME, Rank1EWC
from .fetch import model_folder
from .folders import CONSOLIDATION, STATE_NAME, read_task_state
from .images import UnreadableImageError, image_bytes, open_image, reading
from .losses import is_flow
from .names import dataset_name
from .randomness import derive_seed
from .source import Source, open_source
from .start import ALLOWED_FILES
from .tasks import TaskImages


# Images whose size is looked at before any is decoded.
LOOKED_AT = 100


@dataclass
class Subject:
    """
    A model and its data.

    Attributes:
        source ([`Source`]): network, scheduler and class names.
        tasks (`list[list[str]]`): the classes of every task that it has learned, the last one last; all in one where it does
            not say.
        train, test ([`ImageSplit`]): of the data.
        directions (`dict[str, torch.Tensor]` or `None`): v of every task as rank-1 EWC has stored it, each at its own task's
            weights: `(tasks, *parameter.shape)` by parameter name.
        data (`str`): the data's name.
        seed (`int`): of every draw.
        device (`torch.device`).
    """

    source: Source
    tasks: list[list[str]]
    train: ImageSplit
    test: ImageSplit
    directions: dict[str, torch.Tensor] | None
    data: str
    seed: int
    device: torch.device

    @property
    def unet(self) -> torch.nn.Module:
        return self.source.unet

    def images(self, task: int | None = None, split: str = "train") -> TaskImages:
        """Returns the images of a task, or of all, as the model sees them."""
        names = sum(self.tasks, []) if task is None else self.tasks[task]
        found = getattr(self, split)
        return TaskImages(found.select(found.rows_of(names)), self.source.class_ids)

    def draws(
        self, purpose: tuple, num_samples: int, timesteps: tuple[int, int], batch_size: int, task=None, split="train"
    ) -> FisherBatches:
        """Returns draws of image, timestep and noise, independent of those for any other purpose."""
        seed = derive_seed(self.seed, "geometry", *purpose)
        images = self.images(task, split)
        return FisherBatches(images, self.source.scheduler, num_samples, timesteps, batch_size, seed, 0, self.device)


def _image_size(split: ImageSplit) -> tuple[int, int]:
    """Height and width of the largest of the first images."""
    sizes = []
    for entry in split.dataset.select(range(min(LOOKED_AT, len(split.dataset))))[split.image_column]:
        try:
            with reading(), open_image(image_bytes(entry)) as image:
                sizes.append(image.size[::-1])
        except UnreadableImageError:
            # Decoding names it.
            continue
    return max(sizes, default=(0, 0))


def _check_fit(train: ImageSplit, source: Source, data: str, resize_mode: str | None) -> None:
    size, channels = source.unet.config.sample_size, source.unet.config.in_channels
    if train.is_greyscale() != (channels == 1):
        raise DataError(
            f"--data {data}: the images are {'greyscale' if channels == 3 else 'in colour'}, the network takes {channels}"
            f" channel(s); allowed: images of {channels}"
        )
    found = _image_size(train)
    if resize_mode is None and found != (size, size):
        raise DataError(
            f"--data {data}: the images are {found[0]}x{found[1]}, the network takes {size}x{size}; allowed: images of that"
            " size, or --resize_mode pad or resize"
        )


def open_subject(
    model: str,
    data: str,
    device: torch.device,
    seed: int = 0,
    revision: str | None = None,
    resize_mode: str | None = None,
    cache_dir: str | None = None,
) -> Subject:
    """
    Returns a model with its data. No code of it is run, nothing is unpickled.

    Args:
        model (`str`): a task folder, another folder with a class-conditional `unet` and its `scheduler`, or a Hub repo of
            either.
        data (`str`): `digits`, a folder with one sub-folder a class or that `datasets` can load, or a dataset on the Hub. It
            has the model's classes, by name.
        resize_mode (`str`, *optional*): `pad` or `resize`; by default that of the model's own training where the data are
            called as they were there, and otherwise the images have to be of the network's size.

    Raises:
        ConfigError: for a model of another kind, one without class labels, and a flow.
        DataError: when the data cannot be had, lack a class, or have images that do not fit.
        CheckpointError: when a file of the model is missing or damaged.
    """
    source = open_source(model, revision, cache_dir=cache_dir)
    if is_flow(source.scheduler):
        raise ConfigError(
            f"--model {model} is of flow matching; allowed: diffusion models, whose timesteps and noise prediction all figures"
            " are of"
        )
    folder, _ = model_folder(model, revision, ALLOWED_FILES, cache_dir=cache_dir)
    has_state = (folder / CONSOLIDATION / STATE_NAME).exists()
    state = read_task_state(folder) if has_state else {}
    # A joint run's one folder has learned all tasks.
    tasks = [task for task in state.get("tasks", []) if set(task) <= set(state.get("seen_classes", []))]
    tasks = tasks or [list(source.class_ids)]
    if unknown := [name for task in tasks for name in task if name not in source.class_ids]:
        raise CheckpointError(f"--model {model}: its state has the class {unknown[0]!r}, which its id2label lacks")
    is_folder = Path(data).is_dir()
    # As `imagefolder` has it: one folder a class, and no file that describes a dataset.
    is_images = is_folder and not any(Path(data).rglob("*.parquet")) and not any(Path(data).glob("*.json*"))
    where = {"train_data_dir": data} if is_images else {"dataset_name": data}
    config = TrainingConfig(**where, resolution=source.unet.config.sample_size, tasks=tasks, seed=seed)
    name = dataset_name({"dataset_name": None, "train_data_dir": None, **where})
    recorded = state.get("config", {}).get("resize_mode")
    if resize_mode is None and name in str(state.get("dataset", "")).split(" + "):
        resize_mode = recorded
    if resize_mode not in (None, "pad", "resize"):
        raise ConfigError(f"--resize_mode is {resize_mode!r}; allowed: pad, resize")
    config.resize_mode = resize_mode or config.resize_mode
    train, test = real_images(config, sum(tasks, []), source.unet.config.in_channels)
    _check_fit(train, source, data, resize_mode)
    source.unet.to(device).requires_grad_(True)
    return Subject(source, tasks, train, test, _stored_directions(folder, model), name, seed, device)


def _stored_directions(folder: Path, model: str) -> dict[str, torch.Tensor] | None:
    path = folder / CONSOLIDATION / WEIGHTS_NAME
    if not path.exists():
        return None
    try:
        return Rank1EWC.from_pretrained(path.parent).tensors["direction"]
    except ValueError:
        # Of another penalty, which has no direction a task.
        return None
    except (OSError, SafetensorError, KeyError, TypeError) as error:
        raise CheckpointError(f"--model {model}: {path.name} cannot be read: {error}") from error


def stored_cosines(directions: dict[str, torch.Tensor]) -> list[list[float]]:
    """Returns the cosines between stored directions, `(tasks, tasks)`."""
    gram = sum(
        rows.reshape(len(rows), -1).double() @ rows.reshape(len(rows), -1).double().T for rows in directions.values()
    )
    lengths = gram.diagonal().sqrt()
    return np.round((gram / torch.outer(lengths, lengths)).numpy(), 6).tolist()
