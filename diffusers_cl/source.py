"""A class-conditional model as it is found, in a folder or on the Hub: what it is, what its classes are called."""

import inspect
from dataclasses import dataclass
from pathlib import Path

import torch
import yaml
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler, UNet2DModel
from safetensors import SafetensorError

from .adapters import has_adapters
from .config import NUM_TRAIN_TIMESTEPS
from .errors import CheckpointError, ConfigError, RunError, first_line
from .fetch import PIPELINE_FILES, model_folder
from .files import read_json
from .folders import tasks_of_run


PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")
FLOW_SCHEDULERS = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")


@dataclass
class Source:
    """
    A model as it was found.

    Attributes:
        model (`str`): the repo or folder, as it was asked for.
        revision (`str` or `None`): the repo's commit.
        unet (`UNet2DModel`): in float32, on the CPU.
        scheduler (`DDIMScheduler`, or `FlowMatchEulerDiscreteScheduler` of a flow): with its noise schedule and prediction
            type, or with its shift.
        id2label (`dict[int, str]`): the classes that it is said to know, by the rows of its class embedding.
    """

    model: str
    revision: str | None
    unet: UNet2DModel
    scheduler: DDIMScheduler | FlowMatchEulerDiscreteScheduler
    id2label: dict[int, str]

    @property
    def class_ids(self) -> dict[str, int]:
        """Class name to row, in the order of the rows."""
        return {name: row for row, name in sorted(self.id2label.items())}


def _check_unet_config(where: str, config: dict) -> None:
    """Raises `ConfigError` for a network that is not a class-conditional `UNet2DModel` of square images."""
    size, channels = config.get("sample_size"), (config.get("in_channels", 3), config.get("out_channels", 3))
    height, width = size if isinstance(size, list) and len(size) == 2 else (size, size)
    kind = config.get("_class_name", UNet2DModel.__name__)
    if kind != UNet2DModel.__name__:
        raise ConfigError(f"{where} has a {kind}; allowed: a {UNet2DModel.__name__}")
    if config.get("class_embed_type") is not None:
        raise ConfigError(
            f"{where}: class_embed_type is {config['class_embed_type']!r}; allowed: null, which is a table with a row a class"
        )
    if not config.get("num_class_embeds"):
        raise ConfigError(
            f"{where} has no class embedding (num_class_embeds is not set): it cannot be asked for a class"
        )
    if not isinstance(height, int) or height != width:
        raise ConfigError(f"{where}: sample_size is {size}; allowed: a whole number, or the same one twice")
    if channels not in ((1, 1), (3, 3)):
        raise ConfigError(
            f"{where}: in_channels and out_channels are {channels[0]} and {channels[1]}; allowed: 1 and 1, or 3 and 3,"
            " which are images"
        )
    if config.get("quantization_config") is not None:
        raise ConfigError(f"{where} is quantized; allowed: weights in float32, float16 or bfloat16")


def _load_unet(where: str, folder: Path, config: dict) -> UNet2DModel:
    try:
        unet, info = UNet2DModel.from_pretrained(
            folder, subfolder="unet", use_safetensors=True, output_loading_info=True, local_files_only=True
        )
    except (OSError, ValueError, RuntimeError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{where}: unet cannot be loaded (from safetensors only): {first_line(error)}"
        ) from error
    # diffusers only warns of these.
    different = [name for key in ("missing_keys", "unexpected_keys", "mismatched_keys") for name in info[key]]
    if different:
        raise CheckpointError(
            f"{where}: the weights of unet do not fit its config: {', '.join(map(str, different[:3]))}"
        )
    unet = unet.float().eval()
    if bad := [name for name, parameter in unet.named_parameters() if not torch.isfinite(parameter).all()]:
        raise CheckpointError(f"{where}: the weights of unet are not finite: {', '.join(bad[:3])}")
    # Of one kind with those that are made here.
    size = config["sample_size"]
    unet.register_to_config(sample_size=size[0] if isinstance(size, list) else size)
    return unet


def _load_flow_scheduler(where: str, kind: str, config: dict) -> FlowMatchEulerDiscreteScheduler:
    """Euler's for Euler's or Heun's; what is shifted by hand or runs the other way is another convention."""
    for key in ("use_dynamic_shifting", "invert_sigmas", "stochastic_sampling"):
        if config.get(key):
            raise ConfigError(f"{where}: {key} of the scheduler {kind} is set; allowed: flows without it")
    known = inspect.signature(FlowMatchEulerDiscreteScheduler).parameters
    try:
        return FlowMatchEulerDiscreteScheduler.from_config(
            {key: value for key, value in config.items() if key in known}
        )
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(f"{where}: the scheduler {kind} cannot have its settings: {first_line(error)}") from error


def _load_scheduler(where: str, config: dict) -> DDIMScheduler | FlowMatchEulerDiscreteScheduler:
    """The scheduler with which the model is sampled and trained on, whatever it came with: same noise, same prediction."""
    kind = str(config.get("_class_name"))
    if (steps := config.get("num_train_timesteps", 1000)) != NUM_TRAIN_TIMESTEPS:
        raise ConfigError(f"{where}: the scheduler's num_train_timesteps is {steps}; allowed: {NUM_TRAIN_TIMESTEPS}")
    if kind in FLOW_SCHEDULERS:
        return _load_flow_scheduler(where, kind, config)
    # What has sigmas or flows in place of betas names none.
    if config.get("beta_schedule") is None and kind not in ("DDPMScheduler", "DDIMScheduler"):
        raise ConfigError(
            f"{where}: the scheduler {kind} has no schedule of betas; allowed: those of DDPM's kind, or"
            f" {' or '.join(FLOW_SCHEDULERS)}"
        )
    if config.get("use_flow_sigmas") or str(config.get("prediction_type")).startswith("flow"):
        raise ConfigError(
            f"{where}: the scheduler {kind} is set to flow matching; allowed: diffusion, as DDPM has it, or"
            f" {' or '.join(FLOW_SCHEDULERS)}"
        )
    if (prediction := config.get("prediction_type", "epsilon")) not in PREDICTION_TYPES:
        raise ConfigError(
            f"{where}: the scheduler's prediction_type is {prediction!r}; allowed: {', '.join(PREDICTION_TYPES)}"
        )
    known = inspect.signature(DDIMScheduler).parameters
    try:
        scheduler = DDIMScheduler.from_config({key: value for key, value in config.items() if key in known})
    except (RuntimeError, ValueError, TypeError) as error:
        raise ConfigError(
            f"{where}: DDIMScheduler cannot have the scheduler's settings: {first_line(error)}"
        ) from error
    if len(scheduler.alphas_cumprod) != NUM_TRAIN_TIMESTEPS:
        raise ConfigError(f"{where}: the scheduler's trained_betas are not {NUM_TRAIN_TIMESTEPS}")
    return scheduler


def check_labels(where: str, labels: list | dict, num_rows: int) -> dict[int, str]:
    """
    Returns class names by row.

    Args:
        where (`str`): where they are from, for messages.
        labels (`list` of names, or `dict` of row numbers and names).
        num_rows (`int`): of the class embedding. Those without a name are not among the model's classes.

    Raises:
        ConfigError: for anything else, two classes of one name, and rows that the model does not have.
    """
    if not isinstance(labels, (list, dict)) or not labels:
        raise ConfigError(f"{where}: allowed: a list of class names, or a mapping of row numbers to class names")
    pairs = enumerate(labels) if isinstance(labels, list) else labels.items()
    result = {}
    for row, name in pairs:
        if isinstance(row, bool) or not str(row).isdecimal() or int(row) >= num_rows:
            raise ConfigError(
                f"{where}: row {row!r}; allowed: whole numbers from 0 to {num_rows - 1}, which the model has"
            )
        # YAML takes an unquoted 7 for a number, and yes for a truth.
        text = str(name)
        if type(name) not in (str, int) or not text.strip() or not text.isprintable():
            raise ConfigError(
                f"{where}: row {row} is named {name!r}; allowed: text, in quotes where it could be something else"
            )
        if text in result.values() or int(row) in result:
            raise ConfigError(f"{where}: row {row}, {text!r}: that row or name stands there twice")
        result[int(row)] = text
    return result


def _labels(file: str | None, model: str, folder: Path, unet_config: dict) -> dict[int, str]:
    """The class names of `--labels`, or else of the pipeline, or else of the network, or else the row numbers."""
    num_rows = unet_config["num_class_embeds"]
    if file is not None:
        try:
            return check_labels(f"--labels {file}", yaml.safe_load(Path(file).read_text(encoding="utf-8")), num_rows)
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"--labels {file}: {first_line(error)}") from error
    index = folder / "model_index.json"
    places = {"model_index.json": read_json(index) if index.exists() else {}, "unet/config.json": unet_config}
    for name, config in places.items():
        if config.get("id2label"):
            return check_labels(f"--model {model}: id2label of {name}", config["id2label"], num_rows)
    return {row: str(row) for row in range(num_rows)}


def open_source(
    model: str, revision: str | None = None, labels: str | None = None, cache_dir: str | None = None
) -> Source:
    """
    Returns the class-conditional model of a folder or repo: `unet/` and `scheduler/`, of a pipeline or by themselves.
    No code of it is run, nothing is unpickled.

    Args:
        model (`str`): the folder or repo.
        revision (`str`, *optional*): the repo's branch, tag or commit.
        labels (`str`, *optional*): a JSON or YAML file with class names, as [`check_labels`] takes them.
        cache_dir (`str`, *optional*): where downloads are kept.

    Raises:
        ConfigError: when there is no such model, or one of another kind.
        DataError: when it cannot be fetched.
        CheckpointError: when a file of it is missing or damaged.
    """
    where = f"--model {model}"
    if Path(model).is_dir():
        if revision is not None:
            raise ConfigError(f"--revision is {revision!r}; allowed: nothing for a folder, which {model} is")
        if tasks := tasks_of_run(model):
            raise ConfigError(f"{where} is the folder of a run; allowed: one of its tasks, such as {tasks[0]}")
    try:
        folder, commit = model_folder(model, revision, PIPELINE_FILES, cache_dir=cache_dir)
    except RunError as error:
        raise type(error)(f"--model: {error}") from error
    for name in ("unet/config.json", "scheduler/scheduler_config.json"):
        if not (folder / name).is_file():
            raise ConfigError(
                f"{where} has no {name}; allowed: a pipeline with a unet and a scheduler, or these two alone"
            )
    if has_adapters(folder):
        raise ConfigError(f"{where} has adapters, parameters of single classes; allowed: one network for all classes")
    unet_config = read_json(folder / "unet" / "config.json")
    _check_unet_config(where, unet_config)
    id2label = _labels(labels, model, folder, unet_config)
    scheduler = _load_scheduler(where, read_json(folder / "scheduler" / "scheduler_config.json"))
    return Source(model, commit, _load_unet(where, folder, unet_config), scheduler, id2label)
