"""Distances and the numbers of a stream, against closed forms and sums done by hand."""

import json
import math
import random

import numpy as np
import pytest
import scipy.linalg
import torch

from diffusers_cl.metrics import (
    FLOOR_RESAMPLINGS,
    accuracy,
    accuracy_by_class,
    distance_names,
    floor,
    frechet_distance,
    kernel_distance,
    kl_divergence,
    precision_and_recall,
    statistics,
    summarize,
    task_metrics,
)


# The matrix of a stream


def test_summary_of_a_matrix_by_hand():
    matrix = [[10.0], [30.0, 20.0], [50.0, 45.0, 15.0]]
    summary = summarize(matrix)
    assert summary == {
        "matrix": matrix,
        "average": [10.0, 25.0, pytest.approx(110 / 3)],
        "learning": 15.0,  # (10 + 20 + 15) / 3
        "forgetting": pytest.approx(65 / 3),  # (50 - 10 + 45 - 20 + 15 - 15) / 3
        "worst": 50.0,
    }
    assert summary["average"][-1] == pytest.approx(summary["learning"] + summary["forgetting"], rel=1e-12)


def test_average_is_learning_plus_forgetting():
    generator = np.random.default_rng(0)
    for num_tasks in (1, 2, 5):
        summary = summarize([generator.normal(size=k + 1).tolist() for k in range(num_tasks)])
        assert len(summary["average"]) == num_tasks
        assert summary["average"][-1] == pytest.approx(summary["learning"] + summary["forgetting"], rel=1e-12)


def test_summary_where_more_is_better():
    # Accuracy: the worst is the smallest of the last row, and forgetting is negative.
    summary = summarize([[0.9], [0.3, 0.8]], higher_is_better=True)
    assert summary["worst"] == 0.3
    assert summary["forgetting"] == pytest.approx(-0.3)
    assert summarize([[0.9], [0.3, 0.8]])["worst"] == 0.8


def test_a_joint_run_has_neither_learning_nor_forgetting():
    summary = summarize([[4.0, 6.0, 11.0]])
    assert summary == {
        "matrix": [[4.0, 6.0, 11.0]],
        "average": [7.0],
        "learning": None,
        "forgetting": None,
        "worst": 11.0,
    }


def test_one_task_has_forgotten_nothing():
    assert summarize([[7.0]]) == {
        "matrix": [[7.0]],
        "average": [7.0],
        "learning": 7.0,
        "forgetting": 0.0,
        "worst": 7.0,
    }


def test_summary_goes_into_json():
    matrix = [[np.float64(1.5)], (np.float64(2.5), np.float64(3.5))]
    assert json.loads(json.dumps(summarize(matrix)))["average"] == [1.5, 3.0]


# Distances


def features_of(mean: np.ndarray, covariance: np.ndarray, num_images: int = 50, seed: int = 0) -> torch.Tensor:
    """Features whose sample mean and covariance are these exactly (up to float64)."""
    white = np.random.default_rng(seed).normal(size=(num_images, len(mean)))
    white -= white.mean(axis=0)
    white = white @ np.linalg.inv(np.linalg.cholesky(np.cov(white, rowvar=False))).T
    return torch.from_numpy(white @ np.linalg.cholesky(covariance).T + mean)


def test_frechet_distance_of_gaussians_by_hand():
    mean, deviations = np.array([1.0, -2.0, 0.5]), np.array([1.0, 2.0, 0.5])
    real = features_of(mean, np.diag(deviations**2))
    # Only shifted: |3, 4, 0|^2. Only stretched: (2 - 1)^2 + (2 - 2)^2 + (1 - 0.5)^2. Float64 throughout.
    shifted = features_of(mean + np.array([3.0, 4.0, 0.0]), np.diag(deviations**2), seed=1)
    assert frechet_distance(shifted, real) == pytest.approx(25.0, rel=1e-6)
    stretched = features_of(mean, np.diag([4.0, 4.0, 1.0]), seed=1)
    assert frechet_distance(stretched, real) == pytest.approx(1.25, rel=1e-6)
    assert frechet_distance(real, real) == pytest.approx(0, abs=1e-6)


def test_frechet_distance_of_correlated_gaussians():
    generator = np.random.default_rng(3)
    (a, b), (first_mean, second_mean) = generator.normal(size=(2, 4, 4)), generator.normal(size=(2, 4))
    first, second = a @ a.T + np.eye(4), b @ b.T + np.eye(4)
    root = scipy.linalg.sqrtm(first)
    cross = scipy.linalg.sqrtm(root @ second @ root).real
    expected = np.sum((first_mean - second_mean) ** 2) + np.trace(first + second - 2 * cross)
    # Unequal numbers of images: the covariances are what they are.
    distance = frechet_distance(features_of(first_mean, first, 60), features_of(second_mean, second, 40, seed=1))
    assert distance == pytest.approx(expected, rel=1e-6)


def test_frechet_distance_of_float32_features():
    # Means and covariances are taken in float64: far from zero, a float32 mean would be off by a tenth of the distance.
    features = torch.randn(2, 500, 3, generator=torch.Generator().manual_seed(0)) + 1e5
    # A distance does not change when both are shifted. Float64 means at 1e5 are good to 1e-11.
    assert frechet_distance(*features) == pytest.approx(frechet_distance(*features.double() - 1e5), rel=1e-6)


def unbiased_mmd(first: np.ndarray, second: np.ndarray) -> float:
    """KID's MMD^2 (Binkowski et al., arXiv 1801.01401, Eq. 4) with k(x, y) = (x . y / d + 1)^3, term by term."""

    def mean_kernel(a, b, skip_equal):
        values = [
            (x @ y / len(x) + 1) ** 3 for i, x in enumerate(a) for j, y in enumerate(b) if not (skip_equal and i == j)
        ]
        return sum(values) / len(values)

    return mean_kernel(first, first, True) + mean_kernel(second, second, True) - 2 * mean_kernel(first, second, False)


def test_kernel_distance_by_hand():
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(12, 3)), generator.normal(size=(12, 3)) + 0.5
    expected = unbiased_mmd(first, second)
    assert expected > 0.1
    assert kernel_distance(torch.from_numpy(first), torch.from_numpy(second)) == pytest.approx(expected, rel=1e-9)


def test_kernel_distance_of_unequal_numbers_of_images():
    # A mean over 100 subsets of the smaller number: their spread is the tolerance.
    generator = np.random.default_rng(0)
    first, second = generator.normal(size=(60, 3)), generator.normal(size=(30, 3)) + 1
    first, second = torch.from_numpy(first), torch.from_numpy(second)
    distance = kernel_distance(first, second)
    assert distance == kernel_distance(first, second)
    assert distance == pytest.approx(unbiased_mmd(first.numpy(), second.numpy()), rel=0.1)
    assert distance != kernel_distance(first[:30], second)


def test_distances_grow_with_the_difference_and_are_small_for_the_same_distribution():
    generator = torch.Generator().manual_seed(0)
    real, other = torch.randn(2, 100, 4, generator=generator)
    for distance in (frechet_distance, kernel_distance):
        same, near, far = (distance(other + shift, real) for shift in (0.0, 0.5, 2.0))
        assert abs(same) < near < far


def test_precision_and_recall():
    generator = torch.Generator().manual_seed(0)
    real = torch.randn(60, 4, generator=generator)
    assert precision_and_recall(real, real) == (1.0, 1.0)
    assert precision_and_recall(real + 100, real) == (0.0, 0.0)
    # Copies of few images: those images are found, the others are not.
    precision, recall = precision_and_recall(real[:6].repeat(10, 1), real)
    assert precision == 1.0 and recall < 0.2


def test_precision_and_recall_of_very_few_images():
    # The neighbourhood of 3 is larger than the set.
    features = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    assert precision_and_recall(features, features) == (1.0, 1.0)


def test_kl_divergence_by_hand():
    names = ["a", "b", "c"]
    real, generated = ["a", "a", "b", "b"], ["a", "b", "b", "b"]
    # 1/2 log(1/2 / 1/4) + 1/2 log(1/2 / 3/4); the 1e-8 that are added move the 8th digit.
    expected = 0.5 * math.log(2) + 0.5 * math.log(2 / 3)
    assert kl_divergence(generated, real, names) == pytest.approx(expected, abs=1e-7)
    # KL(generated || real) is another number.
    assert kl_divergence(real, generated, names) == pytest.approx(
        0.25 * math.log(0.5) + 0.75 * math.log(1.5), abs=1e-7
    )
    assert kl_divergence(real, list(reversed(real)), names) == 0.0
    # A class that is not generated at all: finite, by the 1e-8 of Masip et al.
    assert kl_divergence(["a"] * 4, real, names) == pytest.approx(
        0.5 * math.log(0.5) + (0.5 + 1e-8) * math.log((0.5 + 1e-8) / 1e-8), rel=1e-6
    )


def test_accuracy_by_class():
    predictions = ["cat", "dog", "cat", "bird", "7"]
    labels = ["cat", "cat", "cat", "dog", "7"]
    accuracies = accuracy_by_class(predictions, labels)
    assert accuracies == {"cat": pytest.approx(2 / 3), "dog": 0.0, "7": 1.0}
    # In the order in which the classes were asked for.
    assert list(accuracies) == ["cat", "dog", "7"]


def test_names_of_the_distances():
    assert distance_names("inception") == ("fid", "kid")
    assert distance_names("classifier") == ("fd_classifier", "kd_classifier")
    # Never FID on other features.
    assert distance_names("microsoft/resnet-50") == ("fd_features", "kd_features")


def test_metrics_of_a_task():
    generator = torch.Generator().manual_seed(0)
    generated, real = torch.randn(2, 20, 3, generator=generator)
    assert task_metrics(generated, real, "inception") == {
        "fid": frechet_distance(generated, real),
        "kid": kernel_distance(generated, real),
        "precision": precision_and_recall(generated, real)[0],
        "recall": precision_and_recall(generated, real)[1],
    }
    metrics = task_metrics(generated, real, "classifier")
    assert metrics.keys() == {"fd_classifier", "kd_classifier", "precision", "recall"}
    assert all(type(value) is float for value in metrics.values())
    # Of what is no longer there, its statistics give the same Frechet distance, and nothing else.
    kept = task_metrics(generated, statistics(real), "inception")
    assert kept == {"fid": frechet_distance(generated, real), "kid": None, "precision": None, "recall": None}


def test_accuracy():
    assert accuracy(["a"] * 15 + ["b"] * 5, ["a", "b"] * 10) == (8 + 3) / 20


def test_predictions_and_labels_of_unequal_number_are_an_error():
    with pytest.raises(ValueError):
        accuracy_by_class(["a"], ["a", "b"])
    with pytest.raises(ValueError):
        accuracy(["a"], ["a", "b"])


# The floor


@pytest.fixture(scope="module")
def real_images() -> tuple[list[torch.Tensor], list[list[str]]]:
    """Features and labels of two tasks, of 20 + 11 and 12 + 12 images; a task's classes are far apart."""
    generator = torch.Generator().manual_seed(0)
    labels = [["a"] * 20 + ["b"] * 11, ["c", "d"] * 12]
    shifts = {"a": 0.0, "b": 50.0, "c": 0.0, "d": 50.0}
    features = [
        torch.randn(len(names), 3, generator=generator) + torch.tensor([shifts[name] for name in names])[:, None]
        for names in labels
    ]
    return features, labels


def test_floor_says_what_it_is(real_images):
    features, labels = real_images
    result = floor(features, labels, "inception")
    assert result.keys() == {"fid", "kid"}
    for metric in result.values():
        assert metric.keys() == {"mean", "std", "num_images", "per_task"}
        assert metric["num_images"] == [15, 12]
        assert len(metric["per_task"]) == 2
        assert metric["mean"] == pytest.approx(np.mean(metric["per_task"]))
        assert metric["std"] > 0
    assert floor(features, labels, "classifier").keys() == {"fd_classifier", "kd_classifier"}
    assert json.loads(json.dumps(result)) == result
    # Classes are 50 apart. With equal counts of each in both halves the halves are near each other; one image more
    # would move the mean by 50 / 15 and the distance by its square, 11.
    assert 0 < result["fid"]["mean"] < 3


def test_floor_is_a_function_of_the_seed(real_images):
    features, labels = real_images
    result = floor(features, labels, "inception")
    assert floor(features, labels, "inception") == result
    assert floor(features, labels, "inception", seed=0) == result
    assert floor(features, labels, "inception", seed=1)["fid"]["mean"] != result["fid"]["mean"]


def test_floor_is_of_disjoint_halves():
    # Every image is its own direction, of length 1000: a half with an image twice, or two halves with an image in
    # common, would be nearer to each other than 2 * 1000^2 / 4.
    features, labels = [1000.0 * torch.eye(8)], [["a", "b"] * 4]
    result = floor(features, labels, "inception")
    means = 2 * 1000.0**2 / 4
    # The trace of two covariances in orthogonal spaces, 3 eigenvalues of 1000^2 / 3 each.
    assert result["fid"]["per_task"] == [pytest.approx(means + 2 * 1000.0**2, rel=1e-3)]
    assert result["fid"]["num_images"] == [4]
    # All resamplings of such features are alike.
    assert result["fid"]["std"] < 1e-3 * means


def test_floor_is_over_several_resamplings(real_images):
    features, labels = real_images
    whole = floor([features[1]], [labels[1]], "inception")["fid"]
    assert FLOOR_RESAMPLINGS >= 10
    # The mean over resamplings is off by its standard error; a single one would be off by the spread.
    again = floor([features[1]], [labels[1]], "inception", seed=5)["fid"]
    assert abs(whole["mean"] - again["mean"]) < 5 * whole["std"] * math.sqrt(2 / FLOOR_RESAMPLINGS)


def test_global_random_states_are_untouched(real_images):
    features, labels = real_images
    before = torch.get_rng_state(), np.random.get_state()[1].copy(), random.getstate()
    floor(features, labels, "classifier")
    task_metrics(features[0], features[1], "classifier")
    assert torch.equal(torch.get_rng_state(), before[0])
    assert np.array_equal(np.random.get_state()[1], before[1])
    assert random.getstate() == before[2]
