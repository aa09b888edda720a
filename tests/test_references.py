"""Reference statistics: they stand in for the test images that they were taken from, and for nothing else."""

import pytest
import torch

from diffusers_cl.errors import CheckpointError
from diffusers_cl.metrics import frechet_distance
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
    references.mean[1] = torch.zeros(4, dtype=torch.float64)
    references.save(tmp_path)
    with pytest.raises(CheckpointError, match="do not fit each other"):
        References.load(tmp_path)
