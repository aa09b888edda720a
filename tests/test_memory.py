"""Replay without generated images: a memory of real ones, and learning without forgetting."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from script_helpers import arguments, run
from test_resume import assert_equal_runs

from diffusers_cl.config import TrainingConfig
from diffusers_cl.data import load_splits
from diffusers_cl.errors import DataError
from diffusers_cl.replay import LearningWithoutForgetting
from diffusers_cl.replay_images import extend_memory
from diffusers_cl.tasks import TaskImages, resolve_tasks


SETTINGS = {"penalty": "none", "tasks": "[[0, 1], [2], [3]]", "max_train_steps": 3, "fisher_samples": "null"}


@pytest.fixture(scope="module")
def train():
    return load_splits(TrainingConfig(dataset_name="digits", resolution=8, classes_per_task=2))[0]


def images_of(train, *class_ids) -> TaskImages:
    rows = train.select(train.rows_of([str(class_id) for class_id in class_ids]))
    return TaskImages(rows, {str(class_id): class_id for class_id in range(10)})


def by_class(memory) -> dict[int, torch.Tensor]:
    return {int(c): memory["images"][memory["class_labels"] == c] for c in memory["class_labels"].unique()}


def test_memory_keeps_real_images_of_every_class(train):
    first = extend_memory(None, images_of(train, 0, 1), 4, None, seed=0)
    assert first["images"].shape == (8, 1, 8, 8) and first["images"].dtype == torch.uint8
    assert first["class_labels"].tolist() == [0] * 4 + [1] * 4
    memory = extend_memory(first, images_of(train, 3), 4, None, seed=0)
    assert {c: len(rows) for c, rows in by_class(memory).items()} == {0: 4, 1: 4, 3: 4}
    for class_id, rows in by_class(memory).items():
        real = train.decode(train.rows_of([str(class_id)]))
        assert all((row == real).flatten(1).all(dim=1).any() for row in rows)
        assert len({bytes(row.numpy()) for row in rows}) == 4
    assert torch.equal(by_class(memory)[0], by_class(first)[0])
    # A choice of the seed, not the first ones.
    again, other = (extend_memory(None, images_of(train, 0, 1), 4, None, seed) for seed in (0, 1))
    assert torch.equal(again["images"], first["images"]) and not torch.equal(other["images"], first["images"])


def test_memory_within_bytes_shrinks_every_class(train):
    memory = None
    kept = []
    for class_id in range(3):
        before, memory = memory, extend_memory(memory, images_of(train, class_id), 99, 64 * 10, seed=0)
        assert memory["images"].nbytes <= 640
        kept.append(len(memory["images"]) // (class_id + 1))
        if before is not None:
            assert torch.equal(by_class(memory)[0], by_class(before)[0][: kept[-1]])
    assert kept == [10, 5, 3]


def test_too_few_bytes_are_an_error_before_training():
    settings = {"dataset_name": "digits", "resolution": 8, "tasks": [[0, 1], [2], [3]], "replay": "memory"}
    config = TrainingConfig(**settings, memory_bytes=255)
    with pytest.raises(DataError, match="memory_bytes is 255; one image of each of 4 classes takes 256"):
        resolve_tasks(config, *load_splits(config))
    config.memory_bytes = 256
    assert resolve_tasks(config, *load_splits(config)) == [["0", "1"], ["2"], ["3"]]


def test_lwf_puts_earlier_classes_on_the_new_images():
    replay = LearningWithoutForgetting()
    assert len(replay) == 0
    replay.update(None, torch.tensor([4, 7]), teacher=lambda images, timesteps, class_labels: None)
    new_images = torch.arange(6.0)[:, None, None, None].expand(6, 1, 8, 8)
    images, class_labels = replay.sample(new_images, torch.Generator().manual_seed(0))
    assert images is new_images and class_labels.shape == (6,) and set(class_labels.tolist()) == {4, 7}
    with pytest.raises(ValueError, match="no images"):
        replay.update(new_images, torch.tensor([4]), teacher=None)
    with pytest.raises(ValueError):
        replay.update(None, torch.tensor([], dtype=torch.long), teacher=None)


@pytest.mark.parametrize("replay", ["memory", "lwf"])
def test_a_run_goes_on_from_its_task_folders(files, tmp_path, replay):
    settings = SETTINGS | {"replay": replay, "memory_images_per_class": 3, "replay_refresh": "once"}
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    assert run(arguments(files, whole, **settings)) == 0
    assert not (whole / "replay").exists()
    record = json.loads((whole / "run.json").read_text())
    # Two evaluated classes, then three, then four; no image was generated for replay.
    assert record["images"]["generated"] == 4 * (2 + 3 + 4)
    assert record["images"]["replayed"] == 2 * 3 * 8
    memory = whole / "task-02" / "consolidation" / "memory.safetensors"
    if replay == "memory":
        assert {c: len(rows) for c, rows in by_class(load_file(memory)).items()} == {0: 3, 1: 3, 2: 3, 3: 3}
        assert record["stored_bytes"] == {"penalty": 0, "memory": 4 * 3 * (64 + 8), "replay": 0}
    else:
        assert not memory.exists() and sum(record["stored_bytes"].values()) == 0

    # As it was in the middle of the last task.
    shutil.copytree(whole, resumed)
    shutil.rmtree(resumed / "task-02")
    shutil.rmtree(resumed / "checkpoint-9")
    assert run(arguments(files, resumed, **settings)) == 0
    assert_equal_runs(resumed, whole, penalty=False)
    assert (whole / "metrics.json").read_bytes() == (resumed / "metrics.json").read_bytes()
