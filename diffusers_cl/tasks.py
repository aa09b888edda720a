"""The stream: which classes a task has, its images, and the order of its batches."""

import copy
from collections import Counter
from collections.abc import Iterator

import torch

from .config import TrainingConfig
from .data import ImageSplit
from .errors import DataError
from .randomness import derive_seed, permutation


def resolve_tasks(config: TrainingConfig, train: ImageSplit, test: ImageSplit) -> list[list[str]]:
    """
    Returns the class names of every task.

    An entry of `tasks` or `class_order` is a class name, or else (a whole number) a label id. Without both, all classes
    are one task.

    Raises:
        DataError: a class that the dataset does not have, a class in two tasks, a class without images; fewer
            `memory_bytes` than one image of every class takes.
    """

    names = train.names

    def name_of(entry: int | str, key: str) -> str:
        if str(entry) in names:
            return str(entry)
        if isinstance(entry, int) and 0 <= entry < len(names):
            return names[entry]
        known = ", ".join(names[:20]) + ", ..." * (len(names) > 20)
        hint = "; train_data_dir has to hold one folder a class" if config.train_data_dir is not None else ""
        raise DataError(f"{key}: the dataset has no class {entry!r}; it has {known}{hint}")

    if config.tasks is None and config.classes_per_task is None:
        tasks = [list(names)]
    elif config.tasks is not None:
        tasks = [[name_of(entry, "tasks") for entry in task] for task in config.tasks]
    else:
        if isinstance(config.class_order, list):
            order = [name_of(entry, "class_order") for entry in config.class_order]
        elif config.class_order is not None:
            order = [names[i] for i in permutation(len(names), config.class_order, "class_order")]
        else:
            order = names
        tasks = [order[i : i + config.classes_per_task] for i in range(0, len(order), config.classes_per_task)]
    flat = Counter(name for task in tasks for name in task)
    for name, count in flat.items():
        if count > 1:
            raise DataError(
                f"the class {name!r} stands in more than one place of the stream; every class belongs to one task"
            )
        for split in (train, test):
            if len(split.rows_of([name])) == 0:
                raise DataError(f"the class {name!r} has no images in split {split.name!r}")
    check_capacity(config, len(flat), train.channels * train.resolution**2)
    return tasks


def check_capacity(config: TrainingConfig, num_classes: int, image_bytes: int) -> None:
    """Raises `DataError` when `num_class_embeds` or `memory_bytes` leaves no room for all classes of a stream."""
    if config.num_class_embeds is not None and config.num_class_embeds < num_classes:
        raise DataError(f"num_class_embeds is {config.num_class_embeds}; the stream has {num_classes} classes")
    needed = num_classes * image_bytes
    if config.replay == "memory" and config.memory_bytes is not None and config.memory_bytes < needed:
        raise DataError(
            f"memory_bytes is {config.memory_bytes}; one image of each of {num_classes} classes takes {needed}"
        )


class TaskImages(torch.utils.data.Dataset):
    """
    The images of a task as `(uint8 image, class id)`, indexed by `(epoch, index)`, because a random flip is a function of
    both.
    """

    def __init__(self, split: ImageSplit, class_ids: dict[str, int], flip_key: tuple | None = None):
        self.split, self.flip_key = split, flip_key
        ids = torch.tensor([class_ids.get(name, -1) for name in split.names])
        self.class_ids = ids[torch.from_numpy(split.labels)]

    def __len__(self) -> int:
        return len(self.class_ids)

    def __getitems__(self, keys: list[tuple[int, int]]) -> tuple[torch.Tensor, torch.Tensor]:
        indices = torch.tensor([index for _, index in keys])
        images = self.split.decode(indices)
        if self.flip_key is not None:
            seed, *purpose = self.flip_key
            flipped = torch.tensor([derive_seed(seed, *purpose, *key) % 2 == 1 for key in keys])
            images = torch.where(flipped.to(images.device)[:, None, None, None], images.flip(-1), images)
        return images, self.class_ids[indices]


class StepBatches(torch.utils.data.Sampler):
    """
    The `(epoch, index)` keys of every batch of a task, from batch `start` on: a run that continues in the middle of an
    epoch sees what it would have seen. An epoch is a new order of all images, and its last batch may be smaller;
    with several processes a batch is shared out among them, wrapping around where it does not divide.
    """

    def __init__(
        self,
        num_images: int,
        batch_size: int,
        num_batches: int,
        seed: int,
        task: int,
        start=0,
        rank=0,
        num_processes=1,
    ):
        self.num_images, self.num_batches, self.start = num_images, num_batches, start
        self.seed, self.task, self.rank, self.num_processes = seed, task, rank, num_processes
        self.total_batch_size = batch_size * num_processes
        self.batches_per_epoch = -(-num_images // self.total_batch_size)

    def __len__(self) -> int:
        return self.num_batches - self.start

    def indices(self, first: int, last: int) -> list[int]:
        """Returns the images of the batches from `first` up to `last`, of all processes together."""
        parts = [copy.copy(self) for _ in range(self.num_processes)]
        for rank, part in enumerate(parts):
            part.start, part.num_batches, part.rank = first, last, rank
        return sorted({index for part in parts for keys in part for _, index in keys})

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        order, order_epoch = None, None
        for step in range(self.start, self.num_batches):
            epoch, batch = divmod(step, self.batches_per_epoch)
            if epoch != order_epoch:
                order, order_epoch = permutation(self.num_images, self.seed, "order", self.task, epoch).tolist(), epoch
            chunk = order[batch * self.total_batch_size : (batch + 1) * self.total_batch_size]
            padded = -(-len(chunk) // self.num_processes) * self.num_processes
            yield [(epoch, chunk[i % len(chunk)]) for i in range(self.rank, padded, self.num_processes)]


def keep_batch(batch):
    """A `collate_fn` for [`TaskImages`], whose batches come ready."""
    return batch
