"""Measuring the model after every task: sampled images against the held-out ones, task by task."""

from collections.abc import Callable

import numpy as np
import torch

from . import metrics
from .config import TrainingConfig
from .data import ImageSplit, cap_per_class
from .errors import DataError
from .features import FeatureExtractor, load_classifier, load_extractor, resolve_feature_extractor
from .folders import CONSOLIDATION, read_task_state, tasks_of_run
from .references import References
from .report import HIGHER_IS_BETTER
from .start import Start


# Images a class in a sample grid, and the most classes that it shows.
GRID_COLUMNS = 10
MAX_GRID_ROWS = 100
MAX_NEAREST_ROWS = 20


class Evaluation:
    """
    Measures models on the held-out images of every task. Real features are extracted once, by one process once ever; of tasks whose images are not
    here, their [`References`] take their place, which leaves precision, recall and kernel distance unknown.

    Args:
        test ([`ImageSplit`]): the held-out images.
        tasks (`list[list[str]]`): the classes of every task.
        class_ids (`dict[str, int]`): the model's id of every class.
        extractor ([`FeatureExtractor`]).
        config ([`TrainingConfig`]): `eval_images_per_class`.
        references ([`References`], *optional*): of the first tasks, in a stream that goes on.
        floor (`dict`, *optional*): theirs.
        classifier ([`FeatureExtractor`], *optional*): recognises images in the extractor's place.
    """

    def __init__(
        self,
        test: ImageSplit,
        tasks: list[list[str]],
        class_ids: dict[str, int],
        extractor: FeatureExtractor,
        config: TrainingConfig,
        references: References | None = None,
        floor: dict | None = None,
        classifier: FeatureExtractor | None = None,
    ):
        self.tasks, self.class_ids, self.extractor, self.classifier = tasks, class_ids, extractor, classifier
        self.references = references or References()
        num_kept = len(self.references)
        self.labels = [
            [name for name, count in labels.items() for _ in range(count)] for labels in self.references.labels
        ]
        # What distances are taken to, and the classes that real images are taken for (`None`: not known).
        self.real: list = [self.references.of_task(task) for task in range(num_kept)]
        self.recognised = [
            found and classifier is None and [name for name, count in found.items() for _ in range(count)]
            for found in self.references.predicted
        ]
        for names in tasks[num_kept:]:
            split = cap_per_class(test, names, config.eval_images_per_class)
            if (np.bincount(split.labels) // 2).sum() < 2:
                raise DataError(
                    f"the task {', '.join(names)} has {len(split.labels)} image(s) to evaluate on; it takes two in each of"
                    " two halves that have equally many of every class (eval_images_per_class, eval_split)"
                )
            self.labels.append([split.names[label] for label in split.labels])
            images = split.decode(range(len(split.labels)))
            features, predictions = extractor.of_real_images(images, config.cache_dir)
            self.references.append(features, self.labels[-1], predictions)
            self.real.append(features)
            judged = predictions if classifier is None else classifier.of_real_images(images, config.cache_dir)[1]
            self.recognised.append(judged)
        new = slice(num_kept, None)
        self.info = dict(extractor.info)
        if self.classes is not None and any(known := [self._recognises(task) for task in range(len(tasks))][new]):
            pairs = [
                pair
                for names, found, is_known in zip(self.labels[new], self.recognised[new], known, strict=True)
                for pair in zip(names, found, strict=True)
                if is_known
            ]
            self.info["test_accuracy"] = sum(name == predicted for name, predicted in pairs) / len(pairs)
        if classifier is not None:
            self.info["eval_classifier"] = classifier.info
        self.floor = metrics.floor(self.real[new], self.labels[new], extractor.name)
        if num_kept:
            self.floor = metrics.extend_floor(floor, num_kept, self.floor)

    @property
    def classes(self) -> list[str] | None:
        """The classes that predictions are among, `None` where nothing recognises."""
        return (self.classifier or self.extractor).class_names

    def _recognises(self, task: int) -> bool:
        """Whether what recognises has learned all classes of a task."""
        return set(self.labels[task]) <= set((self.classifier or self.extractor).known_classes)

    def __call__(
        self, sample: Callable[[list[int], list[tuple]], torch.Tensor], num_tasks: int
    ) -> tuple[dict, torch.Tensor]:
        """
        Returns the metric row of a model and the first images of every class.

        The noise of an image is a function of its class and index: the same after every task.

        Args:
            sample: maps class ids and noise keys to uint8 images.
            num_tasks (`int`): the tasks that the model has seen, from the first.

        Returns:
            `{"metrics": {name: [on task 0, 1, ...]}, "class_accuracy": {...} or None, "num_images": [...]}`, in which
            what could not be measured is `None`, and images of shape `(classes * columns, channels, height, width)` for
            [`sampling.image_grid`].
        """
        labels = [name for task in self.labels[:num_tasks] for name in task]
        counts: dict[str, int] = {}
        keys = []
        for name in labels:
            keys.append(("eval", name, counts.setdefault(name, 0)))
            counts[name] += 1
        images = sample([self.class_ids[name] for name in labels], keys)

        rows: dict[str, list[float | None]] = {}
        class_accuracy: dict[str, float] = {}
        features, predictions = self.extractor(images)
        if self.classifier is not None:
            predictions = self.classifier(images)[1]
        start = 0
        for task in range(num_tasks):
            part = slice(start, start := start + len(self.labels[task]))
            values = metrics.task_metrics(features[part], self.real[task], self.extractor.name)
            if self.classes is not None:
                values |= {"accuracy": None, "kld": None}
                if self._recognises(task):
                    found, real = predictions[part], self.recognised[task]
                    values["accuracy"] = metrics.accuracy(found, labels[part])
                    values["kld"] = metrics.kl_divergence(found, real, self.classes) if real else None
                    class_accuracy |= metrics.accuracy_by_class(found, labels[part])
            for name, value in values.items():
                rows.setdefault(name, []).append(value)

        columns = min(GRID_COLUMNS, *counts.values())
        # A row a class, in the order in which they were learned; a refined class has images in two tasks.
        place = {name: row for row, name in enumerate(counts)}
        first = sorted((place[name], index, i) for i, (_, name, index) in enumerate(keys) if index < columns)
        row = {
            "metrics": rows,
            "class_accuracy": class_accuracy if self.classes is not None else None,
            "num_images": [len(task) for task in self.labels[:num_tasks]],
        }
        return row, images[[i for _, _, i in first[: MAX_GRID_ROWS * columns]]]

    def report(self, rows: list[dict]) -> dict:
        """Returns what `metrics.json` says of the metric rows of the models so far."""
        # A stream that goes on may be measured in more ways than before.
        names = list(dict.fromkeys(name for row in reversed(rows) for name in row["metrics"]))
        matrices = {
            name: [row["metrics"].get(name, [None] * len(row["num_images"])) for row in rows] for name in names
        }
        return {
            "feature_extractor": self.extractor.name,
            "feature_extractor_info": self.info,
            "num_images": [row["num_images"] for row in rows],
            "floor": self.floor,
            "metrics": {
                name: metrics.summarize(matrix, name in HIGHER_IS_BETTER) for name, matrix in matrices.items()
            },
            "class_accuracy": [row["class_accuracy"] for row in rows],
            **({"classification": metrics.summarize_classification(rows)} if "classification" in rows[-1] else {}),
        }


def create_extractors(
    config: TrainingConfig,
    start: Start | None,
    train: ImageSplit,
    class_ids: dict[str, int],
    device: torch.device,
    quiet: bool,
) -> tuple[FeatureExtractor, FeatureExtractor | None]:
    """
    Returns the extractor of a run and its `eval_classifier`, `None` where it has none: fetched, or trained, by each process
    for itself. A run that goes on, from its own tasks or from `start`, has the extractor that these were measured with.

    Raises:
        DataError: when one cannot be had, or is not the one that was measured with.
        CheckpointError: when a finished task's files are damaged.
    """
    class_names, classifier = list(class_ids), None
    if config.eval_classifier is not None:
        classifier = load_classifier("eval_classifier", config.eval_classifier, class_names, device)
        if classifier.class_names is None:
            raise DataError(f"eval_classifier: {config.eval_classifier} does not know all of {', '.join(class_ids)}")
    own_tasks = [] if config.overwrite_output_dir else tasks_of_run(config.output_dir)
    if start is None and not own_tasks:
        return resolve_feature_extractor(config, train, class_names, device, quiet), classifier
    folder, state = (own_tasks[-1], read_task_state(own_tasks[-1])) if own_tasks else (start.folder, start.state)
    # Of a stream that goes on, it may know the first classes alone.
    known = class_names if start is None else []
    info = state["feature_extractor_info"]
    return load_extractor(folder / CONSOLIDATION, info, config, device, known), classifier


def create_evaluation(
    config: TrainingConfig,
    start: Start | None,
    test: ImageSplit,
    tasks: list[list[str]],
    class_ids: dict[str, int],
    extractor: FeatureExtractor,
    classifier: FeatureExtractor | None,
    process_index: int = 0,
    num_processes: int = 1,
    gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Evaluation:
    """
    Returns the [`Evaluation`] of a run, with the references of the tasks before it. All processes call it together, and
    take a part each of all that is measured.

    Args:
        extractor, classifier ([`FeatureExtractor`]): from [`create_extractors`].
        process_index (`int`), num_processes (`int`), gather: of this process, as in [`FeatureExtractor.share_out`].

    Raises:
        DataError: when there are too few test images.
        CheckpointError: when the files of `start` do not fit.
    """
    for shared in (extractor, classifier):
        if shared is not None:
            shared.share_out(process_index, num_processes, gather)
    references, floor = None, None
    if start is not None:
        references, floor = References.load(start.folder / CONSOLIDATION).first(start.task + 1), start.state["floor"]
    return Evaluation(test, tasks, class_ids, extractor, config, references, floor, classifier)


def nearest_training_images(
    samples: torch.Tensor, columns: int, class_names: list[str], train: ImageSplit
) -> torch.Tensor:
    """
    Returns, for a sample grid, rows of generated images and below each row the nearest training images of that class
    (Euclidean distance of pixels): copies would show as equal pairs. At most `MAX_NEAREST_ROWS` classes, of those that the
    training split has.

    Args:
        samples (`torch.Tensor` of shape `(classes * columns, channels, height, width)`): uint8.
        columns (`int`), class_names (`list[str]`): of the rows.
        train ([`ImageSplit`]): the real training split.
    """
    result = []
    here = [name for name in class_names if name in train.names and len(train.rows_of([name]))]
    rows = [pair for pair in zip(samples.split(columns), class_names, strict=False) if pair[1] in here]
    for row, name in rows[:MAX_NEAREST_ROWS]:
        real = train.decode(train.rows_of([name]))
        distances = torch.cdist(row.flatten(1).float(), real.flatten(1).float())
        result += [row, real[distances.argmin(dim=1)]]
    return torch.cat(result)


def class_grid_columns(samples: torch.Tensor, num_classes: int) -> int:
    """Returns how many images of a class stand in a grid of `num_classes` rows (100 at most)."""
    return len(samples) // min(num_classes, MAX_GRID_ROWS)
