"""What is replayed in a task: images generated before it, in a file that a run can go on from, or real ones kept."""

import copy
from collections.abc import Callable
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DynamoBackend
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from .config import TrainingConfig
from .errors import CheckpointError
from .files import publish_folder, remove_folder, verify_folder
from .folders import CONSOLIDATION, MEMORY_NAME, task_folder
from .memory import place_for
from .randomness import permutation
from .shards import tensors_digest
from .tasks import TaskImages


IMAGES_NAME = "images.safetensors"


def load_replay_images(folder: Path, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """
    Returns the images (uint8) and class ids of a replay folder: on the device if they fit there, else in the machine's memory,
    else memory-mapped ([`place_for`]).
    """
    tensors = load_file(folder / IMAGES_NAME)
    images, class_labels = tensors["images"], tensors["class_labels"]
    if (place := place_for(images.nbytes, device)) is not None:
        return images.to(place, copy=True), class_labels.to(place)
    return images, class_labels


def replay_images_for_task(
    output_dir: Path,
    task: int,
    classes_of_tasks: list[list[int]],
    images_per_class: int,
    refresh: str,
    sample: Callable[[list[int], list[tuple]], torch.Tensor],
    accelerator: Accelerator,
    warn: Callable[[str], None],
    teacher: str,
    none_kept: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """
    Returns the replayed images and class ids for a task, and how many images were generated for it now.

    Args:
        output_dir (`Path`): the run's; images are kept in `replay/task-<task>`, and the task before's are deleted once
            these are published.
        task (`int`): the task that is about to be trained, from 1.
        classes_of_tasks (`list[list[int]]`): class ids by task.
        images_per_class (`int`).
        refresh (`str`): `latest` generates every earlier class anew; `once` only those of the task before, and keeps
            the others as they were (generation over T tasks costs O(T) instead of O(T^2)).
        sample: maps class ids and noise keys to uint8 images, on every process; uses the newest teacher.
        accelerator (`accelerate.Accelerator`), warn: of the run; images go to the accelerator's device if they fit.
        teacher (`str`): digest of its weights: what another has drawn is not used.
        none_kept (`bool`): the run goes on from a model and has generated nothing yet.
    """
    folder = output_dir / "replay" / f"task-{task:02d}"
    previous = output_dir / "replay" / f"task-{task - 1:02d}"
    generated = 0
    if folder.exists():
        try:
            verify_folder(folder)
            with safe_open(folder / IMAGES_NAME, framework="pt") as file:
                drawn_by = (file.metadata() or {}).get("teacher")
            if drawn_by != teacher:
                raise CheckpointError(f"{folder} was drawn by another model than that of the task before")
            if accelerator.is_main_process:
                remove_folder(previous)
            return *load_replay_images(folder, accelerator.device), 0
        except CheckpointError as error:
            warn(f"Generating replay again: {error}")
    keep = refresh == "once" and task > 1 and not none_kept
    if keep and not previous.exists():
        warn(f"Generating all earlier classes: {previous} is gone, as after resume_from_checkpoint")
        keep = False
    new_classes = classes_of_tasks[task - 1] if keep else [c for classes in classes_of_tasks[:task] for c in classes]
    labels = [c for c in new_classes for _ in range(images_per_class)]
    keys = [("replay", task, c, index) for c in new_classes for index in range(images_per_class)]
    images, class_labels = sample(labels, keys), torch.tensor(labels, dtype=torch.long)
    generated = len(labels)
    if keep:
        verify_folder(previous)
        kept = load_file(previous / IMAGES_NAME)
        # But for classes that were learned once more.
        rows = torch.isin(kept["class_labels"], class_labels, invert=True)
        images = torch.cat([kept["images"][rows], images])
        class_labels = torch.cat([kept["class_labels"][rows], class_labels])
    if accelerator.is_main_process:
        tensors = {"images": images, "class_labels": class_labels}
        num_bytes = sum(tensor.nbytes for tensor in tensors.values())
        metadata = {"teacher": teacher}
        publish_folder(
            folder, lambda partial: save_file(tensors, partial / IMAGES_NAME, metadata), num_bytes=num_bytes
        )
    accelerator.wait_for_everyone()
    loaded = load_replay_images(folder, accelerator.device)
    if accelerator.is_main_process:
        remove_folder(previous)
    return *loaded, generated


def update_replay(
    replay,
    output_dir: Path,
    task: int,
    tasks: list[list[str]],
    class_ids: dict[str, int],
    unet: torch.nn.Module,
    sample: Callable[[torch.nn.Module], Callable],
    config: TrainingConfig,
    accelerator: Accelerator,
    warn: Callable[[str], None],
    none_kept: bool,
) -> tuple[dict[str, torch.Tensor] | None, int]:
    """
    Fills the replay of a run for a task: the model of the task before is the teacher, and draws what is generated.

    Args:
        replay ([`GenerativeReplay`] or one of its kind).
        output_dir (`Path`), config ([`TrainingConfig`]), accelerator, warn: of the run.
        task (`int`): that is about to be trained, from 1.
        tasks (`list[list[str]]`), class_ids (`dict[str, int]`): of the stream.
        unet (`UNet2DModel`): as the task before has left it.
        sample: makes a function of class ids and noise keys from a network.
        none_kept (`bool`): the run goes on from a model and has generated nothing yet.

    Returns:
        the memory of real images, where one is kept, and how many images were generated.
    """
    # Real images need no teacher.
    teacher = None if replay.source == "memory" else copy.deepcopy(unet).eval().requires_grad_(False)
    # A class that was learned twice is replayed once, as it was learned last.
    last = {name: learned for learned in range(task) for name in tasks[learned]}
    earlier = [[class_ids[name] for name in tasks[t] if last[name] == t] for t in range(task)]
    memory, generated = None, 0
    if replay.source == "generated":
        images, class_labels, generated = replay_images_for_task(
            output_dir,
            task,
            earlier,
            config.replay_images_per_class,
            config.replay_refresh,
            sample(teacher),
            accelerator,
            warn,
            tensors_digest(teacher.state_dict()),
            none_kept,
        )
    elif replay.source == "memory":
        memory = load_file(task_folder(output_dir, task - 1) / CONSOLIDATION / MEMORY_NAME)
        images, class_labels = memory["images"].to(accelerator.device), memory["class_labels"].to(accelerator.device)
    else:
        images, class_labels = None, torch.tensor([class_id for ids in earlier for class_id in ids])
    dynamo = accelerator.state.dynamo_plugin
    if teacher is not None and dynamo.backend != DynamoBackend.NO:
        # As `prepare` does with the student.
        teacher.compile(**dynamo.to_kwargs())
    replay.update(images, class_labels, teacher)
    return memory, generated


def extend_memory(
    memory: dict[str, torch.Tensor] | None,
    images: TaskImages,
    images_per_class: int,
    memory_bytes: int | None,
    seed: int,
) -> dict[str, torch.Tensor]:
    """
    Returns the real images that are kept after a task: `images` (uint8) and `class_labels`, equally many of every class.

    Args:
        memory (`dict` or `None`): what was kept until now; of every class a first part stays.
        images ([`TaskImages`]): of the finished task, without flips. Which ones are kept is a function of the seed.
        images_per_class (`int`): fewer where a class has fewer.
        memory_bytes (`int` or `None`): in place of that, for the images of all classes together; enough for one a class.
    """
    kept: dict[int, torch.Tensor] = {}
    if memory is not None:
        kept = {c: memory["images"][memory["class_labels"] == c] for c in memory["class_labels"].unique().tolist()}
    new_classes = images.class_ids.unique().tolist()
    if memory_bytes is not None:
        image_bytes = images.split.channels * images.split.resolution**2
        images_per_class = memory_bytes // ((len(kept) + len(new_classes)) * image_bytes)
    for class_id in new_classes:
        rows = (images.class_ids == class_id).nonzero().flatten()
        chosen = rows[permutation(len(rows), seed, "memory", class_id)[:images_per_class]]
        kept[class_id] = images.split.decode(chosen.tolist()).cpu()
    # Equally many rows a class, so that uniform draws are balanced.
    images_per_class = min(images_per_class, *map(len, kept.values()))
    return {
        "images": torch.cat([kept[c][:images_per_class] for c in sorted(kept)]),
        "class_labels": torch.tensor([c for c in sorted(kept) for _ in range(images_per_class)]),
    }
