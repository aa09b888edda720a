"""Damaged data folders: each is refused before training, or loads with every image in the class it was written to."""

import shutil
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
from damaged_data import CASES, LEVELS, SIZE, Case

from diffusers_cl.config import TrainingConfig
from diffusers_cl.data import load_splits
from diffusers_cl.errors import DataError
from diffusers_cl.preflight import scan
from diffusers_cl.tasks import TaskImages, resolve_tasks


def outcome(case: Case) -> tuple[str, Counter, int]:
    """
    Loads a folder as a run does, up to its first step.

    Returns:
        (`str`, `Counter`, `int`): the message of what was refused or an empty one, what was converted, and how many images
            have the id of another class than the one they show.
    """
    key = "dataset_name" if list(case.folder.glob("*.parquet")) else "train_data_dir"
    tasks = [["cat"], ["ant", "bee"]]
    settings = {"resolution": SIZE, "tasks": tasks, "cache_dir": str(case.folder.parent / "cache"), **case.settings}
    config = TrainingConfig(**{key: str(case.folder)}, **settings)
    try:
        splits = load_splits(config)
        names = [name for task in resolve_tasks(config, *splits) for name in task]
        found = scan(list(splits), names, config.cache_dir, quiet=True)
    except DataError as error:
        return str(error), Counter(), 0
    class_ids, moved = {name: number for number, name in enumerate(names)}, 0
    for split in splits:
        rows = TaskImages(split.select(split.rows_of(names)), class_ids)
        images, ids = rows.__getitems__([(0, index) for index in range(len(rows))])
        shown = [min(LEVELS, key=lambda name: abs(LEVELS[name] - level)) for level in images.float().mean((1, 2, 3))]
        moved += sum(names[number] != name for number, name in zip(ids.tolist(), shown, strict=True))
    return "", Counter(found["converted"]), moved


def damaged_data_folders(folder: Path, count: int = 50, seed: int = 0) -> dict:
    """
    Loads `count` folders, of every kind in `CASES` in turn, with what is drawn for each by `seed`.

    Args:
        folder (`Path`): for the folders, one at a time.

    Returns:
        `dict`: `tried`; `refused` (exit code 3, with the image or row named); `converted`; `loaded` as they are;
            `label_moves`, the images that came with another class's id; `problems`, a sentence each.
    """
    datasets.disable_progress_bars()
    counts, problems = Counter(tried=count, refused=0, converted=0, loaded=0, label_moves=0), []
    for number in range(count):
        kind = list(CASES)[number % len(CASES)]
        case = Case(folder / f"{number:03d}" / "data", np.random.default_rng([seed, number]))
        CASES[kind](case)
        try:
            message, changed, moved = outcome(case)
        except Exception as error:
            problems.append(f"{number} ({kind}): {type(error).__name__}: {error}")
            continue
        finally:
            shutil.rmtree(folder / f"{number:03d}")
        happened = "refused" if message else "converted" if changed else "loaded"
        counts[happened] += 1
        counts["label_moves"] += moved
        if case.expected == "refused":
            missing = [word for word in case.words if word not in message]
            as_expected = happened == "refused" and not missing and len(message.splitlines()) <= 3
        elif case.expected == "loads":
            as_expected = happened == "loaded"
        else:
            as_expected = changed[case.expected] == 1
        if moved or not as_expected:
            problems.append(f"{number} ({kind}): {happened}, {moved} moved, {dict(changed)}, {message!r}")
    return {**counts, "problems": problems}
