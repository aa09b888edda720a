"""
Folders that are there whole or not at all, and files that are replaced in one step; nothing heavy is imported.

A folder is written under a temporary name and synced, `manifest.json` with the sha256 of every file comes last, then one
rename publishes it.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from .errors import CheckpointError, StorageError


MANIFEST_NAME = "manifest.json"


def file_sha256(path: Path) -> str:
    """Returns the sha256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)


def publish_folder(path: str | Path, write: Callable[[Path], None], manifest_folder: str = ".") -> None:
    """
    Writes a folder that is there whole or not at all; one of the same name is replaced.

    Args:
        path (`Path`): the folder's final name.
        write: called with a temporary folder to write the files into.
        manifest_folder (`str`): the sub-folder for `manifest.json`.

    Raises:
        StorageError: when the disk refuses, with what was there before untouched.
    """
    path = Path(path)
    partial, replaced = path.with_name(f".partial-{path.name}"), path.with_name(f".replaced-{path.name}")
    try:
        for leftover in (partial, replaced):
            shutil.rmtree(leftover, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        sums = {str(file.relative_to(partial)): file_sha256(file) for file in _files(partial)}
        manifest = partial / manifest_folder / MANIFEST_NAME
        manifest.parent.mkdir(exist_ok=True)
        manifest.write_text(json.dumps({"sha256": sums}, indent=1) + "\n")
        for file in [*_files(partial), manifest, *(f for f in partial.rglob("*") if f.is_dir()), partial]:
            _sync(file)
        if path.exists():
            path.rename(replaced)
        partial.rename(path)
        _sync(path.parent)
        shutil.rmtree(replaced, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        shutil.rmtree(partial, ignore_errors=True)
        raise StorageError(f"cannot write {path}: {getattr(error, 'strerror', None) or error}") from error


def verify_folder(path: str | Path, manifest_folder: str = ".") -> None:
    """
    Checks every file of a published folder against its manifest.

    Raises:
        CheckpointError: naming the file that is missing or damaged.
    """
    path = Path(path)
    try:
        sums = dict(json.loads((path / manifest_folder / MANIFEST_NAME).read_text())["sha256"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: {manifest_folder}/{MANIFEST_NAME} cannot be read: {error}") from error
    for name, expected in sums.items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path}: {name} is missing")
        if file_sha256(path / name) != expected:
            raise CheckpointError(f"{path}: {name} is damaged (its sha256 is not the manifest's)")


def write_text(path: str | Path, content: str) -> None:
    """Replaces a file in one step; its folder is made where it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(content, encoding="utf-8")
    partial.replace(path)


def write_json(path: str | Path, content: dict) -> None:
    """Replaces a JSON file in one step."""
    write_text(path, json.dumps(content, indent=1) + "\n")
