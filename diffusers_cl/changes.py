"""
What became of classes and tasks between two models that sampled from the same noise, held against the chance in it.

The interval of a change is the change plus or minus t standard deviations over resamplings of the images: images from the
same noise stay pairs, and t is Student's for the number of images of a class, at the confidence divided by the number of
comparisons (Bonferroni). Percentiles would take resamplings in proportion to that number, and on simulated models without a
difference they were wrong more often.
"""

from dataclasses import dataclass

import torch
from scipy.special import stdtrit

from .metrics import Statistics
from .randomness import generator
from .references import References


# With fewer images a class, intervals of accuracies are too short.
MIN_IMAGES = 20
# A task's distance is an eigenvalue problem for every resampling.
MAX_TASK_RESAMPLINGS = 200


@dataclass
class Judge:
    """
    Says what a change means.

    Args:
        num_comparisons (`int`): how many changes are looked at.
        num_images (`int`): of the class with the fewest.
        confidence (`float`): in (0, 1), that all of their intervals together have.
        max_regression (`float`): how much worse is tolerated: this share of the old distance, or this much accuracy.
    """

    num_comparisons: int
    num_images: int
    confidence: float
    max_regression: float

    @property
    def num_deviations(self) -> float:
        """Half the length of an interval, in standard deviations over resamplings."""
        degrees = self.num_images - 1
        student = float(stdtrit(degrees, 1 - (1 - self.confidence) / (2 * self.num_comparisons)))
        # Resamplings spread as if the images were all there is.
        return student * (self.num_images / degrees) ** 0.5

    def __call__(self, old: torch.Tensor, new: torch.Tensor, higher_is_better: bool) -> dict:
        """
        Returns old and new value, change, its interval, and the verdict: `worse`; `tolerated`, where it is worse but may be
        so by no more than the tolerance; `better`; or `same`, where no difference is shown.

        Args:
            old, new (`torch.Tensor` of shape `(1 + resamplings,)`): of all images, then of every resampling of them.
            higher_is_better (`bool`): of an accuracy, and not of a distance.
        """
        changes = new - old
        change, half = changes[0].item(), self.num_deviations * changes[1:].std().item()
        worsening = -change if higher_is_better else change
        tolerance = self.max_regression * (1.0 if higher_is_better else old[0].item())
        if worsening - half > tolerance:
            verdict = "worse"
        elif worsening - half > 0:
            verdict = "tolerated"
        else:
            verdict = "better" if worsening + half < 0 else "same"
        interval = [change - half, change + half]
        return {
            "old": old[0].item(),
            "new": new[0].item(),
            "change": change,
            "interval": interval,
            "verdict": verdict,
        }


def resampling_counts(num_images: int, resamplings: int, seed: int, name: str) -> torch.Tensor:
    """
    Returns how often each image of a class counts, float64 of shape `(1 + resamplings, num_images)`: once in the first row,
    and as often as it is drawn in the others.
    """
    drawn = torch.randint(num_images, (resamplings, num_images), generator=generator(seed, "gate", "resampling", name))
    counts = torch.zeros(resamplings, num_images, dtype=torch.float64)
    counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    return torch.cat([torch.ones(1, num_images, dtype=torch.float64), counts])


def class_distances(
    features: torch.Tensor, mean: torch.Tensor, variance: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """
    Returns the Frechet distance between Gaussians of diagonal covariance, `|m - m_r|^2 + |s - s_r|^2` with standard
    deviations s, for every row of counts.

    Args:
        features (`torch.Tensor` of shape `(num_images, dimension)`): of generated images of one class, float64.
        mean, variance (`torch.Tensor` of shape `(dimension,)`): of the real ones; the variance unbiased.
        counts (`torch.Tensor` of shape `(rows, num_images)`): from [`resampling_counts`].
    """
    num_images = len(features)
    centred = features - mean
    shift = counts @ centred / num_images
    found = (counts @ centred.square() / num_images - shift.square()).clamp(min=0) * num_images / (num_images - 1)
    return shift.square().sum(dim=1) + (found.sqrt() - variance.sqrt()).square().sum(dim=1)


def task_distances(
    features: torch.Tensor, real: Statistics, shares: torch.Tensor, counts: torch.Tensor
) -> torch.Tensor:
    """
    Returns the Frechet distance of a task's images, `|m - m_r|^2 + tr(C + C_r - 2 (C C_r)^(1/2))`, for every row of counts:
    [`metrics.frechet_distance`] where all images count alike.

    Args:
        features (`torch.Tensor` of shape `(num_images, dimension)`): float64.
        real ([`Statistics`]): of the task's real images.
        shares (`torch.Tensor` of shape `(num_images,)`): the weight of every image, in sum 1: a class has its share of the
            real images, however many were generated.
        counts (`torch.Tensor` of shape `(rows, num_images)`): from [`resampling_counts`] of its classes.
    """
    values, vectors = torch.linalg.eigh(real.covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    num_images, dimension = features.shape
    centred = features - real.mean
    projected = centred @ root
    result = []
    for weights in shares * counts:
        shift, projected_shift = weights @ centred, weights @ projected
        # Covariances are unbiased.
        weights = weights * num_images / (num_images - 1)
        trace = weights @ (centred - shift).square().sum(dim=1)
        rows = (projected - projected_shift) * weights.sqrt()[:, None]
        # tr (C C_r)^(1/2) is the sum of these rows' singular values, from the smaller of their Gram matrices.
        gram = rows @ rows.T if num_images < dimension else rows.T @ rows
        cross = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt().sum()
        result.append(shift.square().sum() + trace + values.sum() - 2 * cross)
    return torch.stack(result)


def compare(
    features: dict[str, tuple[torch.Tensor, torch.Tensor]],
    predictions: dict[str, tuple[list[str], list[str]]],
    references: References,
    resamplings: int = 1000,
    confidence: float = 0.95,
    max_regression: float = 0.0,
    seed: int = 0,
) -> dict:
    """
    Returns what became of every class and of every task: `{"num_comparisons", "num_deviations", "classes", "tasks"}`, the last two
    lists
    of `{"name", "distance", "accuracy"}` with what a [`Judge`] says; `accuracy` is `None` where it is not known.

    A class's distance is [`class_distances`], because few images have no covariance; a task's is [`task_distances`].

    Args:
        features (`dict`): by class name, of the old and of the new model's images from the same noise, float64.
        predictions (`dict`): likewise the classes that they are taken for, of the classes that can be recognised.
        references ([`References`]): of all these classes.
        resamplings (`int`).
        confidence, max_regression (`float`): as in [`Judge`].
        seed (`int`): of the resamplings.
    """
    tasks = [list(labels) for labels in references.labels]
    recognised = [all(name in predictions for name in names) for names in tasks]
    num_comparisons = len(features) + len(predictions) + len(tasks) + sum(recognised)
    judge = Judge(num_comparisons, min(len(old) for old, _ in features.values()), confidence, max_regression)
    counts, correct, classes = {}, {}, []
    for name, (old, new) in features.items():
        counts[name] = resampling_counts(len(old), resamplings, seed, name)
        real = references.class_mean[name], references.class_variance[name]
        distances = [class_distances(side, *real, counts[name]) for side in (old, new)]
        classes.append({"name": name, "distance": judge(*distances, higher_is_better=False), "accuracy": None})
        if name in predictions:
            found = [torch.tensor([p == name for p in side], dtype=torch.float64) for side in predictions[name]]
            correct[name] = [counts[name] @ side / len(side) for side in found]
            classes[-1]["accuracy"] = judge(*correct[name], higher_is_better=True)

    rows = []
    for task, names in enumerate(tasks):
        numbers = references.labels[task]
        share = {name: numbers[name] / sum(numbers.values()) for name in names}
        shares = torch.cat([counts[name][0] * share[name] / counts[name].shape[1] for name in names])
        drawn = torch.cat([counts[name][: 1 + MAX_TASK_RESAMPLINGS] for name in names], dim=1)
        images = [torch.cat([features[name][side] for name in names]) for side in (0, 1)]
        distances = [task_distances(side, references.of_task(task), shares, drawn) for side in images]
        rows.append(
            {"name": f"task-{task:02d}", "distance": judge(*distances, higher_is_better=False), "accuracy": None}
        )
        if recognised[task]:
            found = [sum(share[name] * correct[name][side] for name in names) for side in (0, 1)]
            rows[-1]["accuracy"] = judge(*found, higher_is_better=True)
    return {
        "num_comparisons": judge.num_comparisons,
        "num_deviations": judge.num_deviations,
        "classes": classes,
        "tasks": rows,
    }
