"""New classes in a network and its penalty: their class embedding gains rows, and what is there stays as it is."""

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError
from safetensors.torch import load_file

from .adapters import load_adapters, split
from .errors import CheckpointError, ConfigError
from .ewc import WEIGHTS_NAME
from .fisher import trainable_parameters


EMBEDDING = "class_embedding.weight"


def load_weights(unet: torch.nn.Module, folder: str | Path, class_ids: list[int] | None = None) -> None:
    """
    Loads the weights of a task into a network that may have more classes.

    Args:
        unet (`UNet2DModel` or [`AdaptedUNet`]): with a class embedding.
        folder (`Path`): the task's.
        class_ids (`list[int]`, *optional*): the rows of the class embedding to take, where the network's others are as
            they should be; by default all, of as many as the network has.

    Raises:
        CheckpointError: when file, names or shapes do not fit.
    """
    path = Path(folder) / "unet" / SAFETENSORS_WEIGHTS_NAME
    network, _ = split(unet)
    try:
        weights = load_file(path)
        if class_ids is not None:
            rows = network.state_dict()[EMBEDDING].clone()
            rows[class_ids] = weights[EMBEDDING].to(rows)[class_ids]
            weights[EMBEDDING] = rows
        network.load_state_dict(weights)
    except (OSError, SafetensorError, KeyError, IndexError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path} does not fit the network of unet/config.json beside it: {reason}") from error
    if network is not unet:
        unet.adapters = load_adapters(folder, network)


def pad_penalty(penalty, model: torch.nn.Module) -> None:
    """
    Gives a penalty's tensors the rows that the model's class embedding has gained: zero, so that new classes are free. (The
    controls `l2` and `random_direction` hold rows that are not in use yet, where there is room from the start.)

    Args:
        penalty: [`Rank1EWC`], [`DiagonalEWC`] or one of their kind; its tensors may have a first dimension more than the
            parameter.
        model (`nn.Module`): unwrapped.
    """
    rows = dict(trainable_parameters(model))[EMBEDDING].shape[0]
    for tensors in penalty.tensors.values():
        tensor = tensors.get(EMBEDDING)
        if tensor is not None and (missing := rows - tensor.shape[-2]) > 0:
            tensors[EMBEDDING] = F.pad(tensor, (0, 0, 0, missing))


def restore_penalty(penalty, folder: str | Path, model: torch.nn.Module) -> bool:
    """
    Puts the state of a task's penalty into `penalty`, which keeps its own `ewc_lambda`, and grows it to the model.

    Args:
        penalty: the run's, new.
        folder (`Path`): the task's consolidation folder.
        model (`nn.Module`): unwrapped.

    Returns:
        `bool`: whether there was one.

    Raises:
        CheckpointError: when its file cannot be read, or does not fit the model.
        ConfigError: when it is of another kind.
    """
    path = Path(folder) / WEIGHTS_NAME
    if not path.exists():
        return False
    try:
        found = type(penalty).from_pretrained(folder)
    except (OSError, SafetensorError, KeyError, TypeError, json.JSONDecodeError, RecursionError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except ValueError as error:
        raise ConfigError(f"penalty: {error}; allowed: that, or none") from error
    if (rank := getattr(penalty, "rank", None)) != getattr(found, "rank", None):
        raise ConfigError(f"fisher_rank is {rank}; allowed: {found.rank}, which {path} has")
    if penalty.automatic != found.automatic:
        raise ConfigError(
            f"ewc_lambda is {penalty.ewc_lambda!r}, and {path} was made with {found.ewc_lambda!r}; allowed: a number after a"
            " number, auto or a multiple of it after auto"
        )
    try:
        penalty.load_state_dict(found.state_dict())
        pad_penalty(penalty, model)
        penalty(model)
    except (ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(f"{path} does not fit the model beside it: {error}") from error
    return True
