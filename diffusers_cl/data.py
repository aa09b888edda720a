"""From a Hugging Face dataset to splits of undecoded images with a label each."""

import math
import os
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import datasets
import numpy as np
import torch

from .config import TrainingConfig
from .errors import DataError, first_line
from .images import UnreadableImageError, image_bytes, open_image, reading, to_uint8_array
from .labels import check_class_lists, check_folders, row_labels
from .memory import place_for
from .processes import num_cores
from .randomness import derive_seed, permutation


# The share of every class that is held out where a dataset has no split to evaluate on.
HOLDOUT = 0.2
# Images that a thread takes at once.
CHUNK = 16
MAX_THREADS = 8


@dataclass
class ImageSplit:
    """
    One split of a dataset: undecoded images, and a label for every row.

    Attributes:
        dataset (`datasets.Dataset`): its image column holds bytes or a path.
        image_column (`str`).
        name (`str`): for messages.
        labels (`np.ndarray` of `int`): of every row, an index into `names`.
        names (`list[str]`): the dataset's classes in label order.
        resolution (`int`), resize_mode (`str`), channels (`int`): what [`decode`] makes of an image.
        rows (`np.ndarray`): the row numbers in the dataset on disk, for messages.
        images (`torch.Tensor`, *optional*): all of them as [`decode`] returns them, where [`load`] has kept them.
    """

    dataset: datasets.Dataset
    image_column: str
    name: str
    labels: np.ndarray
    names: list[str]
    resolution: int
    resize_mode: str
    channels: int
    rows: np.ndarray = field(repr=False)
    images: torch.Tensor | None = field(default=None, repr=False)

    def rows_of(self, names: list[str]) -> np.ndarray:
        """Returns the positions of the rows of these classes, by the label column alone: no image is decoded."""
        return np.flatnonzero(np.isin(self.labels, [self.names.index(name) for name in names]))

    def select(self, positions: np.ndarray) -> "ImageSplit":
        """Returns the split with these rows only."""
        return replace(
            self,
            dataset=self.dataset.select(positions),
            labels=self.labels[positions],
            rows=self.rows[positions],
            images=None if self.images is None else self.images[positions],
        )

    def load(self, device: torch.device | str) -> "ImageSplit":
        """
        Returns the split with all images decoded once: on the device if they fit there, else in the machine's memory
        ([`place_for`]). What fits in neither stays as it is, and is decoded batch by batch.
        """
        shape = (len(self.labels), self.channels, self.resolution, self.resolution)
        place = place_for(math.prod(shape), device)
        if self.images is not None or place is None:
            return self
        images = torch.empty(shape, dtype=torch.uint8, device=place)
        for positions, entries, found in self.in_threads(self._pixels, np.arange(len(self.labels))):
            rows = zip(positions, entries, found, strict=True)
            images[positions[0] : positions[-1] + 1] = torch.stack([self._checked(*row) for row in rows]).to(place)
        return replace(self, images=images)

    def in_threads(self, function: Callable[[dict | None], object], positions: np.ndarray) -> Iterator[tuple]:
        """
        Yields positions, entries of the image column and what the function makes of each, a few rows at a time, in order;
        of what is not asked for yet little is in memory.
        """
        num_threads = min(MAX_THREADS, num_cores())
        with ThreadPoolExecutor(num_threads) as pool:
            waiting = deque()
            chunks = np.split(positions, range(CHUNK, len(positions), CHUNK))
            for number in range(len(chunks) + num_threads):
                if number < len(chunks):
                    entries = self.dataset[chunks[number].tolist()][self.image_column]
                    results = pool.submit(lambda entries: [function(entry) for entry in entries], entries)
                    waiting.append((chunks[number].tolist(), entries, results))
                if waiting and number >= num_threads:
                    rows, entries, results = waiting.popleft()
                    yield rows, entries, results.result()

    def is_greyscale(self) -> bool:
        """Returns whether the first image that can be read has a single channel."""
        for entry in self.dataset[self.image_column]:
            try:
                with reading(), open_image(image_bytes(entry)) as image:
                    return image.mode in ("1", "L", "LA") or image.mode.startswith("I")
            except UnreadableImageError:
                # The scan of all images names it.
                continue
        raise DataError(f"no image of split {self.name!r} can be read")

    def decode(self, positions) -> torch.Tensor:
        """
        Returns images as uint8 of shape `(len(positions), channels, resolution, resolution)`, on the device where [`load`]
        has put them.

        Raises:
            DataError: naming the row of an image that cannot be read.
        """
        if self.images is not None:
            return self.images[torch.as_tensor(positions)]
        positions = [int(position) for position in positions]
        entries = self.dataset[positions][self.image_column]
        pairs = zip(positions, entries, strict=True)
        return torch.stack([self._checked(position, entry, self._pixels(entry)) for position, entry in pairs])

    def _pixels(self, entry: dict | None) -> torch.Tensor | UnreadableImageError:
        """One image, of shape `(channels, resolution, resolution)`, or why it cannot be read."""
        try:
            with reading(), open_image(image_bytes(entry)) as image:
                array = to_uint8_array(image, self.channels, self.resolution, self.resize_mode)
        except UnreadableImageError as error:
            return error
        return torch.from_numpy(array.transpose(2, 0, 1).copy())

    def _checked(self, position: int, entry: dict | None, pixels: torch.Tensor | UnreadableImageError) -> torch.Tensor:
        """The pixels of an image, where there are any; otherwise a `DataError` that names its row."""
        if isinstance(pixels, UnreadableImageError):
            raise DataError(f"{self.describe(position, entry)} cannot be read: {pixels}") from pixels
        return pixels

    def describe(self, position: int, entry: dict | None) -> str:
        """Returns row, split and file of an image, for messages."""
        where = f" ({entry['path']!r})" if entry is not None and entry["path"] else ""
        return f"the image in row {self.rows[position]} of split {self.name!r}{where}"


def load_digits_dataset() -> datasets.DatasetDict:
    """Returns scikit-learn's 1,797 handwritten digits (8x8 greyscale, ships with the package) as a dataset."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    # Grey levels 0 to 16.
    pixels = (digits.images * (255 / 16)).round().astype(np.uint8)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(name) for name in digits.target_names])}
    )
    # PGM: the bytes of a PNG depend on the version of zlib, and with them the fingerprint of the data.
    images = [{"bytes": b"P5 8 8 255\n" + image.tobytes(), "path": None} for image in pixels]
    columns = {"image": images, "label": digits.target.tolist()}
    return datasets.DatasetDict({"train": datasets.Dataset.from_dict(columns, features=features)})


def _find_column(features: datasets.Features, asked: str | None, key: str, preferred: list[str], kind: type) -> str:
    if asked is not None:
        if asked not in features:
            raise DataError(f"{key}: the dataset has no column {asked!r}; its columns are {', '.join(features)}")
        return asked
    for name in preferred:
        if name in features:
            return name
    found = [name for name, feature in features.items() if isinstance(feature, kind)]
    if len(found) == 1:
        return found[0]
    raise DataError(f"{key}: cannot tell which of the columns {', '.join(features)} it is; name it")


def _holdout(labels: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Positions kept for training and held out: a fifth of every class, by a number drawn for every row."""
    draws = np.array([derive_seed(seed, "split", index) for index in range(len(labels))])
    held = np.zeros(len(labels), dtype=bool)
    for label in np.unique(labels):
        rows = np.flatnonzero(labels == label)
        held[rows[np.argsort(draws[rows])[: round(HOLDOUT * len(rows))]]] = True
    return np.flatnonzero(~held), np.flatnonzero(held)


def _load(config: TrainingConfig) -> tuple[datasets.DatasetDict, list[str], str]:
    """The dataset, the files of it that lie in a folder of the user's, and the name of their kind."""
    if config.dataset_name == "digits":
        return load_digits_dataset(), [], "digits"
    if config.dataset_name is None and not Path(config.train_data_dir).is_dir():
        raise DataError(f"train_data_dir: there is no folder {config.train_data_dir}")
    source = config.dataset_name or config.train_data_dir
    folder = Path(source).resolve() if Path(source).is_dir() else None
    try:
        if config.dataset_name is not None:
            builder = datasets.load_dataset_builder(source, config.dataset_config_name, cache_dir=config.cache_dir)
        else:
            builder = datasets.load_dataset_builder(
                "imagefolder", data_dir=source, drop_labels=False, cache_dir=config.cache_dir
            )
        files = [file for files in (builder.config.data_files or {}).values() for file in files]
        if folder is not None:
            files = [os.path.abspath(file) for file in files]
        # The README of a dataset may name any file of this machine.
        inside = "hf://" if folder is None else f"{folder}{os.sep}"
        outside = [file for file in files if not file.startswith(inside)]
        if outside:
            raise ValueError(f"it names the file {outside[0]}, which is not inside")
        builder.download_and_prepare()
        return builder.as_dataset(), [] if folder is None else files, builder.name
    # Whatever else `datasets` and the libraries below it raise at files that they cannot read.
    except Exception as error:
        is_general = isinstance(error, datasets.exceptions.DatasetGenerationError)
        reason = first_line(error.__cause__ if is_general and error.__cause__ else error)
        raise DataError(f"cannot load the dataset {source!r}: {reason}") from error


def load_splits(config: TrainingConfig, channels: int | None = None) -> tuple[ImageSplit, ImageSplit]:
    """
    Returns the training split and the split to evaluate on.

    Args:
        config ([`TrainingConfig`]).
        channels (`int`, *optional*): 1 or 3, of the images that the model sees; by default as the first one has it.

    Raises:
        DataError: dataset, split or column missing, with what there is; rows without a valid label; images that would be
            left out or get the label of another class.
    """
    loaded, files, kind = _load(config)
    for key in ("train_split", "eval_split"):
        if getattr(config, key) is not None and getattr(config, key) not in loaded:
            raise DataError(f"{key}: the dataset has no split {getattr(config, key)!r}; it has {', '.join(loaded)}")
    eval_split = config.eval_split or next((name for name in ("test", "validation") if name in loaded), None)
    if eval_split == config.train_split:
        raise DataError(f"eval_split: {eval_split!r} is the training split")

    features = loaded[config.train_split].features
    image_column = _find_column(features, config.image_column, "image_column", ["image", "img"], datasets.Image)
    label_column = _find_column(
        features, config.label_column, "label_column", ["label", "fine_label"], datasets.ClassLabel
    )
    if kind == "imagefolder" and files and isinstance(features[label_column], datasets.ClassLabel):
        check_folders(Path(config.train_data_dir or config.dataset_name).resolve(), loaded, image_column)
    train = _split(loaded[config.train_split], config.train_split, image_column, label_column, config)
    check_class_lists(files, label_column, train.names)
    train.channels = channels or (1 if train.is_greyscale() else 3)
    if eval_split is not None:
        test = _split(loaded[eval_split], eval_split, image_column, label_column, config, train)
    else:
        # The digits' split is part of the dataset, not of the run.
        kept, held = _holdout(train.labels, 0 if config.dataset_name == "digits" else config.seed)
        train, test = train.select(kept), train.select(held)
    if config.max_train_samples is not None:
        order = permutation(len(train.labels), config.seed, "max_train_samples").numpy()
        train = train.select(np.sort(order[: config.max_train_samples]))
    return train, test


def _split(dataset, name: str, image_column: str, label_column: str, config: TrainingConfig, train=None) -> ImageSplit:
    """A split; its class names and channels are the training split's, if that is given."""
    if not isinstance(dataset.features.get(image_column), datasets.Image):
        raise DataError(f"image_column: {image_column!r} of split {name!r} holds no images")
    if len(dataset) == 0:
        raise DataError(f"split {name!r} is empty")
    labels, names = row_labels(dataset, label_column, name, train.names if train else [])
    # Other columns would be decoded with every row.
    dataset = dataset.select_columns([image_column]).cast_column(image_column, datasets.Image(decode=False))
    split = ImageSplit(
        dataset, image_column, name, labels, names, config.resolution, config.resize_mode, 3, np.arange(len(dataset))
    )
    if train is not None:
        split.channels = train.channels
    return split


def cap_per_class(split: ImageSplit, class_names: list[str], limit: int | None) -> ImageSplit:
    """Returns the rows of these classes in the classes' order, at most `limit` of each."""
    rows = [split.rows_of([name])[:limit] for name in class_names]
    return split.select(np.concatenate(rows))
