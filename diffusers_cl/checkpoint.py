"""
Checkpoints, to go on from within a task.

Only safetensors and JSON are written; nothing is unpickled. Torch's generators are not saved: every draw is a function of
the seed and its purpose (see `randomness.py`).
"""

import json
import re
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from .errors import CheckpointError, NonFiniteError
from .files import check_fields, publish_folder, read_json, remove_folder, verify_folder


STATE_NAME, MODEL_NAME, OPTIMIZER_NAME = "state.json", "model.safetensors", "optimizer.safetensors"
EMA_NAME = "ema.safetensors"
PREFIX = "checkpoint-"
# What every state has; more may be in it.
STATE_TYPES = {"task": int, "step": int, "ema_step": int | None, "lr_scheduler": dict, "scaler": dict | None}
MOMENTS = ("exp_avg", "exp_avg_sq")
# However small the limit: the newest one may be found damaged.
MIN_KEPT = 2


def _tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer, ema_model
) -> dict[str, dict[str, torch.Tensor]]:
    """What is saved, by file and name."""
    moments = {
        f"{quantity}.{name}": torch.as_tensor(value)
        for name, parameter in model.named_parameters()
        for quantity, value in optimizer.state.get(parameter, {}).items()
    }
    tensors = {MODEL_NAME: model.state_dict(), OPTIMIZER_NAME: moments}
    if ema_model is not None:
        names = [name for name, _ in model.named_parameters()]
        tensors[EMA_NAME] = dict(zip(names, ema_model.shadow_params, strict=True))
    return tensors


def _first_non_finite(tensors: dict[str, torch.Tensor]) -> str | None:
    # The extremes of a tensor with a NaN are NaN: a tenth of the time of looking at every value.
    extremes = {
        name: torch.stack(tensor.detach().aminmax())
        for name, tensor in tensors.items()
        if tensor.is_floating_point() and tensor.numel()
    }
    return next((name for name, values in extremes.items() if not values.isfinite().all()), None)


def check_finite(model: torch.nn.Module, optimizer: torch.optim.Optimizer, ema_model=None) -> None:
    """
    Raises `NonFiniteError`, naming the first tensor, unless all weights, Adam moments and EMA weights are finite. Equal
    processes raise it alike.
    """
    parts = {MODEL_NAME: "weights", OPTIMIZER_NAME: "Adam moments", EMA_NAME: "EMA"}
    for file, tensors in _tensors(model, optimizer, ema_model).items():
        if (name := _first_non_finite(tensors)) is not None:
            raise NonFiniteError(f"{name} in the {parts[file]} is not finite; the last checkpoint is kept")


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
    Publishes `checkpoint-<step>`: weights, Adam moments and EMA by parameter name, and `state` as JSON; then deletes
    others over the limit, the oldest first, but before them those of later steps, which are of an attempt that was given up.

    Args:
        output_dir (`Path`), step (`int`): optimizer steps over all tasks.
        model (`nn.Module`): unwrapped.
        optimizer: Adam or AdamW; its per-parameter state is kept, its groups belong to the configuration.
        state (`dict`): JSON: `task`, `lr_scheduler`, `scaler` (or `None`), and what else the caller reads.
        ema_model (`diffusers.training_utils.EMAModel`, *optional*).
        total_limit (`int`, *optional*): how many checkpoints to keep, the new one counted; two at least.

    Raises:
        NonFiniteError: as [`check_finite`]; nothing is written.
        StorageError: when the disk refuses; all that was there before is.
    """
    check_finite(model, optimizer, ema_model)
    tensors = _tensors(model, optimizer, ema_model)
    ema_step = None if ema_model is None else ema_model.optimization_step
    content = json.dumps({**state, "step": step, "ema_step": ema_step}, indent=1) + "\n"

    def write(folder: Path) -> None:
        for file, named in tensors.items():
            save_file({name: tensor.contiguous() for name, tensor in named.items()}, folder / file)
        (folder / STATE_NAME).write_text(content)

    path = Path(output_dir) / f"{PREFIX}{step}"
    num_bytes = len(content) + sum(tensor.nbytes for named in tensors.values() for tensor in named.values())
    publish_folder(path, write, num_bytes=num_bytes)
    if total_limit is not None:
        others = [old for old in list_checkpoints(output_dir) if old != path]
        others.sort(key=lambda old: (_step(old) > step, abs(_step(old) - step)))
        for old in others[max(total_limit, MIN_KEPT) - 1 :]:
            remove_folder(old)
    return path


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.removeprefix(PREFIX))


def list_checkpoints(output_dir: str | Path) -> list[Path]:
    """Returns the checkpoint folders of a run, the newest first; not verified."""
    folders = [path for path in Path(output_dir).glob(f"{PREFIX}*") if path.is_dir()]
    return sorted(
        (path for path in folders if re.fullmatch(f"{PREFIX}(0|[1-9][0-9]*)", path.name)), key=_step, reverse=True
    )


def read_state(checkpoint: str | Path) -> dict:
    """
    Returns the JSON state of a checkpoint, after every one of its files was verified.

    Raises:
        CheckpointError: when it is not whole, or not what its name says.
    """
    checkpoint = Path(checkpoint)
    verify_folder(checkpoint)
    state = read_json(checkpoint / STATE_NAME)
    check_fields(checkpoint / STATE_NAME, state, STATE_TYPES)
    if f"{PREFIX}{state['step']}" not in (checkpoint.name, checkpoint.resolve().name):
        raise CheckpointError(f"{checkpoint} is the checkpoint of step {state['step']}, by its {STATE_NAME}")
    if state["task"] < 0:
        raise CheckpointError(f"{checkpoint / STATE_NAME}: task is {state['task']}; allowed: numbers from 0")
    return state


def _check_tensors(file: Path, found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Raises `CheckpointError` unless names, shapes and types are those expected, and all values are finite."""
    unfit = "the model of this configuration"
    if different := sorted(found.keys() ^ expected.keys()):
        raise CheckpointError(f"{file} {'has' if different[0] in found else 'lacks'} {different[0]}, unlike {unfit}")
    for name, tensor in expected.items():
        if found[name].shape != tensor.shape or found[name].dtype != tensor.dtype:
            sizes = [f"{each.dtype} of {tuple(each.shape)}" for each in (found[name], tensor)]
            raise CheckpointError(f"{file}: {name} is {sizes[0]}; {unfit} has {sizes[1]}")
    if (name := _first_non_finite(found)) is not None:
        raise CheckpointError(f"{file}: {name} is not finite")


def load_checkpoint(
    checkpoint: str | Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, ema_model=None
) -> None:
    """
    Puts the tensors of a checkpoint into model, optimizer and EMA. Everything is read and checked before the first of
    them changes.

    Raises:
        CheckpointError: when it is not whole, a value is not finite, or names, shapes or types do not fit.
    """
    checkpoint = Path(checkpoint)
    state = read_state(checkpoint)
    if (state["ema_step"] is None) != (ema_model is None):
        found, wanted = ("has no", "keeps an") if ema_model is not None else ("has an", "keeps no")
        raise CheckpointError(f"{checkpoint} {found} {EMA_NAME}, and the run {wanted} EMA")
    parameters = dict(model.named_parameters())
    device = next(iter(parameters.values())).device
    try:
        weights = load_file(checkpoint / MODEL_NAME)
        moments = load_file(checkpoint / OPTIMIZER_NAME)
        shadow = load_file(checkpoint / EMA_NAME) if ema_model is not None else {}
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{checkpoint}: {error}") from error
    _check_tensors(checkpoint / MODEL_NAME, weights, model.state_dict())
    if ema_model is not None:
        _check_tensors(checkpoint / EMA_NAME, shadow, parameters)
    trained = {name: parameter for name, parameter in parameters.items() if parameter.requires_grad}
    expected = {f"{quantity}.{name}": parameter for name, parameter in trained.items() for quantity in MOMENTS}
    expected |= {f"step.{name}": torch.zeros(()) for name in trained}
    # While all steps were skipped, there are no moments yet.
    if moments:
        _check_tensors(checkpoint / OPTIMIZER_NAME, moments, expected)
    model.load_state_dict(weights)
    for key, tensor in moments.items():
        quantity, _, name = key.partition(".")
        # A copy: the file is mapped, and goes when newer ones come. A fused optimizer wants the parameters' memory format.
        parameter = parameters[name]
        fits = tensor.shape == parameter.shape
        optimizer.state[parameter][quantity] = (
            torch.empty_like(parameter).copy_(tensor) if fits else tensor.to(device, copy=True)
        )
    if ema_model is not None:
        ema_model.shadow_params = [torch.empty_like(p).copy_(shadow[name]) for name, p in parameters.items()]
        ema_model.optimization_step = state["ema_step"]


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
        if state["task"] < task:
            # Older ones are of this task or earlier ones.
            return None
    return None
