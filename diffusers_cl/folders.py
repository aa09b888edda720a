"""Task folders as they are found: their names, and their states."""

import json
from pathlib import Path

from . import __version__
from .errors import CheckpointError
from .files import verify_folder


CONSOLIDATION = "consolidation"
STATE_NAME = "state.json"
MEMORY_NAME = "memory.safetensors"
# In a run's folder: the task that it went on from, which is not its own.
START_NAME = "start.json"
SCHEMA = 1


def task_folder(output_dir: str | Path, task: int) -> Path:
    """Returns the folder of a task, counted from 0."""
    return Path(output_dir) / f"task-{task:02d}"


def read_task_state(folder: str | Path) -> dict:
    """
    Returns `consolidation/state.json` of a task folder, after every one of its files was verified.

    Raises:
        CheckpointError: when the folder is not whole, or was written by a newer version of this package.
    """
    verify_folder(folder, CONSOLIDATION)
    try:
        state = json.loads((Path(folder) / CONSOLIDATION / STATE_NAME).read_text())
        newer = state["schema"] > SCHEMA
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(f"{folder}: {CONSOLIDATION}/{STATE_NAME} cannot be read: {error}") from error
    if newer:
        raise CheckpointError(f"{folder} was written by diffusers-cl {state.get('version')}, this is {__version__}")
    return state


def read_start(output_dir: str | Path) -> dict | None:
    """
    Returns `start.json` of a run, `None` where it went on from nothing: `task`, `model`, whether that `is_repo`, `revision`
    (the commit) and `asked` (the revision that was asked for).

    Raises:
        CheckpointError: when it cannot be read.
    """
    path = Path(output_dir) / START_NAME
    try:
        start = json.loads(path.read_text()) if path.exists() else None
        if start is not None and not (
            isinstance(start["task"], int) and {"model", "is_repo", "revision", "asked"} <= start.keys()
        ):
            raise ValueError("it is not what a run writes")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    return start


def finished_tasks(output_dir: str | Path) -> list[dict]:
    """Returns the states of a run's task folders, from the first one, or the one that it went on from, to the last."""
    start, states = read_start(output_dir), []
    first = start["task"] if start else 0
    while task_folder(output_dir, first + len(states)).exists():
        states.append(read_task_state(task_folder(output_dir, first + len(states))))
    return states


def tasks_of_run(folder: str | Path) -> list[Path]:
    """Returns the task folders that lie in a folder: none but in that of a run."""
    return sorted(path for path in Path(folder).glob("task-*") if path.is_dir())
