"""The network of a run with an adapter: frozen after the first task, with parameters of its own for every later class."""

import copy
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn as nn
from diffusers import UNet2DModel
from safetensors import SafetensorError

from .config import TrainingConfig
from .errors import CheckpointError, ConfigError, first_line
from .filters import adapted_modules, read_class
from .funlora import FunLoRA
from .pipeline import ClassConditionalPipeline


# In a task folder.
ADAPTERS = "adapters"
MAX_CLASSES = 100_000
# Of the configuration, what the adapters of a model have once and for all.
ADAPTER_KEYS = (
    *("adapter", "adapter_layers", "adapter_ratio", "funlora_function", "funlora_terms", "funlora_learn_terms"),
    "train_class_embedding",
)


class AdaptedUNet(nn.Module):
    """
    A network with its adapters as one module, called like the network.

    Args:
        unet (`UNet2DModel`).
        adapters ([`FunLoRA`] or `None`): none while the network is still trained as a whole.
    """

    def __init__(self, unet: UNet2DModel, adapters: FunLoRA | None = None):
        super().__init__()
        self.unet, self.adapters = unet, adapters

    @property
    def config(self):
        return self.unet.config

    def forward(self, sample: torch.Tensor, timestep, class_labels: torch.Tensor):
        if self.adapters is None:
            return self.unet(sample, timestep, class_labels=class_labels)
        return self.adapters(self.unet, sample, timestep, class_labels)


def split(unet: nn.Module) -> tuple[nn.Module, FunLoRA | None]:
    """Returns the network of a run and its adapters, `None` where it has none."""
    return (unet.unet, unet.adapters) if isinstance(unet, AdaptedUNet) else (unet, None)


def as_pipeline(unet: nn.Module, noise_scheduler, id2label: dict[int, str] | None = None) -> ClassConditionalPipeline:
    """Returns the pipeline of a run's network, adapters and all."""
    unet, adapters = split(unet)
    return ClassConditionalPipeline(unet, noise_scheduler, id2label, adapters)


def adapt(
    unet: nn.Module, tasks: list[list[str]], task: int, class_ids: dict[str, int], config: TrainingConfig
) -> float:
    """
    Prepares a network for a task and returns its learning rate. With an adapter, all of it is frozen but the new classes'
    own parameters; in the first task it is trained as a whole.

    Args:
        unet (`UNet2DModel` or [`AdaptedUNet`]): of the run, which changes.
        tasks (`list[list[str]]`), class_ids (`dict[str, int]`): of the stream.
        task (`int`): that is about to be trained, from 0.
        config ([`TrainingConfig`]): its adapter keys.

    Raises:
        ConfigError: when no convolution is named as in `adapter_layers`, or the ratio does not divide the channels of one.
    """
    if config.adapter == "none" or task == 0:
        return config.learning_rate
    if unet.adapters is None:
        earlier = [class_ids[name] for names in tasks[:task] for name in names]
        unet.adapters = _new_adapters(unet.unet, earlier, config)
    # As it is loaded, a network is not frozen.
    unet.unet.requires_grad_(False)
    for name in tasks[task]:
        if class_ids[name] not in unet.adapters.class_ids:
            unet.adapters.add_class(class_ids[name], unet.unet, name)
    unet.adapters.train_only([class_ids[name] for name in tasks[task]])
    return config.adapter_learning_rate or config.learning_rate


def _new_adapters(unet: nn.Module, first_class_ids: Sequence[int], config: TrainingConfig) -> FunLoRA:
    options = {
        "function": config.funlora_function,
        "num_terms": config.funlora_terms,
        "learn_terms": config.funlora_learn_terms,
        "ratio": config.adapter_ratio,
        "train_class_embedding": config.train_class_embedding,
    }
    try:
        return FunLoRA.from_unet(unet, first_class_ids, config.adapter_layers, **options)
    except ValueError as error:
        keys = {"ratio": "adapter_ratio", "num_te": "funlora_terms", "no con": "adapter_layers"}
        raise ConfigError(f"{keys[str(error)[:6].strip()]}: {error}") from error


def with_adapter(unet: UNet2DModel, config: TrainingConfig) -> UNet2DModel | AdaptedUNet:
    """Returns the network of a run, as its adapter has it; raises a `ConfigError` as [`adapt`], before anything is trained."""
    if config.adapter == "none":
        return unet
    _new_adapters(copy.deepcopy(unet), [0], config)
    return AdaptedUNet(unet)


def has_adapters(folder: str | Path) -> bool:
    """Returns whether the model in a folder has adapters."""
    return (Path(folder) / ADAPTERS / FunLoRA.config_name).exists()


def read_adapters(path: str | Path, unet: UNet2DModel | None = None) -> FunLoRA:
    """
    Returns the adapters in a folder, not to be trained. No code is run, nothing is unpickled.

    Args:
        path (`Path`): what [`FunLoRA.save_pretrained`] wrote.
        unet (`UNet2DModel`, *optional*): the network that they are for.

    Raises:
        CheckpointError: when they cannot be read, or are another network's.
    """
    options = {"use_safetensors": True, "local_files_only": True, "output_loading_info": True}
    try:
        config = FunLoRA.load_config(path, local_files_only=True)
        if len(config["names"]) > MAX_CLASSES:
            raise ValueError(f"it has {len(config['names'])} classes; allowed: at most {MAX_CLASSES}")
        # Nothing of the sizes that it names is made: what is not in the file stays without memory.
        if unet is not None:
            adapted_modules(unet, config["layers"], config["embedding_dim"])
        adapters, info = FunLoRA.from_pretrained(path, **options)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {first_line(error)}") from error
    # diffusers only warns of these.
    different = [name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[key]]
    if different:
        raise CheckpointError(f"{path}: its parameters do not fit its config: {', '.join(map(str, different[:3]))}")
    return adapters.requires_grad_(False)


def load_adapters(folder: str | Path, unet: UNet2DModel) -> FunLoRA | None:
    """Returns the adapters in the folder of a model ([`read_adapters`]), where the network is; `None` where it has none."""
    return read_adapters(Path(folder) / ADAPTERS, unet).to(unet.device) if has_adapters(folder) else None


def add_class(pipeline: ClassConditionalPipeline, path: str | Path, name: str | None = None) -> int:
    """
    Adds a class from its file ([`FunLoRA.save_class`]) to an adapted model, and returns its id: the file's, or the next that
    is free.

    Args:
        pipeline ([`ClassConditionalPipeline`]), path (`Path`).
        name (`str`, *optional*): of the class; by default the file's, or else the id.

    Raises:
        ConfigError: when the model has no adapters, or those of another network or other settings; when the name is taken.
    """
    if pipeline.adapters is None:
        raise ConfigError("the model has no adapters: it cannot take a class from a file")
    known = pipeline.known_classes
    try:
        about = read_class(path)
        class_id = max(known) + 1 if about["class_id"] in known else about["class_id"]
        name = name or about.get("name") or str(class_id)
        if name in known.values():
            raise ValueError(f"the model has a class {name!r} already")
        pipeline.adapters.load_class(path, class_id)
    except (OSError, SafetensorError, ValueError) as error:
        raise ConfigError(f"{path}: {first_line(error)}") from error
    pipeline.register_to_config(id2label={str(id): known.get(id, name) for id in sorted((*known, class_id))})
    return class_id


def remove_class(pipeline: ClassConditionalPipeline, class_label: int | str) -> None:
    """Takes a class that has adapters out of a model; raises a `ConfigError` for any other."""
    try:
        (class_id,) = pipeline.get_label_ids(class_label)
        if pipeline.adapters is None:
            raise ValueError("the model has no adapters: no class can be taken out of it")
        pipeline.adapters.remove_class(class_id)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    pipeline.register_to_config(id2label={str(id): n for id, n in pipeline.known_classes.items() if id != class_id})


def parameter_counts(unet: nn.Module, class_ids: dict[str, int]) -> dict:
    """
    Returns what `metrics.json` says of a run's parameters: of the `network`; `per_class`, those that are trained for a class
    that comes later and for no other, embedding rows that nobody adapts aside; and the `importance` of the adapted layers by
    class name ([`FunLoRA.importance`]).
    """
    unet, adapters = split(unet)
    counts = {"network": sum(parameter.numel() for parameter in unet.parameters()), "per_class": 0}
    if adapters is None:
        return counts
    names = {class_id: name for name, class_id in class_ids.items()}
    importance = {names[class_id]: found for class_id, found in adapters.importance().items()}
    return {**counts, "per_class": adapters.parameters_per_class, "importance": importance}
