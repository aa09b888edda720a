"""Folders are there whole or not at all, whatever is killed or full; what is read of them stays in them."""

import errno
import json
import os
import time
from pathlib import Path

import pytest
import torture_kills
import torture_storage

from diffusers_cl import files
from diffusers_cl.errors import CheckpointError, StorageError
from diffusers_cl.files import (
    file_sha256,
    publish_folder,
    read_json,
    recover,
    remove_folder,
    verify_folder,
    write_json,
)


def publish(path: Path, content: str = "new", **options) -> Path:
    publish_folder(path, lambda folder: (folder / "a").write_text(content), **options)
    return path


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_manifest(folder: Path, entries: dict[str, str]) -> None:
    (folder / "manifest.json").write_text(json.dumps({"sha256": entries}))


def test_a_write_that_fails_leaves_the_old_folder(tmp_path):
    publish(tmp_path / "folder", "old")

    def fail(folder):
        (folder / "a").write_text("new" * 1000)
        raise OSError(errno.ENOSPC, "No space left on device")

    # What was written until then is all that is known.
    words = r"cannot write .*folder: No space left on device; 3\.0 kB were written, [0-9.]+ [kMGT]?B free"
    with pytest.raises(StorageError, match=words):
        publish_folder(tmp_path / "folder", fail)
    verify_folder(tmp_path / "folder")
    assert (tmp_path / "folder" / "a").read_text() == "old" and names(tmp_path) == ["folder"]
    publish(tmp_path / "folder")
    assert (tmp_path / "folder" / "a").read_text() == "new" and names(tmp_path) == ["folder"]


def test_nothing_is_written_where_it_does_not_fit(tmp_path):
    free = files._free_bytes(tmp_path)
    written = []
    with pytest.raises(StorageError, match=r"No space left on device; needs [0-9.]+ [GT]B, [0-9.]+ [MGT]B free"):
        publish_folder(tmp_path / "folder", written.append, num_bytes=free + 10**12)
    assert not written and names(tmp_path) == []
    publish(tmp_path / "folder", num_bytes=3)
    # A folder that cannot be made is a sentence, too.
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write .*file/folder: File exists; needs 3.0 B, "):
        publish(tmp_path / "file" / "folder", num_bytes=3)


@pytest.mark.parametrize(
    ("size", "text"), [(0, "0.0 B"), (999, "999.0 B"), (12_345_678, "12.3 MB"), (5e15, "5000.0 TB")]
)
def test_sizes(size, text):
    assert files._size(size) == text


def test_kills_before_every_change_to_the_disk(tmp_path):
    counts = torture_kills.kill_points(tmp_path, 50)
    assert counts["missed"] == [] and counts["tried"] == 50 and all(counts["of"].values())


def test_recover(tmp_path):
    assert recover(tmp_path / "nothing") == []
    for name in ("task-00", ".replaced-task-00", ".replaced-task-01", ".partial-task-02", ".removed-task-03"):
        publish(tmp_path / name, name)
    (tmp_path / "outside").write_text("kept")
    (tmp_path / ".removed-link").symlink_to(tmp_path / "outside")
    for name, age in ((".metrics.json.partial", 3600), (".push.json.partial", 0)):
        (tmp_path / name).write_text("{")
        os.utime(tmp_path / name, (time.time() - age,) * 2)
    assert recover(tmp_path) == [tmp_path / "task-01"]
    # A file that another process may be writing stays.
    assert names(tmp_path) == [".push.json.partial", "outside", "task-00", "task-01"]
    assert [(tmp_path / name / "a").read_text() for name in ("task-00", "task-01")] == ["task-00", ".replaced-task-01"]
    assert recover(tmp_path) == []


def test_a_half_deleted_folder_does_not_come_back(tmp_path):
    # Killed after the replacement, before the former content was deleted; then the folder itself goes.
    publish(tmp_path / "checkpoint-5")
    publish(tmp_path / ".replaced-checkpoint-5")
    recover(tmp_path)
    remove_folder(tmp_path / "checkpoint-5")
    assert recover(tmp_path) == [] and names(tmp_path) == []


def test_what_a_kill_has_left_outlives_a_write_that_fails(tmp_path):
    publish(tmp_path / ".replaced-folder", "old")
    (tmp_path / ".partial-folder").mkdir()

    def fail(folder):
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError):
        publish_folder(tmp_path / "folder", fail)
    verify_folder(tmp_path / "folder")
    assert (tmp_path / "folder" / "a").read_text() == "old" and names(tmp_path) == ["folder"]


def test_remove_folder(tmp_path):
    remove_folder(tmp_path / "nothing")
    target = publish(tmp_path / "target")
    (tmp_path / "link").symlink_to(target)
    (tmp_path / ".removed-link").mkdir()
    remove_folder(tmp_path / "link")
    assert names(tmp_path) == ["target"]
    verify_folder(target)
    remove_folder(target)
    assert names(tmp_path) == []


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    synced = []
    monkeypatch.setattr(files, "sync_path", lambda path: synced.append((path.name, (tmp_path / "a.json").exists())))
    write_json(tmp_path / "a.json", {"a": 1})
    assert synced == [(".a.json.partial", False)] and read_json(tmp_path / "a.json") == {"a": 1}


@pytest.mark.parametrize(
    "content", [None, "", "{}", "[]", "no json", '{"sha256": [1]}', '{"sha256": {}, "sha256": {}}']
)
def test_a_manifest_that_cannot_be_read(tmp_path, content):
    publish(tmp_path / "folder")
    (tmp_path / "folder" / "manifest.json").unlink()
    if content is not None:
        (tmp_path / "folder" / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify_folder(tmp_path / "folder")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ('{"a": ' * 100_000, "recursion"),
        ('{"a": ' + "9" * 5000 + "}", "digits"),
        ("[1]", "no mapping"),
        ('{"a": 1, "a": 2}', "'a' stands there twice"),
        (b"\xff", "utf-8"),
    ],
    ids=["nested", "huge-number", "list", "twice", "no-text"],
)
def test_hostile_json(tmp_path, content, words):
    (tmp_path / "a.json").write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(CheckpointError, match=f"a.json cannot be read: .*{words}"):
        read_json(tmp_path / "a.json")


def test_a_json_file_of_any_size_or_kind(tmp_path):
    with open(tmp_path / "large.json", "w") as file:
        file.truncate(files.MAX_JSON_BYTES + 1)
    os.mkfifo(tmp_path / "pipe.json")
    for name, words in (("large", "67.1 MB"), ("pipe", "no file"), ("none", "No such file")):
        with pytest.raises(CheckpointError, match=f"{name}.json cannot be read: .*{words}"):
            read_json(tmp_path / f"{name}.json")


@pytest.mark.parametrize(
    "name",
    [
        *("", ".", "..", "../outside", "/etc/passwd", "sub/../../outside", "sub//b", "./a", "a/", "sub\\..\\b", "a\0"),
        *("\ud800", "a\nb", "sub/..", "//a"),
    ],
)
def test_names_that_leave_the_folder(tmp_path, name):
    folder = publish(tmp_path / "folder")
    (tmp_path / "outside").write_text("x")
    (folder / "sub").mkdir()
    sums = verify_folder(folder)
    write_manifest(folder, sums | {name: file_sha256(tmp_path / "outside")})
    with pytest.raises(CheckpointError, match="in its manifest is not the name of a file in the folder"):
        verify_folder(folder)


@pytest.mark.parametrize("kind", ["link out", "link to a folder", "dangling", "loop", "pipe", "folder", "long name"])
def test_files_that_are_none(tmp_path, kind):
    folder = publish(tmp_path / "folder")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "b").write_text("x")
    name, path = "b", folder / "b"
    if kind == "link out":
        path.symlink_to(tmp_path / "outside" / "b")
    elif kind == "link to a folder":
        name = "b/b"
        path.symlink_to(tmp_path / "outside")
    elif kind in ("dangling", "loop"):
        path.symlink_to(tmp_path / "nothing" if kind == "dangling" else path)
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    else:
        name = "b" * 300
    write_manifest(folder, verify_folder(folder, allow_others=True) | {name: file_sha256(tmp_path / "outside" / "b")})
    with pytest.raises(CheckpointError, match="is missing|out of the folder|cannot be read"):
        verify_folder(folder)


def test_links_within_the_folder(tmp_path):
    folder = publish(tmp_path / "folder")
    (folder / "b").symlink_to("a")
    write_manifest(folder, {"a": file_sha256(folder / "a"), "b": file_sha256(folder / "a")})
    (tmp_path / "elsewhere").symlink_to(folder)
    assert verify_folder(folder).keys() == verify_folder(tmp_path / "elsewhere").keys() == {"a", "b"}


@pytest.mark.parametrize("blobs", ["models--me--x/blobs", "blobs/ab", "models--me--y/blobs"])
def test_a_snapshot_in_the_cache_has_links_to_its_blobs(tmp_path, blobs):
    folder = tmp_path / "models--me--x" / "snapshots" / "0123"
    publish(folder)
    (tmp_path / blobs).mkdir(parents=True)
    for name in ("a", "manifest.json"):
        (folder / name).rename(tmp_path / blobs / name)
        (folder / name).symlink_to(os.path.relpath(tmp_path / blobs / name, folder))
    if blobs.startswith("models--me--y"):
        with pytest.raises(CheckpointError, match="out of the folder"):
            verify_folder(folder)
    else:
        assert verify_folder(folder).keys() == {"a"}


def test_files_that_the_manifest_does_not_name(tmp_path):
    folder = publish(tmp_path / "folder")
    (folder / "sub").mkdir()
    verify_folder(folder)
    for name, make in (("sub/x.pkl", Path.touch), ("pipe", os.mkfifo), ("link", lambda path: path.symlink_to("/"))):
        make(folder / name)
        with pytest.raises(CheckpointError, match=f"{name} is not in its manifest"):
            verify_folder(folder)
        assert verify_folder(folder, allow_others=True).keys() == {"a"}
        (folder / name).unlink()
    with pytest.raises(CheckpointError, match="nothing is not there"):
        verify_folder(tmp_path / "nothing")


def test_mutated_files_are_found(tmp_path):
    counts = torture_storage.file_mutations(tmp_path, 45)
    assert counts == {"tried": 45, "detected": 45, "missed": []}
