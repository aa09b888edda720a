"""Measuring the model after every task: sampled images against the held-out ones, task by task."""

from collections.abc import Callable

import numpy as np
import torch

from .config import TrainingConfig
from .data import ImageSplit, cap_per_class
from .errors import DataError
from .features import FeatureExtractor
from .metrics import accuracy_by_class, floor, summarize, task_metrics
from .report import HIGHER_IS_BETTER


# Images a class in a sample grid, and the most classes that it shows.
GRID_COLUMNS = 10
MAX_GRID_ROWS = 100


class Evaluation:
    """
    Measures models on the held-out images of every task. Real features are extracted once.

    Args:
        test ([`ImageSplit`]): the held-out images.
        tasks (`list[list[str]]`): the classes of every task.
        class_ids (`dict[str, int]`): the model's id of every class.
        extractor ([`FeatureExtractor`]).
        config ([`TrainingConfig`]): `eval_images_per_class`.
    """

    def __init__(
        self,
        test: ImageSplit,
        tasks: list[list[str]],
        class_ids: dict[str, int],
        extractor: FeatureExtractor,
        config: TrainingConfig,
    ):
        self.tasks, self.class_ids, self.extractor = tasks, class_ids, extractor
        self.labels: list[list[str]] = []
        self.real: list[tuple] = []
        for names in tasks:
            split = cap_per_class(test, names, config.eval_images_per_class)
            if (np.bincount(split.labels) // 2).sum() < 2:
                raise DataError(
                    f"the task {', '.join(names)} has {len(split.labels)} image(s) to evaluate on; it takes two in each of"
                    " two halves that have equally many of every class (eval_images_per_class, eval_split)"
                )
            self.labels.append([split.names[label] for label in split.labels])
            self.real.append(extractor(split.decode(range(len(split.labels)))))
        self.info = dict(extractor.info)
        if extractor.class_names is not None:
            pairs = [
                pair
                for names, (_, found) in zip(self.labels, self.real, strict=True)
                for pair in zip(names, found, strict=True)
            ]
            self.info["test_accuracy"] = sum(name == predicted for name, predicted in pairs) / len(pairs)
        self.floor = floor([features for features, _ in self.real], self.labels, extractor.name)

    def __call__(
        self, sample: Callable[[list[int], list[tuple]], torch.Tensor], num_tasks: int
    ) -> tuple[dict, torch.Tensor]:
        """
        Returns the metric row of a model and the first images of every class.

        The noise of an image is a function of its class and index: the same after every task.

        Args:
            sample: maps class ids and noise keys to uint8 images.
            num_tasks (`int`): the tasks that the model has seen, from the first.

        Returns:
            `{"metrics": {name: [on task 0, 1, ...]}, "class_accuracy": {...} or None, "num_images": [...]}`, and images
            of shape `(classes * columns, channels, height, width)` for [`sampling.image_grid`].
        """
        labels = [name for task in self.labels[:num_tasks] for name in task]
        counts: dict[str, int] = {}
        keys = []
        for name in labels:
            keys.append(("eval", name, counts.setdefault(name, 0)))
            counts[name] += 1
        images = sample([self.class_ids[name] for name in labels], keys)

        rows: dict[str, list[float]] = {}
        features, predictions = self.extractor(images)
        start = 0
        for task in range(num_tasks):
            part = slice(start, start := start + len(self.labels[task]))
            real, real_predictions = self.real[task]
            values = task_metrics(
                features[part],
                real,
                self.extractor.name,
                predictions and predictions[part],
                real_predictions,
                self.extractor.class_names,
                labels[part],
            )
            for name, value in values.items():
                rows.setdefault(name, []).append(value)

        columns = min(GRID_COLUMNS, *counts.values())
        first = [i for i, (_, _, index) in enumerate(keys) if index < columns]
        row = {
            "metrics": rows,
            "class_accuracy": accuracy_by_class(predictions, labels) if predictions else None,
            "num_images": [len(task) for task in self.labels[:num_tasks]],
        }
        return row, images[first[: MAX_GRID_ROWS * columns]]

    def report(self, rows: list[dict]) -> dict:
        """Returns what `metrics.json` says of the metric rows of the models so far."""
        metrics = {
            name: summarize([row["metrics"][name] for row in rows], name in HIGHER_IS_BETTER)
            for name in rows[0]["metrics"]
        }
        return {
            "feature_extractor": self.extractor.name,
            "feature_extractor_info": self.info,
            "num_images": [row["num_images"] for row in rows],
            "floor": self.floor,
            "metrics": metrics,
            "class_accuracy": [row["class_accuracy"] for row in rows],
        }


def nearest_training_images(
    samples: torch.Tensor, columns: int, class_names: list[str], train: ImageSplit
) -> torch.Tensor:
    """
    Returns, for a sample grid, rows of generated images and below each row the nearest training images of that class
    (Euclidean distance of pixels): copies would show as equal pairs.

    Args:
        samples (`torch.Tensor` of shape `(classes * columns, channels, height, width)`): uint8.
        columns (`int`), class_names (`list[str]`): of the rows.
        train ([`ImageSplit`]): the real training split.
    """
    result = []
    for row, name in zip(samples.split(columns), class_names, strict=False):
        real = train.decode(train.rows_of([name]))
        distances = torch.cdist(row.flatten(1).float(), real.flatten(1).float())
        result += [row, real[distances.argmin(dim=1)]]
    return torch.cat(result)


def class_grid_columns(samples: torch.Tensor, num_classes: int) -> int:
    """Returns how many images of a class stand in a grid of `num_classes` rows (100 at most)."""
    return len(samples) // min(num_classes, MAX_GRID_ROWS)
