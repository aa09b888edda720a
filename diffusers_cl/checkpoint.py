"""
Checkpoints and other folders that are there whole or not at all.

A folder is written under a temporary name and synced, `manifest.json` with the sha256 of every file comes last, then one
rename publishes it. Only safetensors and JSON are written; nothing is unpickled. Torch's generators are not saved: every
draw is a function of the seed and its purpose (see `randomness.py`).
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .errors import CheckpointError, StorageError


MANIFEST_NAME = "manifest.json"
STATE_NAME = "state.json"
PREFIX = "checkpoint-"


def _sha256(path: Path) -> str:
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
        sums = {str(file.relative_to(partial)): _sha256(file) for file in _files(partial)}
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
        sums = json.loads((path / manifest_folder / MANIFEST_NAME).read_text())["sha256"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{path}: {manifest_folder}/{MANIFEST_NAME} cannot be read: {error}") from error
    for name, expected in sums.items():
        if not (path / name).is_file():
            raise CheckpointError(f"{path}: {name} is missing")
        if _sha256(path / name) != expected:
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


def _optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    return {
        f"{quantity}.{name}": torch.as_tensor(value).contiguous()
        for name, parameter in model.named_parameters()
        for quantity, value in optimizer.state.get(parameter, {}).items()
    }


def save_checkpoint(
    output_dir: str | Path,
    step: int,
    model: torch.nn.Module,
    optimizer: torch.optim.Optimizer,
    state: dict,
    ema_model=None,
    total_limit: int | None = None,
) -> Path:
    """
    Publishes `checkpoint-<step>`: weights, Adam moments and EMA by parameter name, and `state` as JSON; then deletes the
    oldest checkpoints over the limit.

    Args:
        output_dir (`Path`), step (`int`): optimizer steps over all tasks.
        model (`nn.Module`): unwrapped.
        optimizer: its per-parameter state is kept; its groups belong to the configuration.
        state (`dict`): JSON: the cursor, the schedule, versions.
        ema_model (`diffusers.training_utils.EMAModel`, *optional*).
        total_limit (`int`, *optional*): how many checkpoints to keep, the new one counted.
    """

    def write(folder: Path) -> None:
        save_file(
            {name: tensor.contiguous() for name, tensor in model.state_dict().items()}, folder / "model.safetensors"
        )
        save_file(_optimizer_tensors(model, optimizer), folder / "optimizer.safetensors")
        if ema_model is not None:
            names = [name for name, _ in model.named_parameters()]
            shadow = dict(zip(names, ema_model.shadow_params, strict=True))
            save_file({name: tensor.contiguous() for name, tensor in shadow.items()}, folder / "ema.safetensors")
        ema_step = None if ema_model is None else ema_model.optimization_step
        (folder / STATE_NAME).write_text(json.dumps({**state, "step": step, "ema_step": ema_step}, indent=1) + "\n")

    path = Path(output_dir) / f"{PREFIX}{step}"
    publish_folder(path, write)
    if total_limit is not None:
        for old in list_checkpoints(output_dir)[total_limit:]:
            shutil.rmtree(old)
    return path


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Returns the checkpoint folders of a run, the newest first; not verified."""
    folders = [path for path in Path(output_dir).glob(f"{PREFIX}*") if path.name.removeprefix(PREFIX).isdigit()]
    return sorted(folders, key=lambda path: int(path.name.removeprefix(PREFIX)), reverse=True)


def read_state(checkpoint: str | Path) -> dict:
    """
    Returns the JSON state of a checkpoint, after every one of its files was verified.

    Raises:
        CheckpointError: when it is not whole.
    """
    verify_folder(checkpoint)
    return json.loads((Path(checkpoint) / STATE_NAME).read_text())


def load_checkpoint(
    checkpoint: str | Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, ema_model=None
) -> None:
    """
    Puts the tensors of a checkpoint into model, optimizer and EMA. Everything is read and checked before the first of
    them changes.

    Raises:
        CheckpointError: when names or shapes do not fit.
    """
    checkpoint = Path(checkpoint)
    parameters = dict(model.named_parameters())
    device = next(iter(parameters.values())).device
    try:
        weights = load_file(checkpoint / "model.safetensors")
        moments = load_file(checkpoint / "optimizer.safetensors")
        shadow = load_file(checkpoint / "ema.safetensors") if ema_model is not None else {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint}: {error}") from error
    current = model.state_dict()
    if weights.keys() != current.keys() or any(weights[name].shape != current[name].shape for name in current):
        raise CheckpointError(f"{checkpoint}: the weights do not fit the model of this configuration")
    if ema_model is not None and (
        shadow.keys() != parameters.keys() or any(shadow[name].shape != p.shape for name, p in parameters.items())
    ):
        raise CheckpointError(f"{checkpoint}: the EMA does not fit the model of this configuration")
    for key, tensor in moments.items():
        quantity, _, name = key.partition(".")
        if name not in parameters or (quantity != "step" and tensor.shape != parameters[name].shape):
            raise CheckpointError(f"{checkpoint}: the optimizer's {key} does not fit the model of this configuration")
    model.load_state_dict(weights)
    for key, tensor in moments.items():
        quantity, _, name = key.partition(".")
        optimizer.state[parameters[name]][quantity] = tensor.to(device)
    if ema_model is not None:
        ema_model.shadow_params = [shadow[name].to(device) for name in parameters]
        ema_model.optimization_step = json.loads((checkpoint / STATE_NAME).read_text())["ema_step"]


def newest_checkpoint(output_dir: str | Path, task: int, warn: Callable[[str], None]) -> tuple[Path, dict] | None:
    """
    Returns the newest whole checkpoint of a task and its state, or `None`. A damaged one is passed over with a warning.
    """
    for path in list_checkpoints(output_dir):
        try:
            state = read_state(path)
        except CheckpointError as error:
            warn(f"Passing over a damaged checkpoint: {error}")
            continue
        if state["task"] == task:
            return path, state
    return None
