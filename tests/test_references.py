"""Reference statistics: they stand in for the test images that they were taken from, and for nothing else."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_cl.errors import CheckpointError
from diffusers_cl.metrics import extend_floor, floor, frechet_distance, summarize
from diffusers_cl.references import REFERENCES_NAME, References


LABELS = [["cat"] * 5 + ["dog"] * 4, ["7"] * 6]


@pytest.fixture
def features():
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(len(labels), 3, generator=generator, dtype=torch.float64) for labels in LABELS]


@pytest.fixture
def references(features):
    references = References()
    references.append(features[0], LABELS[0], ["cat"] * 9)
    references.append(features[1], LABELS[1], None)
    return references


def test_distances_to_references_are_distances_to_the_images(references, features, tmp_path):
    references.save(tmp_path)
    loaded = References.load(tmp_path)
    generated = torch.randn(20, 3, generator=torch.Generator().manual_seed(1))
    for task, real in enumerate(features):
        assert frechet_distance(generated, loaded.of_task(task)) == frechet_distance(generated, real)
    assert loaded.labels == [{"cat": 5, "dog": 4}, {"7": 6}] and loaded.predicted == [{"cat": 9}, None]
    assert list(loaded.class_mean) == ["cat", "dog", "7"]
    torch.testing.assert_close(loaded.class_mean["dog"], features[0][5:].mean(dim=0))
    torch.testing.assert_close(loaded.class_variance["dog"], features[0][5:].var(dim=0))


def test_the_first_tasks_alone(references):
    first = references.first(1)
    assert (
        len(first) == 1 and list(first.class_mean) == ["cat", "dog"] and list(first.class_variance) == ["cat", "dog"]
    )
    # A copy: what is added to it is not added to the whole.
    first.append(torch.zeros(2, 3), ["cat", "owl"], None)
    assert len(first) == 2 and len(references) == 2 and "owl" not in references.class_mean
    # A class that is refined keeps its first reference, and one image has no spread.
    assert torch.equal(first.class_mean["cat"], references.class_mean["cat"])
    assert not first.class_variance["owl"].any()


def test_damage_is_one_sentence(references, tmp_path):
    with pytest.raises(CheckpointError, match="cannot be read as reference statistics"):
        References.load(tmp_path)
    references.save(tmp_path)
    path = tmp_path / REFERENCES_NAME
    whole = path.read_bytes()
    for damaged in (b"", whole[:40], whole[:-8], whole.replace(b"references", b"referencez", 1)):
        path.write_bytes(damaged)
        with pytest.raises(CheckpointError, match="cannot be read as reference statistics"):
            References.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"task-01.mean": torch.zeros(4).double()}, "do not fit each other"),
        ({"task-00.covariance": torch.zeros(3, 4).double()}, "do not fit each other"),
        ({"class.variance": torch.zeros(3, 2).double()}, "do not fit each other"),
        ({"class.mean": torch.zeros(3).double()}, "reference statistics"),
        ({"task-00.mean": torch.full((3,), float("nan")).double()}, "not finite"),
        ({"class.variance": torch.zeros(3, 3, dtype=torch.int64)}, "not finite"),
        ({"labels": {"cat": 1}}, "numbers from 1"),
        ({"labels": [{"cat": 5, "dog": 10**12}, {"7": 6}]}, "numbers from 1"),
        ({"labels": [{"cat": 5, "dog": True}, {"7": 6}]}, "numbers from 1"),
        ({"predicted": [{"cat": -9}, None]}, "numbers from 1"),
        ({"predicted": [None]}, "the classes of its tasks"),
        ({"class_names": ["cat", "dog", "owl"]}, "the classes of its tasks"),
        ({"labels": 3}, "reference statistics"),
    ],
    ids=str,
)
def test_what_nobody_measured_is_refused(references, tmp_path, change, message):
    references.save(tmp_path)
    path = tmp_path / REFERENCES_NAME
    with safe_open(path, "pt") as file:
        content = json.loads(file.metadata()["references"])
    tensors = load_file(path)
    for key, value in change.items():
        (tensors if isinstance(value, torch.Tensor) else content)[key] = value
    save_file(tensors, path, {"references": json.dumps(content)})
    with pytest.raises(CheckpointError, match=message):
        References.load(tmp_path)


def test_what_is_not_known_is_no_number():
    # A stream that went on without the first task's images.
    values = summarize([[0.5], [None, 0.7], [None, 0.6, 0.9]])
    assert values["average"] == [0.5, None, None] and values["learning"] == pytest.approx(0.7)
    assert values["forgetting"] is None and values["worst"] is None
    # New classes that the classifier has never seen.
    values = summarize([[0.9], [0.8, None]], higher_is_better=True)
    assert values["average"] == [0.9, None] and values["learning"] is None and values["worst"] is None


def test_the_floor_of_a_stream_that_goes_on(features):
    whole = floor(features, LABELS, "inception")
    first, second = floor(features[:1], LABELS[:1], "inception"), floor(features[1:], LABELS[1:], "inception")
    # The halves are drawn by a task's number, so the second is another sample of the same.
    joined = extend_floor(whole, 1, second)
    for name, found in joined.items():
        assert found["per_task"] == [first[name]["per_task"][0], *second[name]["per_task"]]
        assert found["mean"] == pytest.approx(sum(found["per_task"]) / 2)
        assert found["num_images"] == whole[name]["num_images"]
        assert found["std"] == pytest.approx((whole[name]["std"] + second[name]["std"]) / 2)
