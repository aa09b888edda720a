"""Which class a row of a dataset belongs to, and what must not be left to `datasets` to guess about it."""

import os
from itertools import zip_longest
from pathlib import Path

import datasets
import numpy as np
import PIL.Image
import pyarrow
import pyarrow.compute
import pyarrow.parquet

from .errors import DataError
from .images import FORMATS


def row_labels(
    dataset: datasets.Dataset, column: str, split: str, names: list[str] | None = None
) -> tuple[np.ndarray, list[str]]:
    """
    Returns the label of every row, and the names of all classes in label order.

    Args:
        dataset (`datasets.Dataset`).
        column (`str`): a `ClassLabel`, or strings or whole numbers, each of which is a class.
        split (`str`): for messages.
        names (`list[str]`, *optional*): the names, where another split has given them already.

    Raises:
        DataError: for a column of another type, a row without a label, and a label that is no class.
    """
    feature = dataset.features.get(column)
    if feature is None:
        raise DataError(f"split {split!r} has no column {column!r}")
    values = dataset.select_columns([column]).with_format("arrow")[:][column]
    missing = np.flatnonzero(pyarrow.compute.is_null(values, nan_is_null=True))
    first = int(missing[0]) if len(missing) else 0
    found = f"row {first} of split {split!r} has the label {str(values[first])[:40]}"
    if not str(getattr(feature, "dtype", "")).startswith(("int", "uint", "string", "large_string")):
        allowed = "allowed: ClassLabel, integers, strings"
        raise DataError(f"{found}, of label_column {column!r}, which holds {feature}; {allowed}")
    if len(missing):
        raise DataError(f"{found}; every row needs one")
    unique, positions = np.unique(values.to_numpy(), return_inverse=True)
    known = list(feature.names) if isinstance(feature, datasets.ClassLabel) else None
    for number, value in enumerate(unique):
        if value == "" or not isinstance(value, str) and (value < 0 or known is not None and value >= len(known)):
            allowed = "allowed: names, whole numbers from 0" if known is None else f"there are {len(known)} classes"
            row = np.flatnonzero(positions == number)[0]
            raise DataError(f"row {row} of split {split!r} has the label {str(value)!r}; {allowed}")
    # By name, because a split may number the same classes in another way.
    found = [str(value) if known is None else known[value] for value in unique]
    names = names or known or found
    unknown = [name for name in found if name not in names]
    if unknown:
        raise DataError(f"split {split!r} has the class {unknown[0]!r}, which the training split does not have")
    return np.array([names.index(name) for name in found])[positions], names


def image_paths(dataset: datasets.Dataset, column: str) -> list[str | None]:
    """Returns the path of every image, which is only a name where the dataset has the bytes too; none is read."""
    dataset = dataset.select_columns([column]).cast_column(column, datasets.Image(decode=False)).flatten()
    return dataset.select_columns([f"{column}.path"]).with_format("arrow")[:][f"{column}.path"].to_pylist()


def check_folders(folder: Path, loaded: datasets.DatasetDict, column: str) -> None:
    """
    Refuses images that `datasets` would leave out, or count to a class of another name, without a word: it takes words
    like train, test and val in the names of folders and files for splits, and the innermost folder for the class.

    Args:
        folder (`Path`): absolute, without links.
        loaded (`datasets.DatasetDict`): what `datasets` makes of it.
        column (`str`): with the images.

    Raises:
        DataError: naming an image.
    """
    layout = f"allowed in {folder}: CLASS/IMAGE everywhere, or SPLIT/CLASS/IMAGE everywhere"
    read, depths, split_folders = set(), {}, {}
    for split, dataset in loaded.items():
        for path in image_paths(dataset, column):
            parts = Path(path).relative_to(folder).parts
            read.add(path)
            depths.setdefault(len(parts), path)
            split_folders.setdefault(split, set()).add(parts[0])
    if not depths.keys() <= {2, 3} or len(depths) > 1:
        raise DataError(f"there are images at {' and '.join(sorted(depths.values()))}; {layout}")
    for split, folders in split_folders.items():
        if 3 in depths and len(folders) > 1:
            raise DataError(f"split {split!r} would be made of the folders {', '.join(sorted(folders))}; {layout}")
    extensions = [end for end, name in PIL.Image.registered_extensions().items() if name in FORMATS]
    for parent, folders, files in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith((".", "__")))
        for name in folders:
            if os.path.islink(os.path.join(parent, name)):
                raise DataError(
                    f"{os.path.join(parent, name)} is a link to a folder, which `datasets` does not follow"
                )
        for name in sorted(files):
            path = os.path.join(parent, name)
            if not name.startswith(".") and Path(name).suffix.lower() in extensions and path not in read:
                raise DataError(
                    f"{path} would be left out: `datasets` finds splits by words like train, test and val in the names of"
                    f" folders and files (here {', '.join(loaded)}), and does not know every format"
                )


def _schema(file: str) -> pyarrow.Schema:
    if file.endswith(".parquet"):
        return pyarrow.parquet.read_schema(file)
    with pyarrow.memory_map(file) as source:
        try:
            return pyarrow.ipc.open_stream(source).schema
        except pyarrow.ArrowInvalid:
            return pyarrow.ipc.open_file(source).schema


def check_class_lists(files: list[str], column: str, names: list[str]) -> None:
    """
    Refuses files that number the classes in another way than the dataset: `datasets` takes over their numbers as they are.

    Args:
        files (`list[str]`): on this machine; those that are neither Parquet nor Arrow have no class lists.
        column (`str`): with the labels.
        names (`list[str]`): the dataset's classes in label order.

    Raises:
        DataError: naming a file.
    """
    for file in files:
        if file.endswith((".parquet", ".arrow")):
            feature = datasets.Features.from_arrow_schema(_schema(file)).get(column)
            if isinstance(feature, datasets.ClassLabel) and list(feature.names) != names:
                number, (here, there) = next(
                    (n, pair) for n, pair in enumerate(zip_longest(feature.names, names)) if pair[0] != pair[1]
                )
                raise DataError(
                    f"label {number} is {here!r} in {file}, but {there!r} in the dataset, which would mix them up"
                )
