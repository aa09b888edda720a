"""Where a run stands: after its last finished task, or within a task at a checkpoint."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from accelerate import Accelerator

from .checkpoint import list_checkpoints, newest_checkpoint, read_state
from .errors import CheckpointError
from .files import remove_folder
from .folders import finished_tasks, tasks_of_run


@dataclass
class ResumePoint:
    """
    Attributes:
        task (`int`): the first task that is not finished.
        global_step (`int`): optimizer steps until its beginning.
        rows, fisher (`list`): of the tasks before it, for metrics.json.
        checkpoint (`tuple[Path, dict]` or `None`): within the task, and its state.
    """

    task: int
    global_step: int
    rows: list[dict]
    fisher: list
    checkpoint: tuple[Path, dict] | None


def find_resume_point(
    output_dir: str | Path, named: str | None, num_phases: int, warn: Callable[[str], None]
) -> ResumePoint:
    """
    Returns where the run in a folder goes on: after its finished tasks, from the newest whole checkpoint of the next one.

    Args:
        output_dir (`Path`).
        named (`str`, *optional*): `resume_from_checkpoint`, in place of the newest.
        num_phases (`int`): of the run; with as many finished tasks no checkpoint is looked for.
        warn: called with what was passed over.

    Raises:
        CheckpointError: when a task folder, or the checkpoint that was named, is damaged or does not belong here.
    """
    states, checkpoint = finished_tasks(output_dir), None
    task = states[-1]["task"] + 1 if states else 0
    if named is not None:
        checkpoint = Path(named), read_state(named)
        if checkpoint[1]["task"] > task:
            raise CheckpointError(f"{named} is of task {checkpoint[1]['task']}, whose teacher is not in {output_dir}")
        task = checkpoint[1]["task"]
        states = [state for state in states if state["task"] < task]
    elif task < num_phases:
        checkpoint = newest_checkpoint(output_dir, task, warn)
    rows, fisher, step = (
        (states[-1]["rows"], states[-1]["fisher"], states[-1]["global_step"]) if states else ([], [], 0)
    )
    return ResumePoint(task, step, rows, fisher, checkpoint)


def check_agreement(resume: ResumePoint, accelerator: Accelerator) -> None:
    """Raises `CheckpointError` unless all processes go on from the same place. Called by all of them."""
    if accelerator.num_processes > 1:
        step = resume.checkpoint[1]["step"] if resume.checkpoint is not None else -1
        places = accelerator.gather(torch.tensor([[resume.task, step]], device=accelerator.device))
        if len(places.unique(dim=0)) > 1:
            raise CheckpointError(
                "the processes see different tasks or checkpoints; output_dir must be a folder that all share"
            )


def go_back(output_dir: str | Path, resume: ResumePoint) -> None:
    """Deletes what was made after the checkpoint that a run goes back to, the latest first: it is of another attempt."""
    later = [path for path in tasks_of_run(output_dir) if int(path.name.removeprefix("task-")) >= resume.task]
    replayed = tasks_of_run(Path(output_dir) / "replay")
    later += [path for path in replayed if int(path.name.removeprefix("task-")) > resume.task]
    for folder in sorted(later, key=lambda path: path.name, reverse=True):
        remove_folder(folder)
    for checkpoint in list_checkpoints(output_dir):
        if int(checkpoint.name.removeprefix("checkpoint-")) > resume.checkpoint[1]["step"]:
            remove_folder(checkpoint)
