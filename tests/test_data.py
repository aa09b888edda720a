"""Datasets become splits: columns, classes, held-out images, and what an image becomes."""

import datasets
import numpy as np
import pytest
import torch
from datasets.arrow_writer import ArrowWriter
from PIL import Image
from script_helpers import write_images

from diffusers_cl.config import TrainingConfig
from diffusers_cl.data import load_splits
from diffusers_cl.errors import DataError
from diffusers_cl.tasks import resolve_tasks


@pytest.fixture
def load(tmp_path):
    """Returns `load_splits` of a configuration with a cache of its own."""

    def load(**settings):
        return load_splits(TrainingConfig(cache_dir=str(tmp_path / "cache"), **{"resolution": 8, **settings}))

    return load


@pytest.fixture
def write_parquet(tmp_path):
    """Returns a function that writes `{split: {column: (feature, values)}}` as a local dataset and gives its folder."""

    def write(splits: dict) -> str:
        folder = tmp_path / f"parquet-{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        for split, columns in splits.items():
            features = datasets.Features({name: feature for name, (feature, _) in columns.items()})
            dataset = datasets.Dataset.from_dict({n: values for n, (_, values) in columns.items()}, features=features)
            dataset.to_parquet(folder / f"{split}-00000-of-00001.parquet")
        return str(folder)

    return write


IMAGE = datasets.Image()


def grey(*levels: int, size: int = 8) -> list[Image.Image]:
    return [Image.new("L", (size, size), level) for level in levels]


def columns(image="image", label="label", names=("cat", "dog"), copies=10) -> dict:
    """Returns `copies` times a grey 10 of class 0 and a grey 200 of class 1."""
    return {
        image: (IMAGE, grey(10, 200) * copies),
        label: (datasets.ClassLabel(names=list(names)), [0, 1] * copies),
    }


def test_digits(load):
    train, test = load(dataset_name="digits", seed=0)
    assert (len(train.labels), len(test.labels), train.channels) == (1438, 359, 1)
    assert train.names == [str(digit) for digit in range(10)]
    totals = np.bincount(train.labels) + np.bincount(test.labels)
    assert np.bincount(test.labels).tolist() == [round(0.2 * total) for total in totals]
    assert sorted([*train.rows, *test.rows]) == list(range(1797))
    other = load(dataset_name="digits", seed=7)[1]
    assert other.rows.tolist() == test.rows.tolist()
    image = train.decode([0])
    assert image.shape == (1, 1, 8, 8) and image.dtype == torch.uint8
    # Grey levels 0 to 16 fill the range.
    images = train.decode(range(100))
    assert images.min() == 0 and images.max() == 255


@pytest.mark.parametrize(("image", "label"), [("image", "label"), ("img", "fine_label"), ("picture", "kind")], ids=str)
def test_columns_are_found(load, write_parquet, image, label):
    train, test = load(dataset_name=write_parquet({"train": columns(image, label)}))
    assert train.names == ["cat", "dog"] and (len(train.labels), len(test.labels)) == (16, 4)
    assert train.decode(train.rows_of(["dog"])).unique().tolist() == [200]


def test_columns_that_cannot_be_told_apart(load, write_parquet):
    two = {**columns("picture", "kind"), "other": (datasets.ClassLabel(names=["x"]), [0] * 20)}
    folder = write_parquet({"train": two})
    with pytest.raises(DataError, match="label_column.*picture, kind, other"):
        load(dataset_name=folder)
    assert load(dataset_name=folder, label_column="other")[0].names == ["x"]
    pictures = {**columns("a", "label"), "b": (IMAGE, grey(*[50] * 20))}
    folder = write_parquet({"train": pictures})
    with pytest.raises(DataError, match="image_column.*a, label, b"):
        load(dataset_name=folder)
    assert load(dataset_name=folder, image_column="b")[0].decode([0]).unique().tolist() == [50]
    # CIFAR-100 has both; the fine ones are its classes.
    both = {**columns("img", "fine_label"), "coarse_label": (datasets.ClassLabel(names=["x"]), [0] * 20)}
    assert load(dataset_name=write_parquet({"train": both}))[0].names == ["cat", "dog"]


@pytest.mark.parametrize(
    ("feature", "values", "names"),
    [
        (datasets.Value("string"), ["b", "a"] * 10, ["a", "b"]),
        (datasets.Value("int64"), [11, 2] * 10, ["2", "11"]),
    ],
)
def test_labels_that_are_no_class_label(load, write_parquet, feature, values, names):
    content = {"image": (IMAGE, grey(10, 200) * 10), "label": (feature, values)}
    train, _ = load(dataset_name=write_parquet({"train": content}))
    assert train.names == names and train.decode(train.rows_of([names[1]])).unique().tolist() == [10]
    test = {"image": (IMAGE, grey(1)), "label": (feature, [values[0] * 7])}
    with pytest.raises(DataError, match="training split does not have"):
        load(dataset_name=write_parquet({"train": content, "test": test}))


INTEGERS, STRINGS = datasets.Value("int64"), datasets.Value("string")


@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize(
    ("feature", "good", "bad", "words"),
    [
        (datasets.ClassLabel(names=["cat", "dog"]), [0, 1], None, "label None"),
        (datasets.ClassLabel(names=["cat", "dog"]), [0, 1], -1, "label '-1'; there are 2 classes"),
        (INTEGERS, [0, 1], None, "label None"),
        (INTEGERS, [0, 1], -1, "label '-1'.*whole numbers from 0"),
        (STRINGS, ["cat", "dog"], None, "label None"),
        (STRINGS, ["cat", "dog"], "", "label ''"),
    ],
)
def test_labels_that_are_none(load, write_parquet, feature, good, bad, words, split):
    labels = {name: good * 3 + [bad if name == split else good[0], good[1]] for name in ("train", "test")}
    content = {n: {"image": (IMAGE, grey(*[10, 200] * 4)), "label": (feature, values)} for n, values in labels.items()}
    with pytest.raises(DataError, match=f"row 6 of split '{split}' has the {words}"):
        load(dataset_name=write_parquet(content))


@pytest.mark.parametrize(
    ("feature", "values", "words"),
    [
        (
            datasets.Value("float32"),
            [0.5, 1.0],
            "row 0 .* the label 0.5, of label_column 'label', which holds .*float32",
        ),
        (
            datasets.Value("float64"),
            [0.0, float("nan")],
            "row 1 .* the label nan, .*allowed: ClassLabel, integers, strings",
        ),
        (datasets.Value("bool"), [True, None], "row 1 .* the label None, .*bool"),
        (IMAGE, grey(10, 20), "row 0 .* label_column 'label', which holds Image"),
    ],
)
def test_labels_of_another_type(load, write_parquet, feature, values, words):
    content = {"image": (IMAGE, grey(10, 20)), "label": (feature, values)}
    with pytest.raises(DataError, match=words):
        load(dataset_name=write_parquet({"train": content}), label_column="label")


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
@pytest.mark.parametrize("name", ["test-00000-of-00001", "train-00001-of-00002"])
def test_class_lists_that_differ(load, tmp_path, name, kind):
    """`datasets` reads the numbers of all files with the class list of the first one."""
    (tmp_path / "data").mkdir()

    def write(name, names, label):
        features = datasets.Features({"image": IMAGE, "label": datasets.ClassLabel(names=names)})
        dataset = datasets.Dataset.from_dict({"image": grey(10) * 10, "label": [label] * 10}, features=features)
        if kind == "parquet":
            dataset.to_parquet(tmp_path / "data" / f"{name}.parquet")
        else:
            with ArrowWriter(path=str(tmp_path / "data" / f"{name}.arrow"), features=features) as writer:
                writer.write_table(dataset.data.table)
                writer.finalize()

    first = "train-00000-of-00002" if name.startswith("train") else "train-00000-of-00001"
    write(first, ["cat", "dog"], 0)
    write(name, ["cat", "dog"], 0)
    assert load(dataset_name=str(tmp_path / "data"))[0].names == ["cat", "dog"]
    write(name, ["dog", "cat"], 1)
    with pytest.raises(DataError, match=f"label 0 is 'dog' in .*{name}.{kind}, but 'cat' in the dataset"):
        load(dataset_name=str(tmp_path / "data"))


def test_the_split_to_evaluate_on(load, write_parquet):
    train, few = columns(copies=10), columns(copies=1)
    names = {"train": train, "validation": few, "test": columns(copies=2)}
    assert load(dataset_name=write_parquet(names))[1].name == "test"
    assert load(dataset_name=write_parquet(names), eval_split="validation")[1].name == "validation"
    names.pop("test")
    kept, test = load(dataset_name=write_parquet(names))
    assert test.name == "validation" and len(test.labels) == 2 and len(kept.labels) == 20
    assert len(load(dataset_name=write_parquet(names), train_split="validation", eval_split="train")[0].labels) == 2
    # Without one, a fifth of every class, by the seed.
    held = [load(dataset_name=write_parquet({"train": train}), seed=seed)[1] for seed in (0, 0, 1)]
    assert np.bincount(held[0].labels).tolist() == [2, 2] and held[0].rows.tolist() == held[1].rows.tolist()
    assert held[2].rows.tolist() != held[0].rows.tolist()


def test_max_train_samples(load, write_parquet):
    folder = write_parquet({"train": columns()})
    whole, test = load(dataset_name=folder)
    some, same_test = load(dataset_name=folder, max_train_samples=5)
    assert (
        len(some.labels) == 5 and set(some.rows) <= set(whole.rows) and same_test.rows.tolist() == test.rows.tolist()
    )
    assert load(dataset_name=folder, max_train_samples=5)[0].rows.tolist() == some.rows.tolist()


@pytest.mark.parametrize("classes", [{"b": 10, "a": 5}, {"only": 5}], ids=["several", "single"])
def test_imagefolder(load, tmp_path, classes):
    train, test = load(train_data_dir=str(write_images(tmp_path / "data", classes)))
    assert train.names == sorted(classes) and len(train.labels) + len(test.labels) == sum(classes.values())
    first = train.decode(train.rows_of([next(iter(classes))]))
    assert first.max() < 10 and first.shape[1:] == (1, 8, 8)


def test_imagefolder_with_splits(load, tmp_path):
    write_images(tmp_path / "data" / "train", {"a": 3, "b": 3})
    write_images(tmp_path / "data" / "test", {"a": 2, "b": 2})
    train, test = load(train_data_dir=str(tmp_path / "data"))
    assert (len(train.labels), len(test.labels), test.name) == (6, 4, "test")


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("x.png", "there are images at .*x.png; allowed"),
        ("a/b/x.png", "there are images at .*a/b/x.png; allowed"),
        ("train/x.png", "a/00.png would be left out.*here train"),
        ("bullet train/x.png", "a/00.png would be left out"),
        ("a/x.avif", "a/x.avif would be left out"),
        ("a/a test.png", "train_split"),
        (".hidden/x.png", None),
        ("a/.x.png", None),
        ("a/notes.txt", None),
    ],
)
def test_images_where_no_class_is(load, tmp_path, path, words):
    """Left to itself, `datasets` counts them to a class of another name, or leaves all others out."""
    folder = write_images(tmp_path / "data", {"a": 10, "b": 10})
    (folder / path).parent.mkdir(exist_ok=True, parents=True)
    (folder / path).write_bytes((folder / "b" / "00.png").read_bytes())
    if words is None:
        assert load(train_data_dir=str(folder))[0].names == ["a", "b"]
    else:
        with pytest.raises(DataError, match=words):
            load(train_data_dir=str(folder))


def test_folders_that_are_no_classes(load, tmp_path):
    folder = write_images(tmp_path / "data", {"a": 10, "b": 10})
    (folder / "c").symlink_to(folder / "a")
    with pytest.raises(DataError, match="data/c is a link to a folder"):
        load(train_data_dir=str(folder))
    # All would be of one class, "train".
    for name in ("a", "b"):
        write_images(tmp_path / "turned" / name, {"train": 10})
    with pytest.raises(DataError, match="split 'train' would be made of the folders a, b"):
        load(train_data_dir=str(tmp_path / "turned"))
    # The folder of all may have any name, and be a link.
    (tmp_path / "my test data").symlink_to(write_images(tmp_path / "val", {"a": 10, "b": 10}))
    assert load(train_data_dir=str(tmp_path / "my test data"))[0].names == ["a", "b"]


def test_colours_and_sizes(load, write_parquet):
    wide = Image.new("RGB", (12, 8), (10, 20, 30))
    content = {"image": (IMAGE, [wide] * 5), "label": (datasets.ClassLabel(names=["a"]), [0] * 5)}
    folder = write_parquet({"train": content})
    image = load(dataset_name=folder, resolution=4)[0].decode([0])
    # The shorter side becomes 4, the longer is cropped.
    assert image.shape == (1, 3, 4, 4) and image[0].flatten(1).unique(dim=1).flatten().tolist() == [10, 20, 30]
    padded = load(dataset_name=folder, resolution=16, resize_mode="pad")[0].decode([0])[0]
    assert padded[:, 4:12, 2:14].flatten(1).unique(dim=1).flatten().tolist() == [10, 20, 30]
    assert padded.sum() == padded[:, 4:12, 2:14].sum()
    small = load(dataset_name=folder, resolution=8, resize_mode="pad")[0]
    with pytest.raises(DataError, match="12x8 is larger than resolution 8"):
        small.decode([0])


@pytest.mark.parametrize(("level", "expected"), [(65535, 255), (32896, 128), (257, 1), (200, 1), (0, 0)])
def test_16_bit_greyscale_is_scaled(load, tmp_path, level, expected):
    """Whatever the image holds: a dark one is not taken for one of 8 bits."""
    (tmp_path / "data" / "a").mkdir(parents=True)
    for index in range(5):
        pixels = np.full((8, 8), level, dtype=np.uint16)
        Image.fromarray(pixels).save(tmp_path / "data" / "a" / f"{index}.png")
    train, _ = load(train_data_dir=str(tmp_path / "data"))
    assert train.channels == 1 and train.decode([0]).unique().tolist() == [expected]


@pytest.mark.parametrize("row", [0, 7])
def test_a_corrupt_image_of_another_class_is_not_read(load, tmp_path, row):
    folder = write_images(tmp_path / "data", {"a": 10, "b": 10})
    file = sorted((folder / "a").iterdir())[row]
    file.write_bytes(file.read_bytes()[:40])
    train, test = load(train_data_dir=str(folder))
    config = TrainingConfig(tasks=[["b"]])
    assert resolve_tasks(config, train, test) == [["b"]]
    assert len(train.decode(train.rows_of(["b"]))) == 8
    position = [int(p) for split in (train, test) for p in np.flatnonzero(split.rows == row)]
    holder = train if row in train.rows else test
    with pytest.raises(DataError, match=f"row {row} of split 'train'.*{file.name}"):
        holder.decode(position)
