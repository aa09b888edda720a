"""Storage under attack: mutated files and a full disk (kills: torture_kills.py). Each function returns counts."""

import contextlib
import json
import os
import random
import re
import resource
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import save_file

from diffusers_cl.checkpoint import list_checkpoints, load_checkpoint, newest_checkpoint, read_state, save_checkpoint
from diffusers_cl.errors import CheckpointError, StorageError
from diffusers_cl.files import MANIFEST_NAME, publish_folder
from diffusers_cl.folders import CONSOLIDATION, read_task_state, task_folder


# What train_continual.py saves beside the tensors, in short.
STATE = {"task": 0, "lr_scheduler": {"last_epoch": 1}, "scaler": None}
STEPS = (1, 2, 3)


def make_model(seed: int = 0, width: int = 3) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.Linear(width, 1))


def train_step(model, optimizer, ema_model, step: int) -> None:
    model(torch.tensor([[1.0, step]])).square().sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    ema_model.step(model.parameters())


def trained(seed: int = 0, steps: int = 2, width: int = 3) -> tuple:
    """Returns a model, its optimizer and its EMA after a few steps."""
    model = make_model(seed, width)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ema_model = EMAModel(model.parameters(), decay=0.5)
    for step in range(steps):
        train_step(model, optimizer, ema_model, step)
    return model, optimizer, ema_model


def tensors_of(model, optimizer, ema_model) -> dict[str, torch.Tensor]:
    """Returns a copy of all that a checkpoint puts back."""
    tensors = {**model.state_dict(), **{f"ema.{i}": tensor for i, tensor in enumerate(ema_model.shadow_params)}}
    for name, parameter in model.named_parameters():
        tensors |= {f"{name}.{quantity}": value for quantity, value in optimizer.state[parameter].items()}
    tensors["ema_step"] = torch.tensor(ema_model.optimization_step)
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(one[name].equal(other[name]) for name in one)


@contextlib.contextmanager
def full_disk(size: int) -> Iterator[None]:
    """Lets no file grow over `size` bytes: writing fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def write_task(output_dir: Path, task: int) -> Path:
    """Publishes a folder like that of a finished task."""

    def write(folder: Path) -> None:
        (folder / "unet").mkdir()
        (folder / CONSOLIDATION).mkdir()
        save_file({"weight": torch.full((8,), float(task))}, folder / "unet" / "weights.safetensors")
        (folder / "README.md").write_text(f"# Task {task}\n")
        names = [f"class {number}" for number in range(task + 1)]
        state = {"schema": 1, "task": task, "tasks": [[name] for name in names], "global_step": 5 * (task + 1)}
        state |= {"class_ids": {name: class_id for class_id, name in enumerate(names)}, "seen_classes": names}
        state |= {"rows": [{}] * (task + 1), "fisher": [None] * (task + 1)}
        (folder / CONSOLIDATION / "state.json").write_text(json.dumps(state, indent=1) + "\n")

    path = task_folder(output_dir, task)
    publish_folder(path, write, CONSOLIDATION)
    return path


def write_series(output_dir: Path) -> dict[int, dict[str, torch.Tensor]]:
    """Publishes three checkpoints and two task folders; returns what the checkpoints hold, by step."""
    live, contents = trained(steps=0), {}
    for step in STEPS:
        train_step(*live, step)
        save_checkpoint(output_dir, step, *live[:2], STATE, live[2])
        contents[step] = tensors_of(*live)
    for task in (0, 1):
        write_task(output_dir, task)
    return contents


def _manifest(folder: Path) -> Path:
    return next(folder.rglob(MANIFEST_NAME))


def _pick(rng: random.Random, folder: Path) -> Path:
    return rng.choice(sorted(path for path in folder.rglob("*") if path.is_file()))


def _edit(folder: Path, edit: Callable[[str], str]) -> None:
    _manifest(folder).write_text(edit(_manifest(folder).read_text()))


# Each takes a random generator, a published folder and another of its kind, and returns the folders that it has damaged.
def truncate(rng, folder, other):
    file = _pick(rng, folder)
    # Without its last line break a JSON file says the same.
    os.truncate(file, rng.randrange(file.stat().st_size - 1))


def flip_bit(rng, folder, other):
    file = _pick(rng, folder)
    content = bytearray(file.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    file.write_bytes(content)


def empty(rng, folder, other):
    _pick(rng, folder).write_bytes(b"")


def delete(rng, folder, other):
    _pick(rng, folder).unlink()


def swap_files(rng, folder, other):
    file = _pick(rng, folder)
    twin = other / file.relative_to(folder)
    content, twins = file.read_bytes(), twin.read_bytes()
    file.write_bytes(twins)
    twin.write_bytes(content)
    return [folder, other]


def swap_folders(rng, folder, other):
    folder.rename(folder.with_name("aside"))
    other.rename(folder)
    folder.with_name("aside").rename(other)
    return [folder, other]


def rename_folder(rng, folder, other):
    renamed = folder.with_name(f"{folder.name[:-1]}{rng.randrange(4, 10)}")
    folder.rename(renamed)
    return [renamed]


def rename_file(rng, folder, other):
    file = _pick(rng, folder)
    file.rename(file.with_name(f"{file.name}.old"))


def repeat_entry(rng, folder, other):
    line = rng.choice(
        [line for line in _manifest(folder).read_text().splitlines() if "sha256" not in line and ":" in line]
    )
    _edit(folder, lambda text: text.replace(line, f"{line.rstrip(',')},\n{line}"))


def name_outside(rng, folder, other):
    name = rng.choice(["../x", "/etc/passwd", "a/../../x", "", ".", "..\\x", "a//b", "x\u0000", "n" * 300])
    _edit(folder, lambda text: json.dumps({"sha256": {**json.loads(text)["sha256"], name: "0" * 64}}))


def no_json(rng, folder, other):
    text = rng.choice(
        ["[" * 100_000, '{"sha256":' * 50_000, '{"sha256": ' + "9" * 5000 + "}", "[]", '{"sha256": [1]}']
    )
    _edit(folder, lambda _: text)


def link_outside(rng, folder, other):
    file = _pick(rng, folder)
    file.rename(outside := folder.parent / "outside")
    file.symlink_to(outside)


def pipe(rng, folder, other):
    file = _pick(rng, folder)
    file.unlink()
    os.mkfifo(file)


def folder_for_file(rng, folder, other):
    file = _pick(rng, folder)
    file.unlink()
    file.mkdir()


def add_file(rng, folder, other):
    added = folder / rng.choice(["x.pkl", "weights/ema.bin", ".hidden"])
    added.parent.mkdir(exist_ok=True)
    added.write_bytes(b"x")


MUTATIONS = (
    *(truncate, flip_bit, empty, delete, swap_files, swap_folders, rename_folder, rename_file, repeat_entry),
    *(name_outside, no_json, link_outside, pipe, folder_for_file, add_file),
)


def _refused(read: Callable[[], object]) -> bool:
    try:
        read()
    except CheckpointError:
        return True
    return False


def _find_missed(folder: Path, damaged: list[Path], contents: dict[int, dict[str, torch.Tensor]]) -> list[str]:
    """What is wrong with how a folder is read in which these folders are damaged."""
    live, missed = trained(seed=1, steps=1), []
    before = tensors_of(*live)

    def load(path: Path) -> None:
        load_checkpoint(path, *live)

    for path in sorted(folder.iterdir()):
        if path.name.startswith("task-"):
            if _refused(partial(read_task_state, path)) != (path in damaged):
                missed.append(f"{path.name} read")
        elif path in damaged and not all(_refused(partial(read, path)) for read in (read_state, load)):
            missed.append(f"{path.name} named")
    if not same(before, tensors_of(*live)):
        missed.append("a live tensor changed")
    whole = next(path for path in list_checkpoints(folder) if path not in damaged)
    warnings = []
    found = newest_checkpoint(folder, 0, warnings.append)
    if found is None or found[0] != whole or len(warnings) != list_checkpoints(folder).index(whole):
        missed.append(f"fell back to {found and found[0].name}")
    else:
        load(found[0])
        if not same(contents[found[1]["step"]], tensors_of(*live)):
            missed.append("loaded other tensors")
    return missed


def file_mutations(folder: Path, count: int = 200, seed: int = 0) -> dict:
    """Changes one thing at a time in three checkpoints and two task folders, and reads them all."""
    rng, missed = random.Random(seed), []
    contents = write_series(folder / "whole")
    for number in range(count):
        work, mutate = folder / str(number), MUTATIONS[number % len(MUTATIONS)]
        shutil.copytree(folder / "whole", work)
        checkpoints, tasks = ([p for p in sorted(work.iterdir()) if p.name.startswith(k)] for k in ("check", "task"))
        # Beside a task's files others may lie.
        kind = checkpoints if mutate is add_file or rng.random() < 0.7 else tasks
        target, other = rng.sample(kind, 2)
        if errors := _find_missed(work, mutate(rng, target, other) or [target], contents):
            missed.append(f"{number}: {mutate.__name__} in {target.name}: {', '.join(errors)}")
    return {"tried": count, "detected": count - len(missed), "missed": missed}


def disk_full(folder: Path, count: int = 20, seed: int = 0) -> dict:
    """Saves over a checkpoint on a disk that is full at so many places of the files that are written."""
    rng, missed, live = random.Random(seed), [], trained(width=200)
    # The longest file comes last, so that each is the one that does not fit for some.
    state = {**STATE, "order": list(range(4000))}
    path, expected = save_checkpoint(folder, 1, *live[:2], state, live[2]), tensors_of(*live)
    longest = max(file.stat().st_size for file in path.iterdir())
    for number in range(count):
        train_step(*live, number)
        message = ""
        with full_disk(int((number + rng.random()) / count * longest)):
            try:
                save_checkpoint(folder, 1 + number % 2, *live[:2], state, live[2], total_limit=1)
            except StorageError as error:
                message = str(error)
        read, fits = trained(seed=1, width=200), r"File too large.*; needs [0-9.]+ kB, [0-9.]+ [kMGT]?B free"
        load_checkpoint(path, *read)
        if not (same(expected, tensors_of(*read)) and list(folder.iterdir()) == [path] and re.search(fits, message)):
            missed.append(f"{number}: {message}")
    return {"tried": count, "previous_valid": count - len(missed), "missed": missed}
