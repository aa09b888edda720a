"""Adopting a model that was trained elsewhere: it becomes a task folder, from which a run can go on."""

import io
import tempfile
from collections.abc import Callable
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import datasets
import numpy as np
import torch

from . import __version__
from .config import OPERATIONAL_KEYS, TrainingConfig
from .data import ImageSplit, load_splits
from .draws import FisherBatches
from .errors import ConfigError, DataError, NonFiniteError, StorageError
from .evaluation import Evaluation, class_grid_columns
from .features import resolve_feature_extractor
from .hub import write_task_folder
from .losses import denoising_losses
from .methods import create_penalty
from .names import dataset_name
from .pipeline import ClassConditionalPipeline
from .replay_images import extend_memory
from .results import portable_name
from .sampling import image_grid, sample_images, to_pil
from .source import Source
from .tasks import TaskImages, resolve_tasks


# Of a class, where there is no data: in the place of training images and, other ones, of test images.
OWN_SAMPLES_PER_CLASS = 200
# What state.json says that references, and a small classifier, are made from.
DATA, OWN_SAMPLES = "data", "own samples"


def as_split(images: torch.Tensor, labels: list[str], names: list[str], name: str) -> ImageSplit:
    """
    Returns images as a split of a dataset, which is how real ones come.

    Args:
        images (`torch.Tensor` of shape `(num_images, channels, size, size)`): uint8.
        labels (list of `str`): of every image, among `names`.
        names (list of `str`): of the classes.
        name (`str`): for messages.
    """
    entries = []
    for picture in to_pil(images):
        picture.save(file := io.BytesIO(), "png")
        entries.append({"bytes": file.getvalue(), "path": None})
    features = datasets.Features({"image": datasets.Image(decode=False)})
    dataset = datasets.Dataset.from_dict({"image": entries}, features=features)
    numbers = np.array([names.index(label) for label in labels])
    _, channels, resolution, _ = images.shape
    return ImageSplit(dataset, "image", name, numbers, names, resolution, "resize", channels, np.arange(len(images)))


def real_images(config: TrainingConfig, names: list[str], channels: int) -> tuple[ImageSplit, ImageSplit]:
    """
    Returns the training and test split of the data that a configuration names.

    Raises:
        DataError: when it does not have all classes of these names.
    """
    train, test = load_splits(config, channels)
    if unknown := [name for name in names if name not in train.names]:
        raise DataError(
            f"the data has no class {unknown[0]!r}, which is a name of the model's; it has {', '.join(train.names[:20])}."
            " --labels can name the model's rows as the data does, and leave out those that are not in it"
        )
    resolve_tasks(config, train, test)
    return train, test


def own_samples(names: list[str], class_ids: dict[str, int], count: int, sample: Callable) -> tuple[ImageSplit, ...]:
    """
    Returns what a model draws in the place of a training and of a test split.

    Args:
        names (list of `str`), class_ids (`dict[str, int]`): its classes.
        count (`int`): images of a class in each.
        sample: maps class ids and noise keys to uint8 images; takes a `description`.
    """
    splits = []
    for purpose in ("train", "test"):
        labels = [name for name in names for _ in range(count)]
        keys = [("adopt", purpose, name, index) for name in names for index in range(count)]
        images = sample([class_ids[name] for name in labels], keys, description=f"Sampling a {purpose} split")
        splits.append(as_split(images, labels, names, OWN_SAMPLES))
    return tuple(splits)


def consolidated_penalty(source: Source, images: TaskImages, config: TrainingConfig, device: torch.device):
    """
    Returns the penalty that a configuration names, with the term of the model's classes, `None` for `none`.

    Raises:
        NonFiniteError: when the Fisher is not finite.
    """
    # A warning would be about how the model was trained, which is not known here.
    penalty = create_penalty(config, warn=lambda text: None)
    if penalty is None:
        return None
    batches = FisherBatches(
        images,
        source.scheduler,
        config.fisher_samples,
        tuple(config.fisher_timesteps),
        config.fisher_batch_size,
        config.seed,
        0,
        device,
    )
    try:
        penalty.consolidate(source.unet, lambda model, batch: denoising_losses(model, *batch), batches)
    except FloatingPointError as error:
        raise NonFiniteError(str(error)) from error
    return penalty


def adopt(
    source: Source,
    config: TrainingConfig,
    output_dir: str | Path,
    device: torch.device,
    say: Callable[[str], None] = print,
) -> Path:
    """
    Writes a task folder of a model: task 0, with all its classes. What a task leaves behind (penalty, references, a small
    classifier) is estimated on data, if the configuration names any, or else on the model's own samples.

    Args:
        source ([`Source`]): from [`open_source`].
        config ([`TrainingConfig`]): what a run goes on with that is told nothing else. `tasks` is the model's classes,
            `resolution`, `objective` and `prediction_type` are its own, `eval_images_per_class` is the number of images of a
            class.
        output_dir (`Path`): becomes the folder.
        device (`torch.device`).
        say: called with a line about every step.

    Returns:
        `Path`: the folder.

    Raises:
        ConfigError: when the folder is there already, or real images are to be kept without data.
        DataError: when data or extractor cannot be had, or the data does not have the model's classes.
        NonFiniteError: when the Fisher is not finite.
        StorageError: when the folder cannot be written.
    """
    output_dir, class_ids, names = Path(output_dir), source.class_ids, list(source.class_ids)
    if output_dir.exists() and not (output_dir.is_dir() and not any(output_dir.iterdir())):
        raise ConfigError(f"output_dir is {output_dir}, which is there already; allowed: a new folder")
    has_data = (config.dataset_name or config.train_data_dir) is not None
    if config.replay == "memory" and not has_data:
        raise ConfigError("replay is 'memory', which keeps real images; allowed: that with data, or another one")
    pipeline = ClassConditionalPipeline(source.unet.to(device), source.scheduler, source.id2label)
    sample = partial(
        sample_images,
        pipeline,
        seed=config.seed,
        num_inference_steps=config.eval_num_inference_steps,
        batch_size=config.eval_batch_size,
    )
    if has_data:
        say("Reading the data")
        train, test = real_images(config, names, source.unet.config.in_channels)
    else:
        say("Sampling the model, in the place of data")
        config = replace(config, eval_images_per_class=config.eval_images_per_class or OWN_SAMPLES_PER_CLASS)
        train, test = own_samples(names, class_ids, config.eval_images_per_class, sample)
    task_images = TaskImages(train.select(train.rows_of(names)).load(device), class_ids)

    evaluation = Evaluation(test, [names], class_ids, resolve_feature_extractor(config, train, names, device), config)
    if config.penalty != "none":
        say("Estimating the Fisher")
    penalty = consolidated_penalty(source, task_images, config, device)
    memory = None
    if config.replay == "memory":
        memory = extend_memory(None, task_images, config.memory_images_per_class, config.memory_bytes, config.seed)

    say("Measuring the model")
    row, first_images = evaluation(partial(sample, description="Sampling for the evaluation"), 1)
    made_from = DATA if has_data else OWN_SAMPLES
    if config.feature_extractor == "classifier":
        evaluation.info["trained_on"] = made_from
    metrics = {
        "schema": 1,
        "version": __version__,
        "tasks": [names],
        "stream": config.stream,
        **evaluation.report([row]),
        "fisher": [penalty and penalty.summary()[-1]],
        "config": {key: value for key, value in asdict(config).items() if key not in OPERATIONAL_KEYS},
    }
    found = {"model": portable_name(source.model), "revision": source.revision}
    state = {
        "task": 0,
        "tasks": [names],
        "class_ids": class_ids,
        "seen_classes": names,
        "global_step": 0,
        "dataset": dataset_name(asdict(config)) if has_data else f"samples of {found['model']}",
        "references": made_from,
        "lineage": {"previous": found},
        "rows": [row],
        "fisher": metrics["fisher"],
        "floor": metrics["floor"],
        "feature_extractor_info": metrics["feature_extractor_info"],
    }
    grid = image_grid(first_images, class_grid_columns(first_images, len(names)))
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        # A run numbers its task folders; this one has the name that it was asked to have.
        with tempfile.TemporaryDirectory(prefix=".adopting-", dir=output_dir.parent) as work:
            folder = write_task_folder(work, pipeline, penalty, memory, evaluation, state, grid, config, metrics)
            folder.rename(output_dir)
    except OSError as error:
        raise StorageError(f"cannot write {output_dir}: {error.strerror or error}") from error
    return output_dir
