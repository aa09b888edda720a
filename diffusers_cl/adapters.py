"""The network of a run with an adapter: frozen after the first task, with parameters of its own for every later class."""

from pathlib import Path

import torch
import torch.nn as nn
from diffusers import UNet2DModel
from safetensors import SafetensorError

from .config import TrainingConfig
from .errors import CheckpointError, ConfigError, first_line
from .filters import adapted_modules, find_layers, frozen_digest, read_class
from .funlora import FunLoRA
from .pipeline import ClassConditionalPipeline


# In a task folder.
ADAPTERS = "adapters"
MAX_CLASSES = 100_000
# What a fault of the adapters' is called in the configuration, by its first word.
_KEYS = {"ratio": "adapter_ratio", "num_terms": "funlora_terms", "no": "adapter_layers"}
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


def importance(adapters: FunLoRA) -> dict[int, dict[str, float]]:
    """
    Returns, by class and layer, how far the vectors `A` and `B` are from the ones that they started from: the mean of the
    absolute differences over the entries of both (arXiv 2510.02631, Eq. 20, put together from its text). The paper takes it of
    `vanilla` adapters of all layers.
    """
    found: dict[int, dict[str, float]] = {}
    for class_id in adapters.class_ids:
        for name in adapters.config.layers:
            layer = adapters.classes[str(class_id)].get_submodule(name)
            moved = (torch.cat([layer.A, layer.B]) - 1).abs().mean().item()
            found.setdefault(class_id, {})[name] = moved
    return found


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
    """
    if config.adapter == "none" or task == 0:
        return config.learning_rate
    if unet.adapters is None:
        # A class that was learned once more stands in two tasks.
        earlier = list(dict.fromkeys(class_ids[name] for names in tasks[:task] for name in names))
        unet.adapters = FunLoRA.from_unet(unet.unet, earlier, config.adapter_layers, **_settings(config))
    # As it is loaded, a network is not frozen.
    unet.unet.requires_grad_(False)
    for name in tasks[task]:
        if class_ids[name] not in unet.adapters.class_ids:
            unet.adapters.add_class(class_ids[name], unet.unet, name)
    unet.adapters.train_only([class_ids[name] for name in tasks[task]])
    return config.adapter_learning_rate or config.learning_rate


def _settings(config: TrainingConfig) -> dict:
    return {
        "function": config.funlora_function,
        "num_terms": config.funlora_terms,
        "learn_terms": config.funlora_learn_terms,
        "ratio": config.adapter_ratio,
        "train_class_embedding": config.train_class_embedding,
    }


def with_adapter(unet: UNet2DModel, config: TrainingConfig, is_compiled: bool) -> UNet2DModel | AdaptedUNet:
    """
    Returns the network of a run, as its adapter has it.

    Args:
        unet (`UNet2DModel`), config ([`TrainingConfig`]).
        is_compiled (`bool`): whether training compiles it, for which the groups of every batch would be new code.

    Raises:
        ConfigError: before anything is trained, when no convolution is named as in `adapter_layers`, when `adapter_ratio` or
            `funlora_terms` do not fit, and for a network that is compiled.
    """
    if config.adapter == "none":
        return unet
    if is_compiled:
        raise ConfigError(f"dynamo_backend is 'inductor'; allowed: 'no' with adapter: {config.adapter}")
    try:
        # Thrown away: the network that it would be for is still to be trained.
        FunLoRA(find_layers(unet, config.adapter_layers), 0, [0], "", **_settings(config))
    except ValueError as error:
        raise ConfigError(f"{_KEYS[str(error).split()[0]]}: {error}") from error
    return AdaptedUNet(unet)


def check_settings(adapters: FunLoRA, class_ids: dict[str, int], config: TrainingConfig, where: str) -> None:
    """Raises a `CheckpointError` unless adapters are what the state beside them says: of its settings and classes."""
    for key, value in _settings(config).items():
        if adapters.config[key] != value:
            raise CheckpointError(f"{where}: its adapters have {key} {adapters.config[key]!r}, its state {value!r}")
    if strange := sorted({*adapters.class_ids, *adapters.config.first_class_ids} - set(class_ids.values())):
        raise CheckpointError(f"{where}: its adapters are of the class id {strange[0]}, which its state does not know")


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
            if config["base"] != frozen_digest(unet):
                raise ValueError("it is for a network of other weights")
        adapters, info = FunLoRA.from_pretrained(path, **options)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise CheckpointError(f"{path} cannot be loaded: {first_line(error)}") from error
    # diffusers only warns of these.
    different = [name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[key]]
    if different:
        raise CheckpointError(f"{path}: its parameters do not fit its config: {', '.join(map(str, different[:3]))}")
    if bad := [name for name, parameter in adapters.named_parameters() if not parameter.isfinite().all()]:
        raise CheckpointError(f"{path}: its parameters are not finite: {bad[0]}")
    return adapters.float().requires_grad_(False)


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
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {first_line(error)}") from error
    pipeline.adapters.to(pipeline.unet.device)
    pipeline.register_to_config(id2label={str(id): known.get(id, name) for id in sorted((*known, class_id))})
    return class_id


def remove_class(pipeline: ClassConditionalPipeline, class_label: int | str) -> None:
    """
    Takes a class that has adapters out of a model; one of the first classes, which was refined, is again what the network makes
    of it.

    Raises:
        ConfigError: for a class that is not known, or has no adapters.
    """
    try:
        (class_id,) = pipeline.get_label_ids(class_label)
        if pipeline.adapters is None:
            raise ValueError("the model has no adapters: no class can be taken out of it")
        pipeline.adapters.remove_class(class_id)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if class_id not in pipeline.adapters.config.first_class_ids:
        left = {str(id): name for id, name in pipeline.known_classes.items() if id != class_id}
        pipeline.register_to_config(id2label=left)
    if not pipeline.adapters.class_ids:
        pipeline.register_modules(adapters=None)


def parameter_counts(unet: nn.Module, class_ids: dict[str, int]) -> dict:
    """
    Returns what `metrics.json` says of a run's parameters: of the `network`; `per_class`, those that are trained for a class
    that comes later and for no other, embedding rows that nobody adapts aside; and the `importance` of the adapted layers by
    class name ([`importance`]).
    """
    unet, adapters = split(unet)
    counts = {"network": sum(parameter.numel() for parameter in unet.parameters()), "per_class": 0}
    if adapters is None:
        return counts
    names = {class_id: name for name, class_id in class_ids.items()}
    by_name = {names[class_id]: found for class_id, found in importance(adapters).items()}
    return {**counts, "per_class": adapters.parameters_per_class, "importance": by_name}
