"""
Checkpoints, to go on from within a task.

Only safetensors and JSON are written; nothing is unpickled. Torch's generators are not saved: every draw is a function of
the seed and its purpose (see `randomness.py`).
"""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .errors import CheckpointError
from .files import publish_folder, verify_folder


STATE_NAME = "state.json"
PREFIX = "checkpoint-"


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
