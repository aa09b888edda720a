"""What is kept of the real test images of every task, so that old tasks can be measured without their data."""

import json
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import CheckpointError, first_line
from .metrics import Statistics, statistics


REFERENCES_NAME = "references.safetensors"
# Of a class in a task: a file that says more is not of a measurement.
MAX_IMAGES = 10**7


def _are_counts(found) -> bool:
    return isinstance(found, dict) and all(
        isinstance(name, str) and type(count) is int and 0 < count <= MAX_IMAGES for name, count in found.items()
    )


@dataclass
class References:
    """
    Statistics of an extractor's features of the real test images, a list entry a task; everything in float64.

    Attributes:
        labels (list of `dict[str, int]`): class name to number of images, in the order of the evaluation.
        predicted (list of `dict[str, int]` or `None`): the classes that the extractor, where it is a classifier, gives
            the images, and how often.
        mean, covariance (lists of `torch.Tensor` of shape `(dimension,)` and `(dimension, dimension)`): unbiased.
        class_mean, class_variance (`dict[str, torch.Tensor]`): by class name, of shape `(dimension,)`, unbiased. A class
            that two tasks have is kept as its first task has it.
    """

    labels: list[dict[str, int]] = field(default_factory=list)
    predicted: list[dict[str, int] | None] = field(default_factory=list)
    mean: list[torch.Tensor] = field(default_factory=list)
    covariance: list[torch.Tensor] = field(default_factory=list)
    class_mean: dict[str, torch.Tensor] = field(default_factory=dict)
    class_variance: dict[str, torch.Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def of_task(self, task: int) -> Statistics:
        """Returns what a Frechet distance to a task's real images needs."""
        return Statistics(self.mean[task], self.covariance[task])

    def append(self, features: torch.Tensor, labels: list[str], predictions: list[str] | None) -> None:
        """
        Adds a task.

        Args:
            features (`torch.Tensor` of shape `(num_images, dimension)`): of its real test images.
            labels (list of `str`): their classes.
            predictions (list of `str`, *optional*): what a classifier takes them for.
        """
        whole = statistics(features)
        self.mean.append(whole.mean)
        self.covariance.append(whole.covariance)
        self.labels.append({name: labels.count(name) for name in dict.fromkeys(labels)})
        self.predicted.append(predictions and {name: predictions.count(name) for name in dict.fromkeys(predictions)})
        for name in self.labels[-1]:
            rows = features[[label == name for label in labels]].double()
            self.class_mean.setdefault(name, rows.mean(dim=0))
            # A single image has no spread.
            self.class_variance.setdefault(name, rows.var(dim=0, correction=min(1, len(rows) - 1)))

    def first(self, num_tasks: int) -> "References":
        """Returns the references of the first tasks."""
        names = {name for labels in self.labels[:num_tasks] for name in labels}
        return References(
            self.labels[:num_tasks],
            self.predicted[:num_tasks],
            self.mean[:num_tasks],
            self.covariance[:num_tasks],
            {name: mean for name, mean in self.class_mean.items() if name in names},
            {name: variance for name, variance in self.class_variance.items() if name in names},
        )

    def save(self, folder: str | Path) -> None:
        """Writes `references.safetensors` into a folder: `task-00.mean`, `task-00.covariance`, `class.mean`, ..."""
        tensors = {}
        for task, (mean, covariance) in enumerate(zip(self.mean, self.covariance, strict=True)):
            tensors[f"task-{task:02d}.mean"], tensors[f"task-{task:02d}.covariance"] = mean, covariance
        tensors["class.mean"] = torch.stack(list(self.class_mean.values()))
        tensors["class.variance"] = torch.stack([self.class_variance[name] for name in self.class_mean])
        content = {"labels": self.labels, "predicted": self.predicted, "class_names": list(self.class_mean)}
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(tensors, Path(folder) / REFERENCES_NAME, {"references": json.dumps(content)})

    @classmethod
    def load(cls, folder: str | Path) -> "References":
        """
        Returns what [`save`] wrote.

        Raises:
            CheckpointError: when the file is missing, damaged or not of one piece.
        """
        path = Path(folder) / REFERENCES_NAME
        try:
            with safe_open(path, framework="pt") as file:
                content = json.loads((file.metadata() or {})["references"])
                tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            labels, predicted, names = content["labels"], content["predicted"], content["class_names"]
            if not all(map(_are_counts, labels)) or not all(
                found is None or _are_counts(found) for found in predicted
            ):
                raise ValueError("its counts of images are not numbers from 1")
            if len(predicted) != len(labels) or {name for counts in labels for name in counts} != set(names):
                raise ValueError("it does not have the classes of its tasks")
            mean = [tensors[f"task-{task:02d}.mean"] for task in range(len(labels))]
            covariance = [tensors[f"task-{task:02d}.covariance"] for task in range(len(labels))]
            dimension = tensors["class.mean"].shape[1]
            expected = (
                [(dimension,)] * len(labels) + [(dimension, dimension)] * len(labels) + [(len(names), dimension)] * 2
            )
            found = [*mean, *covariance, tensors["class.mean"], tensors["class.variance"]]
            if expected != [tuple(tensor.shape) for tensor in found]:
                raise ValueError("its tensors do not fit each other")
            if not all(tensor.is_floating_point() and tensor.isfinite().all() for tensor in found):
                raise ValueError("its tensors have numbers that are not finite")
            return cls(
                labels,
                predicted,
                mean,
                covariance,
                dict(zip(names, tensors["class.mean"], strict=True)),
                dict(zip(names, tensors["class.variance"], strict=True)),
            )
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, IndexError, RecursionError) as error:
            raise CheckpointError(f"{path} cannot be read as reference statistics: {first_line(error)}") from error
