"""Hostile files from elsewhere: refused with one sentence, or passed over; nothing in them is run."""

import os
import pickle
import runpy
import shutil

import pytest
import torch
from hostile_helpers import CPU, WEIGHTS, bomb, code_beside, pickled, write, write_good
from pipeline_helpers import tiny_unet
from safetensors.torch import save
from torture_security import (
    SLOTS,
    hostile_files,
    load_judge,
    load_kept,
    load_task,
    load_to_adopt,
    load_twice,
    load_whole_checkpoint,
)

from diffusers_cl import Rank1EWC
from diffusers_cl.config import TrainingConfig
from diffusers_cl.errors import CheckpointError
from diffusers_cl.features import load_extractor
from diffusers_cl.fetch import PIPELINE_FILES, check_files
from diffusers_cl.growth import load_weights, restore_penalty
from diffusers_cl.references import References
from diffusers_cl.start import ALLOWED_FILES


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    write_good(folder := tmp_path_factory.mktemp("good"))
    return folder


def test_canaries_are_written_by_code_that_runs(good, tmp_path):
    """Or the tests below would show nothing."""
    for kind in range(8):
        canary, file = tmp_path / f"{kind}.canary", tmp_path / f"{kind}"
        file.write_bytes(pickled(canary, kind))
        assert not canary.exists()
        if kind < 6:
            pickle.loads(file.read_bytes())
        else:
            torch.load(file, weights_only=False)
        assert canary.exists()
    shutil.copytree(good / "task", tmp_path / "task")
    code_beside(tmp_path / "task", tmp_path / "code.canary", 0)
    for file in (tmp_path / "task").rglob("*.py"):
        runpy.run_path(str(file))
        (tmp_path / "code.canary").unlink()


def test_what_is_good_is_loaded(good, tmp_path):
    shutil.copytree(good, tmp_path / "good")
    loads = {"task": (load_task, load_twice, load_to_adopt), "classifier": (load_judge,), "kept": (load_kept,)}
    for name, functions in {**loads, "checkpoint-1": (load_whole_checkpoint,)}.items():
        for load in functions:
            load(tmp_path / "good" / name)
    assert (tmp_path / "good" / "run" / "task-00" / WEIGHTS).exists()


def test_hostile_files(tmp_path):
    count = len(SLOTS) * max(len(cases) - 1 for cases in SLOTS.values())
    assert len(SLOTS) == 12 and count >= 60
    found = hostile_files(tmp_path, count)
    assert found["problems"] == [] and found["executed"] == found["written_outside"] == 0
    # What lies beside a pipeline is no reason to refuse it.
    assert found["tried"] == count and found["refused"] == count - 3


@pytest.mark.parametrize(
    ("name", "size", "words"),
    [
        (WEIGHTS, 64 * 2**30 + 1, "has 68,719,476,737 bytes; allowed: at most 68,719,476,736"),
        ("model_index.json", 64 * 2**20 + 1, "model_index.json has 67,108,865 bytes; allowed: at most 67,108,864"),
        ("README.md", 2**27, "README.md has 134,217,728 bytes; allowed: at most 67,108,864"),
        ("consolidation/ewc.safetensors", 2**33, "ewc.safetensors is damaged, or no safetensors file"),
    ],
)
def test_files_larger_than_any_are_not_read(good, tmp_path, name, size, words):
    shutil.copytree(good / "task", tmp_path / "task")
    # Without content, they take no room here.
    with open(tmp_path / "task" / name, "wb") as file:
        file.truncate(size)
    with pytest.raises(CheckpointError, match=words):
        check_files(tmp_path / "task", ALLOWED_FILES)


def test_a_header_longer_than_any_is_not_parsed(good, tmp_path):
    shutil.copytree(good / "task", tmp_path / "task")
    # Whole, and refused for nothing but its length: white space may follow the header's JSON.
    header = b"{}" + b" " * 2**24
    write(tmp_path / "task" / WEIGHTS, len(header).to_bytes(8, "little") + header)
    with pytest.raises(CheckpointError, match="its header has 16,777,218 bytes; allowed: at most 16,777,216$"):
        check_files(tmp_path / "task", PIPELINE_FILES)


def test_what_is_no_file(good, tmp_path):
    for name, make in {"pipe": os.mkfifo, "folder": os.mkdir}.items():
        shutil.copytree(good / "task", tmp_path / name)
        (tmp_path / name / "unet" / "config.json").unlink()
        make(tmp_path / name / "unet" / "config.json")
        with pytest.raises(CheckpointError, match="unet/config.json is no file$"):
            check_files(tmp_path / name, PIPELINE_FILES)
    # A folder of it that lies elsewhere.
    shutil.copytree(good / "task", tmp_path / "linked")
    shutil.move(tmp_path / "linked" / "unet", tmp_path / "elsewhere")
    (tmp_path / "linked" / "unet").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(
        CheckpointError, match="unet/config.json is a link to .*elsewhere/config.json, out of the folder$"
    ):
        check_files(tmp_path / "linked", PIPELINE_FILES)
    # A link within it, and one that is none of its files, are nobody's business.
    shutil.copytree(good / "task", tmp_path / "within")
    (tmp_path / "within" / "unet" / "config.json").rename(tmp_path / "within" / "kept.json")
    (tmp_path / "within" / "unet" / "config.json").symlink_to("../kept.json")
    (tmp_path / "within" / "notes.txt").symlink_to(tmp_path / "elsewhere" / "config.json")
    check_files(tmp_path / "within", PIPELINE_FILES)


def test_the_hubs_cache_has_links(good, tmp_path):
    snapshot, blobs = tmp_path / "models--me--x" / "snapshots" / "abc", tmp_path / "models--me--x" / "blobs"
    shutil.copytree(good / "task", snapshot)
    blobs.mkdir()
    (snapshot / "unet" / "config.json").rename(blobs / "0")
    (snapshot / "unet" / "config.json").symlink_to("../../../blobs/0")
    check_files(snapshot, PIPELINE_FILES)
    (snapshot / "unet" / "config.json").unlink()
    write(tmp_path / "models--me--other" / "blobs" / "0", {})
    (snapshot / "unet" / "config.json").symlink_to("../../../../models--me--other/blobs/0")
    with pytest.raises(CheckpointError, match="is a link to"):
        check_files(snapshot, PIPELINE_FILES)


def nested(key: str) -> bytes:
    """A whole safetensors file with brackets without end in its metadata."""
    return save({"a": torch.zeros(2)}, {key: "[" * 100_000})


@pytest.mark.parametrize("kind", range(7))
def test_every_loader_refuses_bombs_by_itself(good, tmp_path, kind):
    loads = {
        WEIGHTS: lambda: load_weights(tiny_unet(), tmp_path),
        "ewc.safetensors": lambda: restore_penalty(Rank1EWC(), tmp_path, tiny_unet()),
        "extractor.safetensors": lambda: load_extractor(tmp_path, {"name": "classifier"}, TrainingConfig(), CPU),
        "references.safetensors": lambda: References.load(tmp_path),
    }
    for name, load in loads.items():
        key = {"ewc": "penalty", "extractor": "classifier"}.get(name.partition(".")[0], "references")
        write(tmp_path / name, bomb(tmp_path, kind) if kind < 6 else nested(key))
        with pytest.raises(CheckpointError, match=name) as refused:
            load()
        assert "\n" not in str(refused.value)
