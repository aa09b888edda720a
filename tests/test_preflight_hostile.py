"""A data folder of someone else's runs no code and names no file outside, however `datasets` would load it."""

import io
import os
import pickle
import tarfile
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from damaged_data import encoded
from PIL import Image
from script_helpers import write_images

from diffusers_cl.config import TrainingConfig
from diffusers_cl.data import load_splits
from diffusers_cl.errors import DataError
from diffusers_cl.preflight import scan


class Canary:
    """Leaves a file where it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


PICKLED = "pkl pickle pyd pth pt npy npz joblib bin ten mp cbor".split()
GREY = encoded(Image.new("L", (8, 8), 7))
YAML_TAG = "!!python/object/apply:os.mkdir ['{canary}']"


def hostile(folder: Path, canary: Path, slot: str) -> None:
    """Puts a program where `datasets`, or a library below it, may read it."""
    content = pickle.dumps(Canary(canary))
    if slot in ("npy", "npz"):
        stream = io.BytesIO()
        save = np.save if slot == "npy" else np.savez
        save(stream, np.array([Canary(canary)], dtype=object), allow_pickle=True)
        content = stream.getvalue()
    elif slot in ("pth", "pt"):
        stream = io.BytesIO()
        torch.save(Canary(canary), stream)
        content = stream.getvalue()
    name, _, place = slot.partition(" ")
    if place == "alone":
        (folder / f"train.{name}").write_bytes(content)
    elif place == "among images":
        (write_images(folder, {"a": 10, "b": 10}) / f"x.{name}").write_bytes(content)
    elif slot.endswith(".py"):
        program = f"import os\nos.mkdir({str(canary)!r})\n"
        (folder / f"{folder.name}.py" if slot == "name.py" else folder / slot).write_text(program)
        (folder / "__init__.py").write_text(program)
        (folder / "train.csv").write_text("label\n1\n")
    elif slot == "README.md":
        tag = YAML_TAG.format(canary=canary)
        (folder / slot).write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {tag}\n---\n")
        (folder / "train.csv").write_text("label\n1\n")
    elif slot == ".huggingface.yaml":
        (folder / slot).write_text(f"configs: {YAML_TAG.format(canary=canary)}\n")
        (folder / "train.csv").write_text("label\n1\n")
    else:
        # A WebDataset, whose entries are decoded by their suffix.
        with tarfile.open(folder / "train.tar", "w") as tar:
            for row in range(10):
                for suffix, part in (("png", GREY), ("cls", b"%d" % (row % 2)), (slot, content)):
                    info = tarfile.TarInfo(f"{row}.{suffix}")
                    info.size = len(part)
                    tar.addfile(info, io.BytesIO(part))


SLOTS = [
    *PICKLED,
    *(f"{name} {place}" for name in ("pkl", "pth", "npy") for place in ("alone", "among images")),
    *("name.py", "dataset.py", "README.md", ".huggingface.yaml"),
]


def attempt(folder: Path, **settings) -> str | None:
    """Loads and scans a folder as a run does; returns the message if it is refused."""
    columns = {"image_column": "png", "label_column": "cls"} if (folder / "train.tar").exists() else {}
    cache = str(folder.parent / "cache")
    try:
        splits = load_splits(TrainingConfig(resolution=8, cache_dir=cache, **columns, **settings))
        scan(list(splits), splits[0].names, cache, quiet=True)
    except DataError as error:
        assert error.exit_code == 3
        return str(error)
    return None


@pytest.mark.parametrize("slot", SLOTS)
def test_nothing_is_run(tmp_path, slot):
    canary, folder = tmp_path / "canary", tmp_path / "data"
    folder.mkdir()
    hostile(folder, canary, slot)
    refused = [attempt(folder, dataset_name=str(folder))]
    if slot.endswith("among images"):
        refused.append(attempt(folder, train_data_dir=str(folder)))
        # It is no image, and left alone.
        assert refused == [None, None]
    elif slot in ("npy", "npz", "pth") or "." in slot or "alone" in slot:
        assert None not in refused
    assert not canary.exists()


def test_the_canary_sings(tmp_path):
    pickle.loads(pickle.dumps(Canary(tmp_path / "canary")))
    assert (tmp_path / "canary").exists()


@pytest.mark.parametrize("where", ["{other}/train-00000.parquet", "../other/*.parquet"])
def test_files_outside_are_not_read(tmp_path, where):
    """The README of a dataset may say where its files are."""
    features = datasets.Features({"image": datasets.Image(decode=False), "label": datasets.ClassLabel(names=["a"])})
    columns = {"image": [{"bytes": GREY, "path": None}] * 10, "label": [0] * 10}
    for name in ("data", "other"):
        (tmp_path / name).mkdir()
        dataset = datasets.Dataset.from_dict(columns, features=features)
        dataset.to_parquet(tmp_path / name / "train-00000.parquet")
    readme = "---\nconfigs:\n- config_name: default\n  data_files: '{}'\n---\n"
    (tmp_path / "data" / "README.md").write_text(readme.format("train-00000.parquet"))
    assert attempt(tmp_path / "data", dataset_name=str(tmp_path / "data")) is None
    (tmp_path / "data" / "README.md").write_text(readme.format(where.format(other=tmp_path / "other")))
    message = attempt(tmp_path / "data", dataset_name=str(tmp_path / "data"))
    assert message is not None and "train-00000.parquet, which is not inside" in message


def test_a_second_image_column_is_not_decoded(tmp_path):
    """`datasets` would decode it with every row, whatever its format."""
    features = datasets.Features(
        {name: datasets.Image(decode=False) for name in ("image", "mask")}
        | {"label": datasets.ClassLabel(names=["a"])}
    )
    rows = {"image": [GREY] * 10, "mask": [b"no image"] * 10}
    columns = {name: [{"bytes": content, "path": None} for content in contents] for name, contents in rows.items()}
    (tmp_path / "data").mkdir()
    dataset = datasets.Dataset.from_dict({**columns, "label": [0] * 10}, features=features)
    dataset.to_parquet(tmp_path / "data" / "train-00000-of-00001.parquet")
    assert attempt(tmp_path / "data", dataset_name=str(tmp_path / "data")) is None
