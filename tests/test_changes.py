"""What a change means: distances of resampled images against explicit ones, intervals, and how often chance fails a model."""

import pytest
import torch
from scipy.stats import t as student

from diffusers_cl.changes import (
    MIN_IMAGES,
    Judge,
    class_distances,
    compare,
    resampling_counts,
    task_distances,
)
from diffusers_cl.metrics import Statistics, frechet_distance, statistics
from diffusers_cl.references import References


def random_features(num_images: int, dimension: int, seed: int = 0, shift: float = 0.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(dimension, dimension, generator=generator, dtype=torch.float64)
    return torch.randn(num_images, dimension, generator=generator, dtype=torch.float64) @ mix + shift


def references_of(tasks: list[dict[str, int]], dimension: int) -> References:
    """References of standard normal features, class k shifted by k."""
    references, number = References(), 0
    for task in tasks:
        labels = [name for name, count in task.items() for _ in range(count)]
        shifts = {name: float(number + i) for i, name in enumerate(task)}
        features = random_features(len(labels), dimension, number) + torch.tensor([[shifts[n]] for n in labels])
        references.append(features, labels, None)
        number += len(task)
    return references


def test_counts_are_resamplings_and_a_function_of_seed_and_class():
    counts = resampling_counts(30, 200, 0, "cat")
    assert counts.shape == (201, 30) and counts[0].eq(1).all() and counts.sum(dim=1).eq(30).all()
    # With replacement, an image is left out of (1 - 1/30)^30 of them: five standard errors.
    share = (counts[1:] == 0).double().mean().item()
    assert share == pytest.approx((1 - 1 / 30) ** 30, abs=0.02)
    assert counts.equal(resampling_counts(30, 200, 0, "cat"))
    assert not counts.equal(resampling_counts(30, 200, 0, "dog")) and not counts.equal(
        resampling_counts(30, 200, 1, "cat")
    )


def test_class_distances_are_those_of_the_images_drawn():
    features, real = random_features(25, 6), random_features(40, 6, 1, shift=0.5)
    counts = resampling_counts(25, 5, 0, "cat")
    found = class_distances(features, real.mean(dim=0), real.var(dim=0), counts)
    for row, distance in zip(counts, found, strict=True):
        drawn = features.repeat_interleave(row.long(), dim=0)
        expected = (drawn.mean(dim=0) - real.mean(dim=0)).square().sum()
        expected += (drawn.std(dim=0) - real.std(dim=0)).square().sum()
        torch.testing.assert_close(distance, expected)


@pytest.mark.parametrize("dimension", [6, 70], ids=["few dimensions", "few images"])
def test_task_distances_are_frechet_distances_of_the_images_drawn(dimension):
    features, real = random_features(50, dimension), random_features(300, dimension, 1, shift=0.2)
    counts = torch.cat([resampling_counts(30, 4, 0, "cat"), resampling_counts(20, 4, 0, "dog")], dim=1)
    found = task_distances(features, statistics(real), torch.full((50,), 1 / 50, dtype=torch.float64), counts)
    for row, distance in zip(counts, found, strict=True):
        expected = frechet_distance(features.repeat_interleave(row.long(), dim=0), real)
        # Where there are fewer images than dimensions, torch-fidelity takes the root of a singular matrix.
        assert distance.item() == pytest.approx(expected, rel=1e-9 if dimension == 6 else 1e-4)


def test_classes_count_by_their_share_of_the_real_images():
    # Twice as many real images of the first class: as if each generated one of it were there twice.
    features, real = random_features(40, 5), statistics(random_features(90, 5, 1))
    shares = torch.tensor([2 / 60] * 20 + [1 / 60] * 20, dtype=torch.float64)
    found = task_distances(features, real, shares, torch.ones(1, 40, dtype=torch.float64))
    twice = statistics(torch.cat([features[:20], features]))
    # Unbiased for 40 images and not for 60.
    expected = Statistics(twice.mean, twice.covariance * (59 / 60) * (40 / 39))
    assert found.item() == pytest.approx(frechet_distance(expected, real), rel=1e-9)


@pytest.mark.parametrize(
    ("change", "tolerance", "verdict"),
    [
        (3.0, 0.0, "worse"),
        (1.0, 0.0, "same"),
        (-1.0, 0.0, "same"),
        (-3.0, 0.0, "better"),
        (3.0, 0.05, "worse"),
        (3.0, 0.2, "tolerated"),
        (3.0, 0.5, "tolerated"),
        (1.0, 0.5, "same"),
        (-3.0, 0.5, "better"),
    ],
)
def test_verdicts(change, tolerance, verdict):
    # An old value of 10, and an interval of the change plus or minus 1.96, because there are many images.
    spread = torch.randn(1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spread = (spread - spread.mean()) / spread.std()
    old = torch.full((1001,), 10.0, dtype=torch.float64)
    new = old + change + torch.cat([torch.zeros(1, dtype=torch.float64), spread])
    found = Judge(1, 10**6, 0.95, tolerance)(old, new, higher_is_better=False)
    assert found["verdict"] == verdict and (found["old"], found["new"]) == (10.0, 10.0 + change)
    assert found["change"] == pytest.approx(change)
    assert found["interval"] == pytest.approx([change - 1.95996, change + 1.95996], abs=1e-4)
    # Accuracies: less is worse, and the tolerance is a difference.
    found = Judge(1, 10**6, 0.95, 10 * tolerance)(old, old - (new - old), higher_is_better=True)
    assert found["verdict"] == verdict and found["change"] == pytest.approx(-change)


def test_intervals_are_longer_with_more_comparisons():
    assert Judge(1, 10**6, 0.95, 0.0).num_deviations == pytest.approx(1.95996, abs=1e-4)
    expected = student.ppf(1 - 0.05 / 40, df=24) * (25 / 24) ** 0.5
    assert Judge(20, 25, 0.95, 0.0).num_deviations == pytest.approx(expected)
    references = references_of([{"cat": 30, "dog": 30}, {"bird": 30}], 4)
    features = {name: (random_features(20, 4, 7),) * 2 for name in ("cat", "dog", "bird")}
    predictions = {name: ([name] * 20,) * 2 for name in ("cat", "bird")}
    result = compare(features, predictions, references, resamplings=100)
    # Distances of three classes and two tasks; accuracies of two classes and of the task whose classes all have one.
    assert result["num_comparisons"] == 8 and result["num_deviations"] == Judge(8, 20, 0.95, 0.0).num_deviations
    assert [row["name"] for row in result["classes"]] == ["cat", "dog", "bird"]
    assert [row["accuracy"] is None for row in result["classes"]] == [False, True, False]
    assert [row["name"] for row in result["tasks"]] == ["task-00", "task-01"]
    assert [row["accuracy"] is None for row in result["tasks"]] == [True, False]
    for row in [*result["classes"], *result["tasks"]]:
        assert row["distance"]["change"] == 0.0 and row["distance"]["interval"] == [0.0, 0.0]
        assert row["distance"]["verdict"] == "same"


def test_accuracy_of_a_task_weighs_classes_as_the_real_images_do():
    references = references_of([{"cat": 30, "dog": 10}], 4)
    features = {name: (random_features(20, 4, 7),) * 2 for name in ("cat", "dog")}
    predictions = {"cat": (["cat"] * 20, ["cat"] * 20), "dog": (["dog"] * 20, ["dog"] * 10 + ["cat"] * 10)}
    result = compare(features, predictions, references, resamplings=400)
    cat, dog = (row["accuracy"] for row in result["classes"])
    assert (cat["change"], cat["interval"], cat["verdict"]) == (0.0, [0.0, 0.0], "same")
    assert (dog["old"], dog["new"], dog["verdict"]) == (1.0, 0.5, "worse")
    # The standard error of a share of a half, from 20 images.
    assert dog["interval"][1] - dog["change"] == pytest.approx(result["num_deviations"] * (0.25 / 20) ** 0.5, rel=0.15)
    assert result["tasks"][0]["accuracy"]["change"] == pytest.approx(-0.125)


def test_images_from_the_same_noise_are_pairs():
    references = references_of([{"cat": 60}], 4)
    old = random_features(40, 4, 7)
    new = old + 0.3
    pairs = compare({"cat": (old, new)}, {}, references)["classes"][0]["distance"]
    others = compare({"cat": (old, new.roll(1, dims=0))}, {}, references)["classes"][0]["distance"]
    assert pairs["change"] == pytest.approx(others["change"])
    lengths = [side["interval"][1] - side["interval"][0] for side in (pairs, others)]
    assert lengths[0] < lengths[1] / 2


def test_chance_seldom_fails_a_model():
    """Of models that differ by chance alone, few may fail: 5 % are promised. Without a correction many would."""
    references = references_of([{"a": 50, "b": 50, "c": 50}], 4)
    num_gates, failed, uncorrected = 40, 0, 0
    for gate in range(num_gates):
        features, predictions = {}, {}
        for index, name in enumerate("abc"):
            generator = torch.Generator().manual_seed(1000 * gate + index)
            shared, *own = torch.randn(3, MIN_IMAGES, 4, generator=generator, dtype=torch.float64)
            features[name] = tuple(shared + 0.5 * side + index for side in own)
            right = torch.rand(2, MIN_IMAGES, generator=generator) < 0.8
            predictions[name] = tuple([name if one else "other" for one in side] for side in right.tolist())
        result = compare(features, predictions, references, resamplings=100)
        measured = [row[key] for row in [*result["classes"], *result["tasks"]] for key in ("distance", "accuracy")]
        failed += any(one["verdict"] == "worse" for one in measured)
        for row in [*result["classes"], *result["tasks"]]:
            for key, sign in (("distance", 1), ("accuracy", -1)):
                half = (row[key]["interval"][1] - row[key]["change"]) / result["num_deviations"] * 1.96
                row[key] = sign * row[key]["change"] - half > 0
        uncorrected += any(
            row[key] for row in [*result["classes"], *result["tasks"]] for key in ("distance", "accuracy")
        )
    assert failed <= 0.05 * num_gates and uncorrected > 2 * 0.05 * num_gates
