"""
Folders that are there whole or not at all, and files that are replaced in one step; nothing heavy is imported.

A folder is written under a temporary name and synced, `manifest.json` with the sha256 of every file comes last, then one
rename publishes it. What a kill leaves has a name that begins with a dot; [`recover`] puts it right.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError

from .errors import CheckpointError, StorageError


MANIFEST_NAME = "manifest.json"
# The folders of a publication: being written, about to be replaced, being deleted.
PARTIAL, REPLACED, REMOVED = ".partial-", ".replaced-", ".removed-"
# Of one JSON file. The state of a stream of a thousand classes has some megabytes.
MAX_JSON_BYTES = 64 * 2**20
# A younger `.*.partial` may be another process's that is at work: scripts/push.py needs no lock of the run.
SECONDS_OF_WRITING = 60


def file_sha256(path: Path) -> str:
    """Returns the sha256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sync_path(path: Path) -> None:
    """Makes sure that a file's content, or a folder's entries, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 999.95:
            return f"{num_bytes:.1f} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:.1f} TB"


def _free_bytes(path: Path) -> int:
    existing = next(folder for folder in (path, *path.absolute().parents) if os.path.exists(folder))
    return shutil.disk_usage(existing).free


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST_NAME)


def _delete(path: Path) -> None:
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


def remove_folder(path: str | Path) -> None:
    """
    Deletes a folder, if it is there. It loses its name first, so that a kill leaves none that is half there.

    Raises:
        StorageError: when the disk refuses.
    """
    path = Path(path)
    removed = path.with_name(f"{REMOVED}{path.name}")
    try:
        if os.path.lexists(path):
            _delete(removed)
            path.rename(removed)
            sync_path(path.parent)
            _delete(removed)
    except OSError as error:
        raise StorageError(f"cannot delete {path}: {_reason(error)}") from error


def _settle(path: Path) -> bool:
    """Ends what a kill has left of a publication of `path`; returns whether its former content came back."""
    partial, replaced = path.with_name(f"{PARTIAL}{path.name}"), path.with_name(f"{REPLACED}{path.name}")
    comes_back = os.path.lexists(replaced) and not os.path.lexists(path)
    if comes_back:
        replaced.rename(path)
        sync_path(path.parent)
    remove_folder(replaced)
    _delete(partial)
    return comes_back


def recover(folder: str | Path) -> list[Path]:
    """
    Puts right what kills have left in a folder; nobody else may be publishing there.

    Args:
        folder (`Path`): in which folders are published; it may be missing.

    Returns:
        `list[Path]`: the folders that were about to be replaced, and are back under their names.

    Raises:
        StorageError: when the disk refuses.
    """
    folder, restored = Path(folder), []
    try:
        for replaced in sorted(folder.glob(f"{REPLACED}*")):
            path = replaced.with_name(replaced.name.removeprefix(REPLACED))
            if _settle(path):
                restored.append(path)
        for leftover in (*folder.glob(f"{PARTIAL}*"), *folder.glob(f"{REMOVED}*")):
            _delete(leftover)
        for file in folder.glob(".*.partial"):
            if file.is_file() and time.time() - file.stat().st_mtime > SECONDS_OF_WRITING:
                file.unlink(missing_ok=True)
    except OSError as error:
        raise StorageError(f"cannot put {folder} right after a kill: {_reason(error)}") from error
    return restored


def publish_folder(
    path: str | Path, write: Callable[[Path], None], manifest_folder: str = ".", num_bytes: int | None = None
) -> None:
    """
    Writes a folder that is there whole or not at all; one of the same name is replaced.

    Args:
        path (`Path`): the folder's final name.
        write: called with a temporary folder to write the files into.
        manifest_folder (`str`): the sub-folder for `manifest.json`.
        num_bytes (`int`, *optional*): of all files, about; nothing is written where that many are not free.

    Raises:
        StorageError: when the disk refuses, with the bytes needed and free, and what was there before untouched.
    """
    path = Path(path)
    partial, replaced = path.with_name(f"{PARTIAL}{path.name}"), path.with_name(f"{REPLACED}{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _settle(path)
        if num_bytes is not None and _free_bytes(path) < num_bytes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        partial.mkdir()
        write(partial)
        sums = {str(file.relative_to(partial)): file_sha256(file) for file in _files(partial)}
        manifest = partial / manifest_folder / MANIFEST_NAME
        manifest.parent.mkdir(exist_ok=True)
        manifest.write_text(json.dumps({"sha256": sums}, indent=1) + "\n")
        for file in [*_files(partial), manifest, *(f for f in partial.rglob("*") if f.is_dir()), partial]:
            sync_path(file)
        if os.path.lexists(path):
            path.rename(replaced)
        partial.rename(path)
        sync_path(path.parent)
    except (OSError, SafetensorError) as error:
        room = f"{_size(sum(file.stat().st_size for file in _files(partial)))} were written"
        if num_bytes is not None:
            room = f"needs {_size(num_bytes)}"
        _settle(path)
        raise StorageError(
            f"cannot write {path}: {_reason(error)}; {room}, {_size(_free_bytes(path))} free"
        ) from error
    remove_folder(replaced)


def _without_duplicates(pairs: Iterable[tuple[str, object]]) -> dict:
    content = {}
    for key, value in pairs:
        if key in content:
            raise ValueError(f"{key!r} stands there twice")
        content[key] = value
    return content


def read_json(path: str | Path) -> dict:
    """
    Returns the content of a JSON file that somebody else may have written.

    Raises:
        CheckpointError: when it is missing, larger than `MAX_JSON_BYTES`, or no JSON with a mapping, whatever it is else.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise ValueError("it is no file")
        if (size := path.stat().st_size) > MAX_JSON_BYTES:
            raise ValueError(f"it has {_size(size)}; allowed: {_size(MAX_JSON_BYTES)}")
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_without_duplicates)
        if not isinstance(content, dict):
            raise ValueError("it holds no mapping")
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {_reason(error)}") from error
    return content


def check_fields(where: str | Path, content: dict, types: dict[str, type]) -> None:
    """
    Raises `CheckpointError` unless a mapping has values of these types.

    Args:
        where (`str`): the file, for messages.
        content (`dict`), types (`dict[str, type]`): by key; `int` lets no truth values pass.
    """
    for key, kind in types.items():
        if key not in content:
            raise CheckpointError(f"{where} has no {key!r}")
        if not isinstance(content[key], kind) or isinstance(content[key], bool):
            allowed = getattr(kind, "__name__", kind)
            raise CheckpointError(f"{where}: {key} is {content[key]!r:.80}; allowed: {allowed}")


def allowed_places(folder: Path) -> list[Path]:
    """Where the files of a folder may lie: in it. A snapshot in the Hugging Face cache has links, to the cache's blobs."""
    folder = Path(os.path.realpath(folder))
    if folder.parent.name != "snapshots":
        return [folder]
    repo = folder.parent.parent
    # Repos may share blobs, which lie beside them.
    return [folder, repo / "blobs", repo.parent / "blobs"]


def _regular_file(folder: Path, name: str) -> Path:
    """A file of a folder, by the name that its manifest has."""
    pure = PurePosixPath(name)
    is_inside = bool(pure.parts) and not pure.is_absolute() and ".." not in pure.parts
    if not is_inside or "\\" in name or not name.isprintable() or pure.as_posix() != name:
        raise CheckpointError(f"{folder}: {name!r:.80} in its manifest is not the name of a file in the folder")
    path = folder / name
    if not path.is_file():
        raise CheckpointError(f"{folder}: {name} is missing")
    place = Path(os.path.realpath(path))
    if not any(place.is_relative_to(allowed) for allowed in allowed_places(folder)):
        raise CheckpointError(f"{folder}: {name} is a link to {place}, out of the folder")
    return path


def verify_folder(path: str | Path, manifest_folder: str = ".", allow_others: bool = False) -> dict[str, str]:
    """
    Checks every file of a published folder against its manifest.

    Args:
        path (`Path`).
        manifest_folder (`str`): the sub-folder that has `manifest.json`.
        allow_others (`bool`): lets files be there that the manifest does not name.

    Returns:
        `dict[str, str]`: the sha256 of every file, by name.

    Raises:
        CheckpointError: naming the file that is missing, damaged, out of the folder, or not in the manifest.
    """
    path, manifest = Path(path), (PurePosixPath(manifest_folder) / MANIFEST_NAME).as_posix()
    if not path.is_dir():
        raise CheckpointError(f"{path} is not there, or is no folder")
    try:
        sums = read_json(_regular_file(path, manifest)).get("sha256")
        if not isinstance(sums, dict):
            raise CheckpointError(f"{path}: {manifest} has no sha256 of files")
        for name, expected in sums.items():
            if file_sha256(_regular_file(path, name)) != expected:
                raise CheckpointError(f"{path}: {name} is damaged (its sha256 is not the manifest's)")
        for folder, folders, files in os.walk(path):
            for name in (*files, *(name for name in folders if (Path(folder) / name).is_symlink())):
                found = (Path(folder) / name).relative_to(path).as_posix()
                if not allow_others and found not in sums and found != manifest:
                    raise CheckpointError(f"{path}: {found} is not in its manifest; it does not belong there")
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return sums


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """
    Yields the path of a file to write, which takes the place of `path` when the `with` block ends; for a folder where other
    runs may do the same at this moment.

    Raises:
        StorageError: when the disk refuses.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".saving-", dir=path.parent) as own:
            yield Path(own) / path.name
            os.replace(Path(own) / path.name, path)
    except OSError as error:
        raise StorageError(f"cannot write {path}: {_reason(error)}") from error


def write_text(path: str | Path, content: str) -> None:
    """Replaces a file in one step; its folder is made where it is missing."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(content, encoding="utf-8")
    # A rename that reaches the disk before the content leaves an empty file when the power goes.
    sync_path(partial)
    partial.replace(path)


def write_json(path: str | Path, content: dict) -> None:
    """Replaces a JSON file in one step."""
    write_text(path, json.dumps(content, indent=1) + "\n")
