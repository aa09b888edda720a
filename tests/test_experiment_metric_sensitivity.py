"""The experiment on the metrics: its damages do what they say, and its threshold is the one that it states."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import diffusers_cl
from diffusers_cl import classifier
from diffusers_cl.metrics import frechet_distance, precision_and_recall


SCRIPT = Path(diffusers_cl.__file__).parents[1] / "scripts" / "experiments" / "metric_sensitivity.py"
SPEC = importlib.util.spec_from_file_location("metric_sensitivity", SCRIPT)
sensitivity = importlib.util.module_from_spec(SPEC)
# The dataclass of the script looks its module up.
sys.modules["metric_sensitivity"] = sensitivity
SPEC.loader.exec_module(sensitivity)

NUM_IMAGES = 600
TASK = [2, 3]


@pytest.fixture(scope="module")
def pool():
    """A pool of six classes, whose features are Gaussian, 4 apart, and shifted by blur; classifiers are always right."""
    rng = np.random.default_rng(0)
    labels = rng.permutation(np.arange(NUM_IMAGES) % 6)
    shifts = np.concatenate([np.full(NUM_IMAGES, sigma) for sigma in (0, *sensitivity.BLUR_SIGMAS)])
    means = 4 * np.eye(6, 8)[np.tile(labels, len(shifts) // NUM_IMAGES)]
    points = torch.from_numpy(means + np.tile(rng.normal(size=(NUM_IMAGES, 8)), (6, 1)) + 3 * shifts[:, None])
    distances = rng.random((NUM_IMAGES, sensitivity.NUM_MODES))
    return sensitivity.Pool(labels, distances, points, {0: points}, {0: np.tile(labels, 6)})


@pytest.fixture(scope="module")
def pair(pool):
    return sensitivity.draw_pair(pool.labels, TASK, 100, np.random.default_rng(0))


def damaged(pool, rows, name, strength):
    return sensitivity.damage(name, strength, rows, pool, np.random.default_rng(1))


def test_both_sets_are_balanced_and_disjoint(pool, pair):
    for rows in pair:
        assert len(set(rows)) == len(rows) == 100
        # Classes take turns, so that any first part is balanced too.
        assert pool.labels[rows].tolist() == TASK * 50
    assert not set(pair[0]) & set(pair[1])
    # 100 images of a class are not enough for two sets of 300.
    largest = sensitivity.draw_pair(pool.labels, TASK, 300, np.random.default_rng(0))
    assert sorted(np.concatenate(largest)) == np.flatnonzero(np.isin(pool.labels, TASK)).tolist()
    other = sensitivity.draw_pair(pool.labels, TASK, 100, np.random.default_rng(1))
    assert set(other[1]) != set(pair[1])


@pytest.mark.parametrize(("strength", "count"), [(1, 1), (5, 5), (20, 20)])
def test_damages_hit_exactly_their_share(pool, pair, strength, count):
    rows, labels = pair[1], pool.labels[pair[1]]
    for name in ("wrong_classes", "swapped_labels", "blur", "copies", "dropped_modes"):
        found, claimed = damaged(pool, rows, name, strength)
        assert np.sum((found != rows) | (claimed != labels)) == count, name
        assert len(found) == len(claimed) == len(rows)
        if name != "dropped_modes":
            assert (found[count:] == rows[count:]).all() and (claimed[count:] == labels[count:]).all()

    found, claimed = damaged(pool, rows, "wrong_classes", strength)
    assert not np.isin(pool.labels[found[:count]], TASK).any() and (claimed == labels).all()
    assert len(set(found)) == len(rows)
    found, claimed = damaged(pool, rows, "swapped_labels", strength)
    assert (found == rows).all() and (claimed[:count] == 5 - labels[:count]).all()
    found, claimed = damaged(pool, rows, "blur", strength)
    assert (found[:count] == rows[:count] + 5 * NUM_IMAGES).all() and (claimed == labels).all()
    found, claimed = damaged(pool, rows, "copies", strength)
    assert np.isin(found[:count], rows[count:]).all() and (pool.labels[found] == labels).all()
    assert len(set(found)) == len(rows) - count


def test_the_smallest_share_is_one_image_and_strengths_are_nested(pool, pair):
    assert np.sum(damaged(pool, pair[1][:10], "blur", 1)[0] != pair[1][:10]) == 1
    few, many = (damaged(pool, pair[1], "wrong_classes", strength)[0] for strength in (5, 20))
    assert (few[:5] == many[:5]).all()


def test_dropped_modes_are_the_nearest_to_one_centre(pool, pair):
    rows, labels = pair[1], pool.labels[pair[1]]
    found, claimed = damaged(pool, rows, "dropped_modes", 10)
    assert (claimed == labels).all() and (pool.labels[found] == labels).all()
    for label in TASK:
        own = rows[labels == label]
        lost, kept = set(own) - set(found), set(own) & set(found)
        assert len(lost) == 5 and len(kept) == 45
        modes = [
            mode
            for mode in range(sensitivity.NUM_MODES)
            if max(pool.mode_distances[list(lost), mode]) < min(pool.mode_distances[list(kept), mode])
        ]
        assert len(modes) == 1


def test_blur_all_takes_the_copies_of_its_sigma(pool, pair):
    for index, sigma in enumerate(sensitivity.BLUR_SIGMAS):
        assert (damaged(pool, pair[1], "blur_all", sigma)[0] == pair[1] + (1 + index) * NUM_IMAGES).all()


def test_metrics_see_what_they_must(pool, pair):
    reference, rows = pair
    known: dict = {}

    def measure(name, strength):
        return sensitivity.measure(*damaged(pool, rows, name, strength), reference, pool, known)

    clean, wrong, swapped, blurred = (
        measure(*condition)
        for condition in (("undamaged", 0), ("wrong_classes", 20), ("swapped_labels", 20), ("blur_all", 1.0))
    )
    assert clean["fd_classifier[0]"] == frechet_distance(pool.features[0][rows], pool.features[0][reference])
    expected = precision_and_recall(pool.features[0][rows], pool.features[0][reference])
    assert (clean["precision"], clean["recall"]) == expected
    for name in ("fd_classifier[0]", "kd_classifier", "fd_pixels"):
        assert min(wrong[name], blurred[name]) > 2 * clean[name]
    assert wrong["precision"] < clean["precision"] - 0.1
    assert (clean["accuracy[0]"], wrong["accuracy[0]"], swapped["accuracy[0]"]) == (1.0, 0.8, 0.8)
    assert {k: v for k, v in swapped.items() if k != "accuracy[0]"} == {
        k: v for k, v in clean.items() if k != "accuracy[0]"
    }


def made_up(name, slope):
    """Values of two tasks, of standard deviations 1 and 3, that rise by `slope` for every unit of strength."""
    spread = np.array([[-1.0, 1.0], [-3.0, 3.0]])
    return {(name, kind, s): spread + 10 + slope * s for kind, s in sensitivity.CONDITIONS}


def test_the_threshold_is_two_standard_deviations_averaged_over_tasks():
    # The spread is 2: a change of 4 is seen.
    summary = sensitivity.summarize(made_up("fd_classifier[0]", 0.8) | made_up("recall", -0.79) | made_up("kd", -4.0))
    assert summary["fd_classifier[0]"]["blur"][5] == pytest.approx({"mean": 14.0, "std": 2.0, "score": 2.0})
    assert summary["recall"]["blur"][20]["score"] == pytest.approx(7.9)
    # Better than undamaged, and seen all the same.
    assert summary["kd"]["blur"][1]["score"] == pytest.approx(-2.0)
    seen = sensitivity.smallest_seen(summary)
    assert "undamaged" not in seen["recall"]
    assert (seen["fd_classifier[0]"]["blur"], seen["recall"]["blur"], seen["kd"]["blur"]) == (5, 10, 1)
    assert seen["fd_classifier[0]"]["blur_all"] is None and seen["kd"]["blur_all"] == 1.0

    table = sensitivity.format_table({72: seen, 300: seen}).splitlines()
    assert "n = 72 / 300" in table[0]
    cells = dict(zip(table[2].split(" | "), table[4].split(" | "), strict=True))
    assert (
        cells["| metric"] == "| fd_classifier[0]"
        and cells["blur"] == "5 / 5"
        and cells["blur_all |"] == "none / none |"
    )


def test_agreement_of_two_classifiers():
    rng = np.random.default_rng(0)
    first = made_up("fd_classifier[0]", 1.0)
    twice = {("fd_classifier[1]", kind, s): 2 * values for (_, kind, s), values in first.items()}
    noise = {("fd_classifier[2]", kind, s): values + 50 * rng.random() for (_, kind, s), values in first.items()}
    found = sensitivity.agreement(sensitivity.summarize(first | twice | noise), [0, 1, 2])
    assert found["0, 1"]["tau"] == pytest.approx(1.0) and found["0, 1"]["ratio"] == pytest.approx(2.0)
    assert found["0, 1"]["ratio_added"] == pytest.approx(
        dict.fromkeys(["wrong_classes", "blur", "dropped_modes", "copies", "blur_all"], 2.0)
    )
    # Four kinds of damage at 5, 10 and 20 %.
    assert found["0, 1"]["num_seen"] == 12
    assert found["0, 2"]["tau"] < 0.8


def test_the_whole_experiment_on_digits(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(classifier, "CLASSIFIER_STEPS", 60)
    output, plot = tmp_path / "new" / "result.json", tmp_path / "scores.png"
    options = "--dataset_name digits --resolution 8 --sizes 20 1000 --classifier_seeds 0 1 --num_resamplings 2"
    sensitivity.main([*options.split(), "--output", str(output), "--plot", str(plot)])
    result = json.loads(output.read_text())
    assert result["tasks"] == [["0", "1"], ["2", "3"], ["4", "5"], ["6", "7"], ["8", "9"]]
    # A fifth of some 180 digits of a class, in two halves.
    assert result["num_images"]["20"] == [20] * 5 and set(result["num_images"]["1000"]) <= {34, 36}
    assert len({classifier["sha256"] for classifier in result["classifiers"]}) == 2
    assert all(classifier["test_accuracy"] > 0.8 for classifier in result["classifiers"])
    found = result["results"]["1000"]
    for seed in (0, 1):
        entries = found[f"fd_classifier[{seed}]"]
        assert entries["wrong_classes"]["20"]["score"] > 2 > abs(entries["swapped_labels"]["20"]["score"])
        assert found[f"accuracy[{seed}]"]["swapped_labels"]["20"]["score"] > 2
    # Classifiers differ, and agree on what is bad.
    means = [found[f"fd_classifier[{seed}]"]["undamaged"]["0"]["mean"] for seed in (0, 1)]
    assert means[0] != means[1]
    assert 0.5 < result["classifier_agreement"]["1000"]["0, 1"]["tau"] <= 1
    assert "| accuracy[1] |" in capsys.readouterr().out
    assert Image.open(plot).width > 1000
