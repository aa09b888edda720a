"""Task folders as they are found: their names, and their states."""

import re
from pathlib import Path

from . import __version__
from .errors import CheckpointError
from .files import check_fields, read_json, verify_folder


CONSOLIDATION = "consolidation"
STATE_NAME = "state.json"
MEMORY_NAME = "memory.safetensors"
# In a run's folder: the task that it went on from, which is not its own.
START_NAME = "start.json"
SCHEMA = 1
# Of a state, what every one has, and what may be in it.
STATE_TYPES = {"schema": int, "task": int}
OTHER_STATE_TYPES = {
    **{"tasks": list, "class_ids": dict, "seen_classes": list, "global_step": int, "rows": list, "fisher": list},
    **{"floor": dict, "feature_extractor_info": dict, "config": dict, "dataset": str, "lineage": dict},
}
# What a run reads of its own tasks.
OWN_STATE_KEYS = ("tasks", "class_ids", "seen_classes", "global_step", "rows", "fisher")


def task_folder(output_dir: str | Path, task: int) -> Path:
    """Returns the folder of a task, counted from 0."""
    return Path(output_dir) / f"task-{task:02d}"


def _check_state(where: Path, state: dict) -> None:
    """Raises `CheckpointError` for values that no run writes; what is not there is not asked for."""
    check_fields(where, state, {key: kind for key, kind in OTHER_STATE_TYPES.items() if key in state})
    if state["task"] < 0:
        raise CheckpointError(f"{where}: task is {state['task']}; allowed: numbers from 0")
    class_ids = state.get("class_ids", {})
    ids = list(class_ids.values())
    if any(type(class_id) is not int or class_id < 0 for class_id in ids) or len(set(ids)) < len(ids):
        raise CheckpointError(f"{where}: class_ids has {ids!r:.80}; allowed: numbers from 0, each once")
    unknown = [name for name in state.get("seen_classes", ()) if not isinstance(name, str) or name not in class_ids]
    if unknown:
        raise CheckpointError(f"{where}: seen_classes has {unknown[0]!r}, which is not in class_ids")
    for names in state.get("tasks", ()):
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise CheckpointError(f"{where}: tasks has {names!r:.80}; allowed: lists of class names")


def read_task_state(folder: str | Path) -> dict:
    """
    Returns `consolidation/state.json` of a task folder, after every one of its files was verified. Files that are not in its
    manifest may be beside them: they are not read.

    Raises:
        CheckpointError: when the folder is not whole, is not of the task that its name says, or was written by a newer
            version of this package.
    """
    folder = Path(folder)
    path = folder / CONSOLIDATION / STATE_NAME
    if path.relative_to(folder).as_posix() not in verify_folder(folder, CONSOLIDATION, allow_others=True):
        raise CheckpointError(f"{folder}: {CONSOLIDATION}/{STATE_NAME} is not in its manifest")
    state = read_json(path)
    check_fields(path, state, STATE_TYPES)
    if state["schema"] > SCHEMA:
        raise CheckpointError(f"{folder} was written by diffusers-cl {state.get('version')}, this is {__version__}")
    _check_state(path, state)
    if re.fullmatch("task-[0-9]{2,}", folder.name) and folder.name != task_folder("", state["task"]).name:
        raise CheckpointError(f"{folder} is task {state['task']}, by its {CONSOLIDATION}/{STATE_NAME}")
    return state


def read_start(output_dir: str | Path) -> dict | None:
    """
    Returns `start.json` of a run, `None` where it went on from nothing: `task`, `model`, whether that `is_repo`, `revision`
    (the commit) and `asked` (the revision that was asked for).

    Raises:
        CheckpointError: when it cannot be read.
    """
    path = Path(output_dir) / START_NAME
    if not path.exists():
        return None
    start = read_json(path)
    check_fields(path, start, {"task": int, "model": str, "revision": str | None, "asked": str | None})
    if type(start.get("is_repo")) is not bool or start["task"] < 0:
        raise CheckpointError(f"{path} cannot be read: it is not what a run writes")
    return start


def finished_tasks(output_dir: str | Path) -> list[dict]:
    """
    Returns the states of a run's task folders, from the first one, or the one that it went on from, to the last.

    Raises:
        CheckpointError: when one of them is damaged, or lacks what a run goes on from.
    """
    start, states = read_start(output_dir), []
    first = start["task"] if start else 0
    while task_folder(output_dir, first + len(states)).exists():
        folder = task_folder(output_dir, first + len(states))
        state = read_task_state(folder)
        check_fields(
            folder / CONSOLIDATION / STATE_NAME, state, {key: OTHER_STATE_TYPES[key] for key in OWN_STATE_KEYS}
        )
        states.append(state)
    return states


def tasks_of_run(folder: str | Path) -> list[Path]:
    """Returns the task folders that lie in a folder: none but in that of a run."""
    return sorted(path for path in Path(folder).glob("task-*") if path.is_dir())
