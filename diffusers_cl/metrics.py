"""Distances between real and generated images, and what a stream of tasks makes of them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from .randomness import permutation


FLOOR_RESAMPLINGS = 20
KLD_EPSILON = 1e-8


class Statistics(NamedTuple):
    """Mean, of shape `(dimension,)`, and unbiased covariance, `(dimension, dimension)`, of features, in float64."""

    mean: torch.Tensor
    covariance: torch.Tensor


def statistics(features: torch.Tensor) -> Statistics:
    """Returns what a Frechet distance needs of features of shape `(num_images, dimension)`, by torch-fidelity."""
    from torch_fidelity.metric_fid import fid_features_to_statistics

    found = fid_features_to_statistics(features.double())
    return Statistics(torch.from_numpy(found["mu"]), torch.from_numpy(found["sigma"]))


def frechet_distance(generated: torch.Tensor | Statistics, real: torch.Tensor | Statistics) -> float:
    """
    Returns the Frechet distance of two sets of features (FID, on Inception's), by torch-fidelity.

    Args:
        generated, real (`torch.Tensor` of shape `(num_images, dimension)`): at least two images each; or their
            [`Statistics`].
    """
    from torch_fidelity.metric_fid import fid_statistics_to_metric

    sides = [side if isinstance(side, Statistics) else statistics(side) for side in (generated, real)]
    distance = fid_statistics_to_metric(
        *({"mu": side.mean.numpy(), "sigma": side.covariance.numpy()} for side in sides), verbose=False
    )
    return distance["frechet_inception_distance"]


def kernel_distance(generated: torch.Tensor, real: torch.Tensor) -> float:
    """
    Returns the kernel distance of two sets of features (KID, on Inception's), by torch-fidelity.

    It is unbiased for independent draws. Sets with equal class counts, as here, are not: 0 to 0.1 below 0 with 1000 to 72
    images (results/experiments). Read it against its floor.
    """
    from torch_fidelity.metric_kid import kid_features_to_metric

    size = min(len(generated), len(real), 1000)
    # With all images in the subset there is only one.
    subsets = 1 if size == len(generated) == len(real) else 100
    distance = kid_features_to_metric(generated, real, kid_subsets=subsets, kid_subset_size=size, verbose=False)
    return distance["kernel_inception_distance_mean"]


def precision_and_recall(generated: torch.Tensor, real: torch.Tensor) -> tuple[float, float]:
    """
    Returns the share of generated images within the manifold of real ones, and the share of real images within that of
    generated ones (Kynkaanniemi et al., arXiv 1904.06991), by torch-fidelity: precision is low for images that are like
    none, recall for copies of a few.
    """
    from torch_fidelity.metric_prc import prc_features_to_metric

    # The neighbourhood cannot be larger than the set.
    neighborhood = min(3, len(generated) - 1, len(real) - 1)
    shares = prc_features_to_metric(generated, real, prc_neighborhood=neighborhood, verbose=False)
    return shares["precision"], shares["recall"]


def kl_divergence(generated: Sequence[str], real: Sequence[str], class_names: Sequence[str]) -> float:
    """
    Returns KL(real || generated) over the classes that a classifier predicts, each probability + 1e-8 (Masip et al.,
    arXiv 2311.14028).
    """
    p, q = (
        np.array([np.mean([name == predicted for predicted in predictions]) for name in class_names]) + KLD_EPSILON
        for predictions in (real, generated)
    )
    return float(np.sum(p * np.log(p / q)))


def distance_names(extractor: str) -> tuple[str, str]:
    """Returns what the two distances are called: FID and KID on Inception's features, by another name on any other."""
    if extractor == "inception":
        return "fid", "kid"
    kind = "classifier" if extractor == "classifier" else "features"
    return f"fd_{kind}", f"kd_{kind}"


def task_metrics(generated: torch.Tensor, real: torch.Tensor | Statistics, extractor: str) -> dict[str, float | None]:
    """
    Returns the distances of one model on one task, its precision and its recall, by name; `None` where statistics do not tell.

    Args:
        generated (`torch.Tensor` of shape `(num_images, dimension)`): features.
        real (`torch.Tensor` of the same kind, or [`Statistics`]): of the real images, as far as they are there.
        extractor (`str`): names the distances.
    """
    frechet, kernel = distance_names(extractor)
    known = not isinstance(real, Statistics)
    precision, recall = precision_and_recall(generated, real) if known else (None, None)
    return {
        frechet: frechet_distance(generated, real),
        kernel: kernel_distance(generated, real) if known else None,
        "precision": precision,
        "recall": recall,
    }


def accuracy(predictions: Sequence[str], labels: Sequence[str]) -> float:
    """Returns the share of images whose predicted class is the one that they were asked to show."""
    return float(np.mean([predicted == label for predicted, label in zip(predictions, labels, strict=True)]))


def accuracy_by_class(predictions: Sequence[str], labels: Sequence[str]) -> dict[str, float]:
    """Returns the share of images recognised as what they were asked to show, by class name."""
    return {
        name: float(np.mean([p == name for p, label in zip(predictions, labels, strict=True) if label == name]))
        for name in dict.fromkeys(labels)
    }


def _mean(values: Sequence[float | None]) -> float | None:
    """The mean, `None` where a value is not known."""
    return None if None in values else float(np.mean(values))


def summarize(matrix: Sequence[Sequence[float | None]], higher_is_better: bool = False) -> dict:
    """
    Returns the task matrix with average, learning, forgetting and worst task (arXiv 2509.23593, Sec. 4.2).

    `average[k]` is the mean of row k; `learning` the mean of the diagonal; `forgetting` the mean over all tasks of
    R[last, j] - R[j, j], so that average = learning + forgetting. For a metric of which more is better, forgetting is
    negative where the model forgot.

    Args:
        matrix: row k holds the metric on tasks 0 .. k after training task k, `None` where it could not be measured:
            what that enters is `None` too. A single row of several entries is a joint run: it has neither learning nor
            forgetting.
        higher_is_better (`bool`): decides which end of the last row is the worst.
    """
    matrix = [list(row) for row in matrix]
    last = matrix[-1]
    joint = len(matrix) == 1 and len(last) > 1
    diagonal = [row[-1] for row in matrix]

    known = None not in (*last, *diagonal)
    changes = [end - then for end, then in zip(last, diagonal, strict=True)] if known and not joint else [None]
    return {
        "matrix": matrix,
        "average": [_mean(row) for row in matrix],
        "learning": None if joint else _mean(diagonal),
        "forgetting": _mean(changes),
        "worst": None if None in last else float(min(last) if higher_is_better else max(last)),
    }


def summarize_classification(rows: list[dict]) -> dict:
    """
    Returns what `metrics.json` says of the metric rows' `classification`, of the tasks up to now: the last accuracy LA and
    the average incremental accuracy AIA are those of the finished stream only once it is finished.

    Args:
        rows (`list[dict]`): the metric rows of the models so far, the last with `classification`. What a row does not
            have, or a task whose images were not here, is `None`, and so is every mean that it enters.

    Returns:
        `dict`: `images_per_class`, `network`; `matrix`, row k the accuracy on the test images of tasks 0 .. k; its mean
        `average_accuracy` (arXiv 2510.02631, Eq. 22); `la`, the last of these; `aia`, their mean (Eq. 23) with the real
        images' value for the first task, as the paper has it; `aia_generated`, with generated ones there too; and `real`:
        `images_per_class` (fewest and most), `matrix` and `average_accuracy` of the classifier of real images, `None`
        after tasks that it was not trained after. A joint run is a single row: it has LA, but no AIA.
    """
    last = rows[-1]["classification"]
    found = [row.get("classification") for row in rows]
    matrix = [
        row["generated"] if row else [None] * len(other["num_images"]) for row, other in zip(found, rows, strict=True)
    ]
    real = [row and row["real"] for row in found]
    average, real_average = ([row and _mean(row) for row in side] for side in (matrix, real))
    joint = len(rows) == 1 and len(matrix[0]) > 1
    return {
        "images_per_class": last["images_per_class"],
        "network": last["network"],
        "average_accuracy": average,
        "matrix": matrix,
        "real": {
            "images_per_class": next((row["real_images"] for row in reversed(found) if row and row["real"]), None),
            "average_accuracy": real_average,
            "matrix": real,
        },
        "la": average[-1],
        "aia": None if joint else _mean([real_average[0], *average[1:]]),
        "aia_generated": None if joint else _mean(average),
    }


def floor(
    real_features: Sequence[torch.Tensor], labels: Sequence[Sequence[str]], extractor: str, seed: int = 0
) -> dict[str, dict]:
    """
    Returns, for both distances, what two disjoint halves of the real test images of a task are apart: a difference
    below it is noise.

    Both halves have the same number of images of every class, because generated images have the real ones' labels.

    Args:
        real_features (list of `torch.Tensor`): of every task.
        labels (list of lists of `str`): the class of every image.
        extractor (`str`): names the distances.
        seed (`int`): of the random halves.

    Returns:
        by metric: `mean` over tasks and resamplings, `std` (the spread over resamplings, averaged over tasks),
        `num_images` in a half and `per_task` means.
    """
    halves: list[list[tuple[torch.Tensor, torch.Tensor]]] = []
    for task, names in enumerate(labels):
        halves.append([])
        for resampling in range(FLOOR_RESAMPLINGS):
            first, second = [], []
            order = permutation(len(names), seed, "floor", task, resampling).tolist()
            for name in dict.fromkeys(names):
                rows = [row for row in order if names[row] == name]
                first += rows[: len(rows) // 2]
                second += rows[len(rows) // 2 : 2 * (len(rows) // 2)]
            halves[-1].append((real_features[task][first], real_features[task][second]))
    result = {}
    for name, distance in zip(distance_names(extractor), (frechet_distance, kernel_distance), strict=True):
        values = [[distance(*pair) for pair in pairs] for pairs in halves]
        result[name] = {
            "mean": float(np.mean(values)),
            "std": float(np.mean(np.std(values, axis=1))),
            "num_images": [len(pairs[0][0]) for pairs in halves],
            "per_task": [float(np.mean(row)) for row in values],
        }
    return result


def extend_floor(old: dict[str, dict], num_tasks: int, new: dict[str, dict]) -> dict[str, dict]:
    """
    Returns the floor of a stream that goes on: the first tasks' of `old`, then `new`'s, in the form of [`floor`]. The
    spread, which is kept as an average over tasks, is averaged with the numbers of tasks as weights.
    """
    result = {}
    for name, found in new.items():
        per_task = old[name]["per_task"][:num_tasks] + found["per_task"]
        spreads = [old[name]["std"]] * num_tasks + [found["std"]] * len(found["per_task"])
        result[name] = {
            "mean": float(np.mean(per_task)),
            "std": float(np.mean(spreads)),
            "num_images": old[name]["num_images"][:num_tasks] + found["num_images"],
            "per_task": per_task,
        }
    return result
