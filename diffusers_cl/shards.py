"""Finished parts of a long phase on disk, so that a run which is killed in it goes on after the last of them."""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .errors import CheckpointError, StorageError
from .files import read_json, sync_path, write_json


INPUTS_NAME = "inputs.json"


def tensors_digest(tensors: dict[str, torch.Tensor], about: object = None) -> str:
    """
    Returns the sha256 of tensors, by name, type, shape and content, whatever device they are on.

    Args:
        tensors (`dict[str, torch.Tensor]`).
        about (*optional*): JSON that goes into it too.
    """
    digest = hashlib.sha256(json.dumps(about, sort_keys=True).encode())
    for name in sorted(tensors):
        tensor = tensors[name].detach().cpu().contiguous()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        # Not every type has a NumPy one.
        digest.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], inputs: object) -> None:
    """
    Publishes a safetensors file in one step, with a checksum of its content and inputs; an older one is replaced.

    Args:
        path (`Path`): in a folder that is there.
        tensors (`dict[str, torch.Tensor]`).
        inputs: JSON: all that the tensors are a function of.

    Raises:
        StorageError: when the disk refuses, with what was there before untouched.
    """
    tensors = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(tensors, partial, {"sha256": tensors_digest(tensors, inputs)})
        sync_path(partial)
        os.replace(partial, path)
    except (OSError, SafetensorError) as error:
        # Half a file would fill the disk further.
        partial.unlink(missing_ok=True)
        needed, free = sum(tensor.nbytes for tensor in tensors.values()), shutil.disk_usage(path.parent).free
        reason = getattr(error, "strerror", None) or error
        raise StorageError(f"cannot write {path}: {reason} ({needed:,} bytes needed, {free:,} free)") from error


def load_tensors(path: Path, inputs: object) -> dict[str, torch.Tensor] | None:
    """Returns what [`save_tensors`] wrote, on the CPU; `None` where it is not there, is damaged, or has other inputs."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
            expected = (file.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    return tensors if tensors_digest(tensors, inputs) == expected else None


class Shards:
    """
    The finished parts of one phase: safetensors files, each there whole or not at all, and read again only if its checksum
    is right and the phase's inputs are the same.

    Args:
        folder (`Path`): of this phase and, where every process keeps its own, of this process. One with other inputs is
            emptied before the first part is saved.
        inputs (`dict`): JSON: all that the phase is a function of.
        every (`int`): how many batches [`over`] goes on between two savings.
    """

    def __init__(self, folder: str | Path, inputs: dict, every: int = 1):
        self.folder, self.every = Path(folder), every
        self.inputs = json.loads(json.dumps(inputs))

    def _same_inputs(self) -> bool:
        try:
            return read_json(self.folder / INPUTS_NAME) == self.inputs
        except CheckpointError:
            return False

    def _part(self, name: str) -> tuple[Path, list]:
        """A part's file, and what its checksum covers beside the content: a part is none of another name or phase."""
        return self.folder / f"{name}.safetensors", [name, self.inputs]

    def load(self, name: str) -> dict[str, torch.Tensor] | None:
        """Returns the tensors of a part, on the CPU; `None` where it is not there, is damaged, or has other inputs."""
        return load_tensors(*self._part(name))

    def save(self, name: str, tensors: dict[str, torch.Tensor]) -> None:
        """
        Publishes a part in one step; an older one of the same name is replaced.

        Raises:
            StorageError: when the disk refuses.
        """
        path, inputs = self._part(name)
        if not self._same_inputs():
            # What cannot be deleted is in the way of nobody: its checksum is of other inputs.
            shutil.rmtree(self.folder, ignore_errors=True)
            try:
                write_json(self.folder / INPUTS_NAME, self.inputs)
            except OSError as error:
                raise StorageError(f"cannot write {self.folder}: {error.strerror or error}") from error
        save_tensors(path, tensors, inputs)

    def over(self, batches: Iterable, name: str, sums: dict[str, torch.Tensor]) -> Iterator:
        """
        Yields the batches that are not in the sums yet, and saves the sums as they come.

        Args:
            batches: re-iterable, the same ones every time.
            name (`str`): of this pass over them.
            sums (`dict[str, torch.Tensor]`): what the caller's loop adds every batch to, in place. What was saved is put
                into them before the first batch.
        """
        saved, done = self.load(name), 0
        if saved is not None and saved.keys() == sums.keys() | {"batches"}:
            done = int(saved.pop("batches"))
            for key, tensor in saved.items():
                sums[key].copy_(tensor)
        first = saved_at = done
        for batch in itertools.islice(iter(batches), done, None):
            yield batch
            # The caller's loop is done with the batch.
            done += 1
            if done % self.every == 0:
                saved_at = self._save_sums(name, sums, done)
        if first != done != saved_at:
            self._save_sums(name, sums, done)

    def _save_sums(self, name: str, sums: dict[str, torch.Tensor], done: int) -> int:
        """Saves the sums of so many batches, unless they would spoil every later try; returns the number."""
        if all(torch.isfinite(tensor).all() for tensor in sums.values()):
            self.save(name, {**sums, "batches": torch.tensor(done)})
        return done
