"""The scan before training: what it refuses, counts and remembers, and what changes its fingerprint."""

import json
import os
import shutil

import datasets
import numpy as np
import pytest
from damaged_data import encoded
from PIL import Image
from script_helpers import write_images
from torture_data import damaged_data_folders

from diffusers_cl import data, preflight
from diffusers_cl.config import TrainingConfig
from diffusers_cl.data import ImageSplit, load_splits
from diffusers_cl.errors import DataError, StorageError
from diffusers_cl.preflight import scan


# More than a chunk, so that chunks have to stay in order.
COUNT = data.CHUNK + 5
NAMES = ["a", "b"]


def as_split(contents: list[bytes], labels: list[int] | None = None, name: str = "train", names=NAMES) -> ImageSplit:
    """Returns a split that lies in memory."""
    entries = [
        content if isinstance(content, dict | None) else {"bytes": content, "path": None} for content in contents
    ]
    features = datasets.Features({"image": datasets.Image(decode=False)})
    dataset = datasets.Dataset.from_dict({"image": entries}, features=features)
    labels = np.array(labels if labels is not None else [0] * len(entries))
    return ImageSplit(dataset, "image", name, labels, list(names), 8, "resize", 1, np.arange(len(entries)))


def grey(level: int, mode: str = "L") -> bytes:
    return encoded(Image.new("L", (8, 8), level).convert(mode))


CONTENTS = [grey(level) for level in range(COUNT)]


@pytest.fixture
def load(tmp_path):
    """Returns a function that loads an image folder and scans it, with a cache of its own."""

    def load(folder, **settings):
        config = TrainingConfig(
            train_data_dir=str(folder), cache_dir=str(tmp_path / "cache"), **{"resolution": 8, **settings}
        )
        splits = load_splits(config)
        return scan(list(splits), splits[0].names, config.cache_dir, quiet=True)

    return load


@pytest.fixture
def looked_at(monkeypatch) -> list:
    """What the scan has looked at."""
    entries, check = [], preflight._check
    monkeypatch.setattr(preflight, "_check", lambda entry, split: (entries.append(entry), check(entry, split))[1])
    return entries


def test_sound_images(tmp_path, capfd):
    found = scan([as_split(CONTENTS), as_split(CONTENTS[:3], name="test")], NAMES, tmp_path, quiet=True)
    assert found.keys() == {"fingerprint", "images", "converted"}
    assert found["images"] == COUNT + 3 and found["converted"] == {} and len(found["fingerprint"]) == 64
    # In memory it is quick to look again.
    assert list(tmp_path.iterdir()) == [] and capfd.readouterr().err == ""


def test_conversions_are_counted(tmp_path):
    contents = [grey(1), grey(2, "RGBA"), grey(3, "P"), grey(4, "RGBA"), grey(255, "1"), grey(6, "RGB")]
    found = scan([as_split(contents)], NAMES, tmp_path, quiet=True)
    assert found["converted"] == {"1-bit": 1, "colour to grey": 3, "palette": 1, "transparent": 2}
    assert list(found["converted"]) == sorted(found["converted"])


@pytest.mark.parametrize("count", [1, 2, 3, 20])
def test_bad_images_are_named(tmp_path, count):
    contents = list(CONTENTS)
    for row in range(COUNT - count, COUNT):
        contents[row] = b"no image"
    with pytest.raises(DataError) as error:
        scan([as_split(CONTENTS[:2], name="first"), as_split(contents)], NAMES, tmp_path, quiet=True)
    lines = str(error.value).splitlines()
    assert lines[0].startswith(f"{count} of {COUNT + 2} images cannot be used") and len(lines) == 1 + min(count, 2)
    assert all("split 'train'" in line and f"row {COUNT - count + n} " in line for n, line in enumerate(lines[1:]))
    # All of them, where the message has no room.
    listed = [path.read_text().splitlines() for path in (tmp_path / "diffusers_cl").glob("*.txt")]
    assert [len(rows) for rows in listed] == ([count] if count > 2 else [])
    if count > 2:
        assert listed[0][:2] == lines[1:] and lines[0].endswith(".txt") and os.path.exists(lines[0].split()[-1])


def test_images_of_other_classes_are_not_read(tmp_path):
    split = as_split([grey(1), b"", None, grey(2)], [0, 1, 1, 0])
    assert scan([split], ["a", "not here"], tmp_path, quiet=True)["images"] == 2
    with pytest.raises(DataError, match="2 of 4 images.*\n.*row 1 .*0 bytes\n.*row 2 .*no image"):
        scan([split], ["b", "a"], tmp_path, quiet=True)


def test_no_rows_and_odd_names(tmp_path):
    assert scan([as_split([grey(1)])], ["not here"], tmp_path, quiet=True)["images"] == 0
    # A name of several lines does not make the message longer.
    (tmp_path / "a\nb\x1b.png").write_bytes(b"")
    with pytest.raises(DataError) as error:
        scan([as_split([{"bytes": None, "path": str(tmp_path / "a\nb\x1b.png")}] * 3)], NAMES, tmp_path, quiet=True)
    assert len(str(error.value).splitlines()) == 3 and "\x1b" not in str(error.value)


def test_a_bomb_of_either_size(tmp_path, monkeypatch):
    # Between one and two times the limit Pillow only warns.
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 64 * 100)
    large = [encoded(Image.new("L", (side, side))) for side in (80, 100, 120)]
    with pytest.raises(DataError, match="2 of 3 images.*\n.*row 1 .*10000 pixels.*\n.*row 2 .*14400 pixels"):
        scan([as_split(large)], NAMES, tmp_path, quiet=True)


FINGERPRINT_CHANGES = {
    "an image": lambda: as_split([*CONTENTS[:-1], grey(200)]),
    "a label": lambda: as_split(CONTENTS, [0] * (COUNT - 1) + [1]),
    "order": lambda: as_split(CONTENTS[::-1]),
    "fewer rows": lambda: as_split(CONTENTS[:-1]),
    "more rows": lambda: as_split([*CONTENTS, grey(200)]),
    "name of the split": lambda: as_split(CONTENTS, name="test"),
    "name of a class": lambda: as_split(CONTENTS, names=["c", "b"]),
}


@pytest.mark.parametrize("change", FINGERPRINT_CHANGES.values(), ids=list(FINGERPRINT_CHANGES))
def test_what_changes_the_fingerprint(tmp_path, change):
    def fingerprint(*splits):
        return scan(list(splits), ["a", "b", "c"], tmp_path, quiet=True)["fingerprint"]

    assert fingerprint(as_split(CONTENTS)) != fingerprint(change())
    # In the second split it is another change.
    whole = as_split(CONTENTS)
    assert len({fingerprint(whole, whole), fingerprint(change(), whole), fingerprint(whole, change())}) == 3


def test_what_does_not_change_the_fingerprint(load, tmp_path):
    folder = write_images(tmp_path / "data", {"a": 10, "b": 10})
    before = load(folder)
    shutil.move(folder, tmp_path / "moved")
    for file in (tmp_path / "moved").rglob("*.png"):
        os.utime(file, (1, 1))
    assert load(tmp_path / "moved") == before
    # Label ids are not what a class is.
    reordered = [as_split(CONTENTS[:4], [0, 1, 0, 1]), as_split(CONTENTS[:4], [1, 0, 1, 0], names=NAMES[::-1])]
    assert len({scan([split], NAMES, tmp_path, quiet=True)["fingerprint"] for split in reordered}) == 1


def test_the_digits(tmp_path, looked_at):
    splits = load_splits(TrainingConfig(dataset_name="digits", resolution=8))
    found = [scan(list(splits), splits[0].names, tmp_path, quiet=True) for _ in range(2)]
    assert found[0] == found[1] and found[0]["images"] == 1797 and len(looked_at) == 2 * 1797
    # They are made on the spot, and the same everywhere.
    assert found[0]["fingerprint"].startswith("0e4da4ff609e3c0f")


def test_a_sound_folder_is_looked_at_once(load, tmp_path, looked_at):
    folder = write_images(tmp_path / "data", {"a": 10, "b": 10})
    found = load(folder)
    assert len(looked_at) == 20 and load(folder) == found and len(looked_at) == 20
    # Another frame is another scan.
    load(folder, resolution=16)
    assert len(looked_at) == 40
    # A kill of the machine can leave less than was written.
    for cached in (tmp_path / "cache" / "diffusers_cl").glob("scan-*.json"):
        cached.write_text(cached.read_text()[:20])
    assert load(folder) == found and len(looked_at) == 60


@pytest.mark.parametrize("damage", ["replaced", "in place"])
def test_a_changed_file_is_looked_at_again(load, tmp_path, damage):
    """Also with the size and the time that it had."""
    folder = write_images(tmp_path / "data", {"a": 10, "b": 10})
    before, file = load(folder), folder / "a" / "03.png"
    status = file.stat()
    content = bytearray(file.read_bytes())
    content[-20] ^= 1
    if damage == "replaced":
        file.unlink()
    file.write_bytes(content)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (file.stat().st_size, file.stat().st_mtime_ns) == (status.st_size, status.st_mtime_ns)
    with pytest.raises(DataError, match=f"row 3 .*{file.name}"):
        load(folder)
    file.write_bytes(grey(3))
    assert load(folder) == before


def test_a_changed_parquet_file(tmp_path):
    """The rows lie in an Arrow file of the cache."""
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=NAMES)})
    (tmp_path / "data").mkdir()

    def found(contents):
        columns = {"image": [{"bytes": content, "path": None} for content in contents], "label": [0, 1] * 5}
        datasets.Dataset.from_dict(columns, features=features).to_parquet(tmp_path / "data" / "train.parquet")
        config = TrainingConfig(dataset_name=str(tmp_path / "data"), resolution=8, cache_dir=str(tmp_path / "cache"))
        return scan(list(load_splits(config)), NAMES, tmp_path / "cache", quiet=True)

    first = found(CONTENTS[:10])
    assert len(list((tmp_path / "cache" / "diffusers_cl").glob("scan-*"))) == 1
    assert found([*CONTENTS[:9], grey(99)])["fingerprint"] != first["fingerprint"]
    with pytest.raises(DataError, match="1 of 10 images"):
        found([*CONTENTS[:9], b"no image"])


def test_the_number_of_threads_changes_nothing(tmp_path, monkeypatch):
    contents = [grey(level, mode) for level in range(50) for mode in ("L", "RGBA")]
    found = []
    for threads, chunk in ((1, 1), (1, 16), (4, 3), (8, 100)):
        monkeypatch.setattr(os, "sched_getaffinity", lambda process, threads=threads: set(range(threads)))
        monkeypatch.setattr(data, "CHUNK", chunk)
        found.append(json.dumps(scan([as_split(contents)], NAMES, tmp_path, quiet=True)))
    assert len(set(found)) == 1


def test_a_cache_that_cannot_be_written(load, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "diffusers_cl").write_text("a file")
    with pytest.raises(StorageError, match="diffusers_cl"):
        load(write_images(tmp_path / "data", {"a": 10, "b": 10}))


def test_damaged_data_folders(tmp_path):
    found = damaged_data_folders(tmp_path, count=60)
    assert found["problems"] == [] and found["label_moves"] == 0
    assert found["refused"] + found["converted"] + found["loaded"] == found["tried"] == 60
    assert min(found["refused"], found["converted"], found["loaded"]) > 3
