"""Going on from a published task: its folder comes from the Hub or the disk, and becomes the first of the run's."""

import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import RemoteEntryNotFoundError

from .adapters import ADAPTER_KEYS, check_settings, has_adapters, split
from .config import OPERATIONAL_KEYS, TrainingConfig
from .errors import CheckpointError, ConfigError, DataError, RunError
from .fetch import check_files, hub_faults, pinned
from .files import MANIFEST_NAME, publish_folder, read_json, write_json
from .folders import (
    CONSOLIDATION,
    MEMORY_NAME,
    START_NAME,
    STATE_NAME,
    read_start,
    read_task_state,
    task_folder,
    tasks_of_run,
)
from .growth import load_weights, restore_penalty
from .names import dataset_name
from .task_repos import task_repo_id
from .tasks import check_capacity


NO_TASK = (
    f"has no {CONSOLIDATION}/{STATE_NAME}: it is no task of diffusers-cl; scripts/adopt.py makes one of a class-conditional"
    " pipeline"
)
# What a task folder may consist of; nothing else is fetched or copied.
ALLOWED_FILES = re.compile(
    r"model_index\.json|README\.md|samples\.png|pipeline\.py|(unet|scheduler|adapters)/\w+\.json"
    r"|adapters/funlora\.py|(unet|adapters)/diffusion_pytorch_model\.safetensors|consolidation/\w+\.(json|safetensors)"
)
# Of a state, what going on reads.
STATE_KEYS = (
    *("task", "tasks", "class_ids", "seen_classes", "dataset", "rows", "fisher", "floor"),
    *("feature_extractor_info", "config"),
)
# A run's own: what it learns, on what machine, where it leaves its files.
OWN_KEYS = (
    *OPERATIONAL_KEYS,
    *("dataset_name", "dataset_config_name", "train_data_dir", "image_column", "label_column", "train_split"),
    *("eval_split", "max_train_samples", "tasks", "classes_per_task", "class_order", "num_class_embeds"),
    *("pretrained_model_name_or_path", "revision", "allow_known_classes", "model_config_name_or_path"),
    *("num_threads", "mixed_precision", "dynamo_backend", "channels_last", "allow_tf32"),
    *("feature_extractor_weights_path", "eval_classifier"),
)
# What the model, or the rows of its task matrix, cannot change any more.
FIXED_KEYS = ("resolution", "objective", "prediction_type", "eval_num_inference_steps")
# Of parts of a state, the same.
PART_KEYS = {
    "config": ("stream", "penalty", "feature_extractor", *(key for key in FIXED_KEYS if key != "objective")),
    "feature_extractor_info": ("name", "sha256"),
}


@dataclass
class Start:
    """
    The task that a run goes on from.

    Attributes:
        folder (`Path`): its folder, verified.
        state (`dict`): the content of its state.json.
        model (`str`): the repo or folder, as it was asked for.
        revision (`str` or `None`): the repo's commit.
        is_repo (`bool`): or else a folder.
    """

    folder: Path
    state: dict
    model: str
    revision: str | None
    is_repo: bool

    @property
    def task(self) -> int:
        return self.state["task"]

    @property
    def tasks(self) -> list[list[str]]:
        """The classes of the tasks that it has learned."""
        return self.state["tasks"][: self.task + 1]

    @property
    def class_ids(self) -> dict[str, int]:
        """The ids of the classes that it has learned."""
        return {name: self.state["class_ids"][name] for name in self.state["seen_classes"]}

    @property
    def settings(self) -> dict:
        """Its configuration, for keys that nothing sets."""
        known = {field.name for field in fields(TrainingConfig)} - set(OWN_KEYS)
        return {key: value for key, value in self.state["config"].items() if key in known}


def _download(model: str, revision: str | None, token: str | None, cache_dir: str | None) -> tuple[Path, str | None]:
    """The folder of a repo's snapshot with the files of a task, and its commit."""
    where = f"{model} at revision {revision}" if revision else model
    with hub_faults(where):
        options, commit, _ = pinned(model, revision, ALLOWED_FILES, token, cache_dir)
        try:
            # By the name that was asked for, which the cache then knows the commit of, offline too.
            named = options | {"revision": revision}
            huggingface_hub.hf_hub_download(filename=f"{CONSOLIDATION}/{STATE_NAME}", **named)
        except RemoteEntryNotFoundError as error:
            raise ConfigError(f"{where} {NO_TASK}") from error
        manifest = huggingface_hub.hf_hub_download(filename=f"{CONSOLIDATION}/{MANIFEST_NAME}", **options)
        names = [*_listed_files(Path(manifest), where), f"{CONSOLIDATION}/{MANIFEST_NAME}"]
        folder = Path(huggingface_hub.snapshot_download(allow_patterns=names, **options))
        return folder, commit or folder.name


def _listed_files(manifest: Path, where: str) -> list[str]:
    """The names in a manifest, which must all be a task folder's."""
    names = read_json(manifest).get("sha256")
    if not isinstance(names, dict):
        raise CheckpointError(f"{where}: {CONSOLIDATION}/{MANIFEST_NAME} cannot be read: it lists no files")
    if strange := [name for name in names if not ALLOWED_FILES.fullmatch(name)]:
        raise CheckpointError(f"{where}: {strange[0]!r} is no file of a task folder")
    return list(names)


def fetch_task(
    model: str, revision: str | None = None, token: str | None = None, cache_dir: str | Path | None = None
) -> Start:
    """
    Returns a task from a folder or from a repo on the Hub. Every file is verified; none of them is unpickled or run.

    Args:
        model (`str`): a task folder, or else the name of a repo.
        revision (`str`, *optional*): the repo's branch, tag or commit.
        token (`str`, *optional*): for private repos; by default the one that is saved on this machine.
        cache_dir (`Path`, *optional*): for what is downloaded; by default the Hugging Face cache.

    Raises:
        ConfigError: when there is no such task.
        DataError: when it cannot be fetched.
        CheckpointError: when it is not whole, or was written by a newer version.
    """
    if tasks := tasks_of_run(model):
        raise ConfigError(f"{model} is the folder of a run, name one of its tasks: {', '.join(map(str, tasks))}")
    folder, commit = Path(model), None
    if folder.is_dir() and revision is not None:
        raise ConfigError(f"revision is {revision!r}; allowed: null, because {model} is a folder")
    if not folder.is_dir():
        folder, commit = _download(model, revision, token, cache_dir)
    elif not (folder / CONSOLIDATION / STATE_NAME).exists():
        raise ConfigError(f"{model} {NO_TASK}")
    check_files(folder, ALLOWED_FILES)
    _listed_files(folder / CONSOLIDATION / MANIFEST_NAME, model)
    state = read_task_state(folder)
    missing = [key for key in STATE_KEYS if key not in state] or [
        f"{key}.{name}" for key, names in PART_KEYS.items() for name in names if name not in state[key]
    ]
    if missing:
        raise CheckpointError(f"{model}: its state has no {missing[0]!r}; it is of a version that none can go on from")
    if state["task"] >= len(state["tasks"]):
        raise CheckpointError(f"{model}: its state is of task {state['task']} of {len(state['tasks'])}")
    return Start(folder, state, model, commit, is_repo=folder != Path(model))


def load_start(config: TrainingConfig) -> Start | None:
    """
    Returns the task that `pretrained_model_name_or_path` names ([`fetch_task`]), from the output folder if this run has
    it already; `None` where none is named.
    """
    model = config.pretrained_model_name_or_path
    if model is None:
        return None
    kept = None if config.overwrite_output_dir else read_start(config.output_dir)
    if kept is not None and (kept["model"], kept["asked"]) == (model, config.revision):
        folder = task_folder(config.output_dir, kept["task"])
        return Start(folder, read_task_state(folder), model, kept["revision"], kept["is_repo"])
    try:
        start = fetch_task(model, config.revision, config.hub_token, config.cache_dir)
    except RunError as error:
        raise type(error)(f"pretrained_model_name_or_path: {error}") from error
    if start.state["config"]["stream"] == "joint":
        raise ConfigError(
            f"pretrained_model_name_or_path: {model} is of stream: joint, which is one phase with the matrix of many"
            " tasks; scripts/adopt.py makes one task of it"
        )
    return start


def check_start(start: Start, config: TrainingConfig) -> None:
    """Raises `ConfigError` for a configuration that does not go with the task."""
    if config.overwrite_output_dir and start.folder.resolve().is_relative_to(Path(config.output_dir).resolve()):
        raise ConfigError(f"overwrite_output_dir: {config.output_dir} holds the model to go on from")
    if config.replay == "memory" and not (start.folder / CONSOLIDATION / MEMORY_NAME).exists():
        raise ConfigError(
            f"replay is 'memory', but {start.model} has no {CONSOLIDATION}/{MEMORY_NAME} with images of its classes"
        )
    for key in (*FIXED_KEYS, *(ADAPTER_KEYS if has_adapters(start.folder) else ())):
        # Older states do not say their objective, which was the default.
        found = start.state["config"].get(key, getattr(TrainingConfig, key, None))
        if getattr(config, key) != found:
            raise ConfigError(f"{key} is {getattr(config, key)!r}; allowed: {found!r}, which {start.model} has")
    name = start.state["feature_extractor_info"]["name"]
    if config.feature_extractor != name and {"classifier", "inception"} & {config.feature_extractor, name}:
        raise ConfigError(
            f"feature_extractor is {config.feature_extractor!r}; the old classes were measured with {name!r}, and only"
            " that compares. For accuracy, eval_classifier may name another"
        )


def take_over(start: Start, unet, penalty, config: TrainingConfig, warn: Callable[[str], None]) -> None:
    """
    Puts weights and penalty of the task into a run's, which may have more classes.

    Args:
        start ([`Start`]), config ([`TrainingConfig`]).
        unet (`UNet2DModel`): with the rows that new classes start from.
        penalty: new, or `None`.
        warn: called with what the task has and the run leaves out, or the reverse.

    Raises:
        ConfigError, CheckpointError: as [`load_weights`] and [`restore_penalty`]; when a file is not there.
    """
    load_weights(unet, start.folder, list(start.class_ids.values()))
    if (adapters := split(unet)[1]) is not None:
        check_settings(adapters, start.class_ids, config, start.model)
    recorded = start.state["config"]["penalty"]
    if penalty is None:
        if recorded != "none":
            warn(f"penalty: none leaves out that of {start.model} ({recorded}), here and in all later tasks")
    elif not restore_penalty(penalty, start.folder / CONSOLIDATION, unet):
        if recorded != "none":
            raise CheckpointError(f"{start.model}: its penalty ({recorded}) is not in {CONSOLIDATION}")
        warn(f"{start.model} has no penalty: what was learned until then is not held by one")


def extend_stream(
    start: Start, new_tasks: list[list[str]], config: TrainingConfig, image_bytes: int
) -> tuple[list[list[str]], dict[str, int]]:
    """
    Returns all tasks of a stream that goes on, and the id of every class: old ones keep theirs, by name.

    Raises:
        DataError: for classes that the model knows already, unless `allow_known_classes`; for too few `num_class_embeds` or
            `memory_bytes`.
    """
    class_ids = start.class_ids
    new = [name for names in new_tasks for name in names]
    known = [name for name in new if name in class_ids]
    if known and not config.allow_known_classes:
        raise DataError(
            f"{start.model} knows {', '.join(known[:10])} already; leave them out (tasks), or refine them with"
            " allow_known_classes"
        )
    free = max(class_ids.values()) + 1
    for name in new:
        if name not in class_ids:
            class_ids[name], free = free, free + 1
    check_capacity(config, free, image_bytes)
    return [*start.tasks, *new_tasks], class_ids


def previous_model(task: int, start: Start | None, hub_model_id: str | None) -> dict | None:
    """Returns the model that a task was learned after and its commit, where that is known; `None` for the first task."""
    if start is not None and task == start.task + 1:
        # A path is this machine's business.
        return {"model": start.model if start.is_repo else Path(start.model).name, "revision": start.revision}
    if task == 0:
        return None
    folder = task_folder("", task - 1).name
    return {"model": folder if hub_model_id is None else task_repo_id(hub_model_id, task - 1), "revision": None}


def origin(task: int, start: Start | None, config: TrainingConfig, hub_model_id: str | None) -> dict:
    """
    Returns what the state of a task says of where it comes from: `dataset`, the names of all data that its model has learned,
    `a + b` in the order in which they came; `references`, what the reference statistics are of (`data`, or an adopted
    model's own samples); and `lineage`, with the `previous` model.

    Args:
        task (`int`).
        start ([`Start`], *optional*): what the run goes on from.
        config ([`TrainingConfig`]).
        hub_model_id (`str`, *optional*): where the run is pushed.
    """
    before = {} if start is None else start.state
    names = [*before.get("dataset", "").split(" + "), dataset_name(asdict(config))]
    return {
        "dataset": " + ".join(dict.fromkeys(filter(None, names))),
        "references": before.get("references", "data"),
        "lineage": {"previous": previous_model(task, start, hub_model_id)},
    }


def copy_start(start: Start, output_dir: str | Path, revision: str | None) -> None:
    """Makes the task a run's own: `task-<k>` in its output folder, and `start.json`, which says where it is from."""
    output_dir = Path(output_dir)
    if (output_dir / START_NAME).exists():
        return
    manifest = start.folder / CONSOLIDATION / MANIFEST_NAME

    def write(folder: Path) -> None:
        for name in _listed_files(manifest, start.model):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            # The cache has links.
            shutil.copyfile(start.folder / name, folder / name)

    publish_folder(task_folder(output_dir, start.task), write, CONSOLIDATION)
    found = {"task": start.task, "model": start.model, "is_repo": start.is_repo, "revision": start.revision}
    write_json(output_dir / START_NAME, found | {"asked": revision})
