"""The stream of tasks, and the order of a task's images."""

from collections import Counter

import datasets
import numpy as np
import pytest
import torch
from PIL import Image

from diffusers_cl.config import TrainingConfig
from diffusers_cl.data import ImageSplit
from diffusers_cl.errors import DataError
from diffusers_cl.tasks import StepBatches, TaskImages, keep_batch, resolve_tasks


# Class 7 has id 0 and the class with id 7 is called otherwise.
NAMES = ["7", "cat", "dog", "bird", "fish"]


def split_of(labels: list[int], names=NAMES, resolution: int = 2) -> ImageSplit:
    """Returns a split whose image in row i has the grey level i on its left and 255 on its right."""
    pixels = [np.array([[i, 255]] * 2, dtype=np.uint8) for i in range(len(labels))]
    dataset = datasets.Dataset.from_dict(
        {"image": [Image.fromarray(image) for image in pixels]},
        features=datasets.Features({"image": datasets.Image()}),
    ).cast_column("image", datasets.Image(decode=False))
    return ImageSplit(dataset, "image", "train", np.array(labels), names, resolution, "pad", 1, np.arange(len(labels)))


@pytest.fixture(scope="module")
def split():
    return split_of([0, 1, 2, 3, 4] * 4)


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"tasks": [["cat", 2], [3, "7"]]}, [["cat", "dog"], ["bird", "7"]]),
        # A whole number that is a class's name is that class.
        ({"tasks": [[7], [1]]}, [["7"], ["cat"]]),
        ({"classes_per_task": 2}, [["7", "cat"], ["dog", "bird"], ["fish"]]),
        ({"classes_per_task": 3, "class_order": ["fish", 0, "dog"]}, [["fish", "7", "dog"]]),
    ],
)
def test_classes_of_tasks(split, settings, expected):
    assert resolve_tasks(TrainingConfig(**settings), split, split) == expected


def test_a_seeded_class_order(split):
    orders = {
        seed: resolve_tasks(TrainingConfig(classes_per_task=2, class_order=seed, seed=5), split, split)
        for seed in range(6)
    }
    for tasks in orders.values():
        assert sorted(name for names in tasks for name in names) == sorted(NAMES)
    assert len({str(tasks) for tasks in orders.values()}) > 1
    assert resolve_tasks(TrainingConfig(classes_per_task=2, class_order=3, seed=8), split, split) == orders[3]


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"tasks": [["cat"], [1]]}, ["'cat'", "more than one"]),
        ({"tasks": [["cow"]]}, ["tasks", "'cow'", "cat, dog"]),
        ({"tasks": [[5]]}, ["tasks", "5", "cat, dog"]),
        ({"tasks": [[-1]]}, ["tasks", "-1"]),
        ({"classes_per_task": 1, "class_order": ["cow"]}, ["class_order", "'cow'"]),
        ({"classes_per_task": 1, "class_order": ["cat", "cat"]}, ["'cat'", "more than one"]),
        ({"classes_per_task": 5, "num_class_embeds": 4}, ["num_class_embeds", "4", "5"]),
    ],
)
def test_faults_of_the_stream(split, settings, words):
    with pytest.raises(DataError) as error:
        resolve_tasks(TrainingConfig(**settings), split, split)
    assert all(word in str(error.value) for word in words)


@pytest.mark.parametrize("missing_in", ["train", "test"])
def test_a_class_without_images(split, missing_in):
    few = split_of([0, 1, 2, 3])
    few.name = missing_in
    splits = (few, split) if missing_in == "train" else (split, few)
    with pytest.raises(DataError, match=f"'fish' has no images in split '{missing_in}'"):
        resolve_tasks(TrainingConfig(classes_per_task=1), *splits)


def test_an_epoch_has_every_image_once():
    batches = list(StepBatches(10, 4, 9, seed=0, task=1))
    epochs = [sum(batches[start : start + 3], []) for start in (0, 3, 6)]
    assert [len(batch) for batch in batches] == 3 * [4, 4, 2]
    for number, epoch in enumerate(epochs):
        assert {key[0] for key in epoch} == {number} and sorted(key[1] for key in epoch) == list(range(10))
    orders = {tuple(index for _, index in epoch) for epoch in epochs}
    orders |= {
        tuple(index for _, index in sum(StepBatches(10, 4, 3, seed, task), [])) for seed, task in ((0, 2), (1, 1))
    }
    assert len(orders) == 5
    assert list(StepBatches(10, 4, 9, seed=0, task=1)) == batches


@pytest.mark.parametrize("start", range(8))
def test_going_on_in_the_middle(start):
    whole = list(StepBatches(10, 4, 7, seed=0, task=0))
    rest = StepBatches(10, 4, 7, seed=0, task=0, start=start)
    assert list(rest) == whole[start:] and len(rest) == 7 - start


@pytest.mark.parametrize("num_images", [8, 11, 3])
def test_two_processes_share_a_batch(num_images):
    whole = list(StepBatches(num_images, 4, 6, seed=0, task=0))
    ranks = [list(StepBatches(num_images, 2, 6, 0, 0, rank=rank, num_processes=2)) for rank in (0, 1)]
    for batch, first, second in zip(whole, *ranks, strict=True):
        assert len(first) == len(second) and set(first) | set(second) == set(batch)
        # One image comes twice where the batch is odd.
        assert len(first) + len(second) == len(batch) + len(batch) % 2


def test_images_and_class_ids(split):
    task = split.select(split.rows_of(["dog", "7"]))
    images = TaskImages(task, {"dog": 0, "7": 5})
    assert len(images) == 8
    batch, class_ids = images.__getitems__([(0, 1), (3, 6)])
    # Rows 0, 2, 5, 7, ... show 7 and dog by turns.
    assert batch.dtype == torch.uint8 and batch[:, 0, 0, 0].tolist() == [2, 15] and class_ids.tolist() == [0, 5]
    assert keep_batch((batch, class_ids)) == (batch, class_ids)


def test_a_flip_is_a_function_of_epoch_and_index(split):
    ids = {name: index for index, name in enumerate(NAMES)}
    plain, flipping = TaskImages(split, ids), TaskImages(split, ids, (0, "flip", 1))
    keys = [(epoch, index) for epoch in range(10) for index in range(20)]
    expected, images = plain.__getitems__(keys)[0], flipping.__getitems__(keys)[0]
    flipped = (images != expected).flatten(1).any(1)
    assert images[flipped].equal(expected[flipped].flip(-1)) and images[~flipped].equal(expected[~flipped])
    # 200 fair draws: 7 standard deviations are 50.
    assert 50 < flipped.sum() < 150
    by_key = dict(zip(keys, flipped.tolist(), strict=True))
    assert len(Counter(tuple(by_key[epoch, index] for epoch in range(10)) for index in range(20))) > 10
    torch.rand(3)
    shuffled = [keys[i] for i in torch.randperm(len(keys), generator=torch.Generator().manual_seed(0))]
    again = flipping.__getitems__(shuffled)[0]
    assert [bool(b) for b in (again != plain.__getitems__(shuffled)[0]).flatten(1).any(1)] == [
        by_key[key] for key in shuffled
    ]
    other = TaskImages(split, ids, (0, "flip", 2)).__getitems__(keys)[0]
    assert not other.equal(images)
