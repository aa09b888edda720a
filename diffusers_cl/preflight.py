"""Every image that a run will read is read once before it trains: what cannot be used is listed, what is changed counted."""

import hashlib
import json
import os
import warnings
from collections import Counter
from pathlib import Path

import numpy as np
import PIL.Image
from huggingface_hub import constants
from tqdm.auto import tqdm

from . import __version__
from .data import ImageSplit
from .errors import CheckpointError, DataError
from .files import read_json, replacing
from .images import UnreadableImageError, conversions, image_bytes, open_image, reading, to_uint8_array
from .labels import image_paths


# Bad images that the message names; it has three lines.
NUM_NAMED = 2


def _check(entry: dict | None, split: ImageSplit) -> tuple[str, list[str], str | None]:
    """The sha256 of an encoded image, what is changed of it, and why it cannot be used."""
    digest = ""
    try:
        with reading():
            content = image_bytes(entry)
            digest = hashlib.sha256(content).hexdigest()
            with open_image(content) as image:
                found, kind = conversions(image, split.channels), image.format
                to_uint8_array(image, split.channels, split.resolution, split.resize_mode)
            if kind == "PNG":
                # It has checksums, which Pillow leaves aside when it decodes.
                open_image(content).verify()
    except UnreadableImageError as error:
        return digest, [], str(error)
    return digest, found, None


def _results(split: ImageSplit, positions: np.ndarray, progress: tqdm):
    """Yields position, entry and [`_check`] of every row, in order."""
    for rows, entries, results in split.in_threads(lambda entry: _check(entry, split), positions):
        yield from zip(rows, entries, results, strict=True)
        progress.update(len(rows))


def _identity(path: str | None) -> list:
    """What changes when a file's content does: a new content has a new ctime, which no program can set."""
    try:
        status = os.stat(path)
    except (OSError, TypeError, ValueError):
        return [path]
    return [path, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _key(parts: list[tuple[ImageSplit, np.ndarray]]) -> str | None:
    """Identifies all that a scan depends on; `None` where a dataset lies in memory."""
    found = [__version__, PIL.__version__]
    for split, positions in parts:
        files = [cache_file["filename"] for cache_file in split.dataset.cache_files]
        if not files:
            return None
        paths = image_paths(split.dataset.select(positions), split.image_column)
        found += [split.dataset._fingerprint, [_identity(path) for path in files + paths], positions.tolist()]
        found += [split.name, split.names, split.labels[positions].tolist()]
        found += [split.resolution, split.resize_mode, split.channels]
    return hashlib.sha256(json.dumps(found).encode()).hexdigest()


def _read(path: Path) -> dict | None:
    """What a former scan found, if that is there and whole."""
    try:
        found = read_json(path)
    except CheckpointError:
        return None
    return found if found.keys() == {"fingerprint", "images", "converted"} else None


def scan(
    splits: list[ImageSplit], class_names: list[str], cache_dir: str | Path | None = None, quiet: bool = False
) -> dict:
    """
    Reads every image of these classes, as training will, and finds those that cannot be used. What was found is kept in
    `cache_dir` for the next time, until a file, the rows or what is made of an image change.

    Args:
        splits (`list[ImageSplit]`): all that the run reads.
        class_names (`list[str]`): those that a split does not have are left out.
        cache_dir (`Path`, *optional*): by default the Hugging Face cache.
        quiet (`bool`): show no progress bar.

    Returns:
        `dict`: `fingerprint`, the sha256 of the splits' names, and of the class name and encoded image of every row in
            order, wherever the files lie; `images`, their number; `converted`, how many were changed by what is changed:
            `16-bit`, `1-bit`, `palette`, `CMYK`, `transparent` (the transparency is dropped), `colour to grey`,
            `first frame` (of several).

    Raises:
        DataError: for images that cannot be used: their number and the first ones, and a file that lists all.
        StorageError: when the disk refuses.
    """
    wanted = set(class_names)
    parts = [(split, split.rows_of([name for name in split.names if name in wanted])) for split in splits]
    folder = Path(cache_dir or constants.HF_HOME) / "diffusers_cl"
    key = _key(parts)
    cached = folder / f"scan-{key}.json"
    if key is not None and (found := _read(cached)) is not None:
        return found

    fingerprint, converted, bad = hashlib.sha256(), Counter(), []
    num_images = sum(len(positions) for _, positions in parts)
    # An image between one and two times PIL.Image.MAX_IMAGE_PIXELS is a warning only.
    with warnings.catch_warnings(), tqdm(total=num_images, desc="Checking images", disable=quiet) as progress:
        warnings.simplefilter("error", PIL.Image.DecompressionBombWarning)
        for split, positions in parts:
            fingerprint.update(json.dumps([split.name, len(positions)]).encode())
            for position, entry, (digest, changed, reason) in _results(split, positions, progress):
                fingerprint.update(json.dumps([split.names[split.labels[position]], digest]).encode())
                converted.update(changed)
                if reason is not None:
                    bad.append(f"{split.describe(position, entry)}: {reason}")
    if bad:
        listed = ""
        if len(bad) > NUM_NAMED:
            file = folder / f"bad-images-{fingerprint.hexdigest()[:16]}.txt"
            with replacing(file) as own:
                own.write_text("\n".join(bad) + "\n", encoding="utf-8", errors="backslashreplace")
            listed = f"; all of them are listed in {file}"
        message = f"{len(bad)} of {num_images} images cannot be used{listed}"
        raise DataError("\n".join([message, *bad[:NUM_NAMED]]))
    found = {
        "fingerprint": fingerprint.hexdigest(),
        "images": num_images,
        "converted": dict(sorted(converted.items())),
    }
    if key is not None:
        with replacing(cached) as own:
            own.write_text(json.dumps(found))
    return found
