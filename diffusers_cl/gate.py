"""The gate before a release: does a new model draw what an old one knew as well as that did?"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure

from .changes import compare
from .config import TrainingConfig
from .errors import CheckpointError, ConfigError
from .features import FeatureExtractor, load_extractor
from .folders import CONSOLIDATION
from .pipeline import ClassConditionalPipeline
from .plots import format_number
from .references import References
from .sampling import load_pipeline, sample_images
from .start import Start, fetch_task


# In the picture: images of a class on either side, and classes.
PICTURE_COLUMNS = 8
MAX_PICTURE_ROWS = 40


@dataclass
class Model:
    """A model to compare: the task that it is of, and its pipeline on a device."""

    start: Start
    pipeline: ClassConditionalPipeline

    @property
    def class_ids(self) -> dict[str, int]:
        """The ids of the classes that it knows."""
        return {name: class_id for class_id, name in self.pipeline.known_classes.items()}

    @property
    def name(self) -> str:
        """As it was asked for, with the commit where it is a repo's."""
        return self.start.model + (f" ({self.start.revision[:12]})" if self.start.revision else "")


def open_model(model: str, revision: str | None, device: torch.device, cache_dir: str | None = None) -> Model:
    """
    Returns the model of a task folder or Hub repo. All its files are verified, none is run.

    Raises:
        ConfigError, DataError, CheckpointError: as [`fetch_task`], and for weights that are not all there.
    """
    start = fetch_task(model, revision, cache_dir=cache_dir)
    return Model(start, load_pipeline(start.folder, device, model))


def open_measure(old: Model, config: TrainingConfig, device: torch.device) -> tuple[References, FeatureExtractor]:
    """
    Returns what a model was measured with: the statistics of the real images of its classes, and the extractor of their
    features.

    Args:
        old ([`Model`]).
        config ([`TrainingConfig`]): where an extractor is found that is not in the model's folder.

    Raises:
        CheckpointError: when its files do not fit.
        DataError: when the extractor cannot be had, or is another one.
    """
    kept = old.start.folder / CONSOLIDATION
    references = References.load(kept)
    if unmeasured := [name for name in old.class_ids if name not in references.class_mean]:
        raise CheckpointError(f"{old.start.model} has no reference statistics of the class {unmeasured[0]!r}")
    return references, load_extractor(kept, old.start.state["feature_extractor_info"], config, device)


def sample_both(
    old: Model, new: Model, num_images: int, seed: int, num_inference_steps: int, batch_size: int
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """
    Returns images of every class that the old model knows, of the old and of the new model from the same noise: by class
    name, uint8 of shape `(num_images, channels, height, width)`.

    Args:
        old, new ([`Model`]).
        num_images (`int`): of a class.
        seed, num_inference_steps, batch_size (`int`): as in [`sample_images`].

    Raises:
        ConfigError: when the new model lacks classes, the two draw images of different sizes, or one has fewer steps.
    """
    names = list(old.class_ids)
    if missing := [name for name in names if name not in new.class_ids]:
        raise ConfigError(
            f"{new.start.model} does not know {', '.join(map(repr, missing[:10]))}, which {old.start.model} knows; they are"
            " compared by the names in id2label"
        )
    shapes = [(m.pipeline.unet.config.in_channels, m.pipeline.unet.config.sample_size) for m in (old, new)]
    if shapes[0] != shapes[1]:
        sizes = [f"{size}x{size} with {channels} channel(s)" for channels, size in shapes]
        raise ConfigError(f"{old.start.model} draws images of {sizes[0]}, {new.start.model} of {sizes[1]}")
    most = min(model.pipeline.scheduler.config.num_train_timesteps for model in (old, new))
    if num_inference_steps > most:
        raise ConfigError(f"--num_inference_steps is {num_inference_steps}; allowed: at most {most}")
    keys = [("gate", name, index) for name in names for index in range(num_images)]
    sides = [
        sample_images(
            model.pipeline,
            [model.class_ids[name] for name in names for _ in range(num_images)],
            keys,
            seed,
            num_inference_steps=num_inference_steps,
            batch_size=batch_size,
            description=f"Sampling {which}",
        ).split(num_images)
        for which, model in (("OLD", old), ("NEW", new))
    ]
    return {name: (before, after) for name, before, after in zip(names, *sides, strict=True)}


def run_gate(
    old: Model,
    new: Model,
    references: References,
    extractor: FeatureExtractor,
    images: dict[str, tuple[torch.Tensor, torch.Tensor]],
    **options,
) -> dict:
    """
    Returns the content of `gate.json`: what was compared, and what became of every class and task.

    Args:
        old, new ([`Model`]).
        references ([`References`]), extractor ([`FeatureExtractor`]): from [`open_measure`].
        images (`dict`): from [`sample_both`].
        options: as [`compare`] takes them.
    """
    measured = {name: [extractor(side) for side in pair] for name, pair in images.items()}
    features = {name: tuple(side[0] for side in pair) for name, pair in measured.items()}
    known = set(extractor.known_classes) if extractor.class_names is not None else set()
    predictions = {name: tuple(side[1] for side in pair) for name, pair in measured.items() if name in known}
    result = compare(features, predictions, references, **options)
    worse = [
        f"{row['name']} ({measure})"
        for row in [*result["classes"], *result["tasks"]]
        for measure in ("distance", "accuracy")
        if row[measure] is not None and row[measure]["verdict"] == "worse"
    ]
    return {
        "schema": 1,
        "old": {"model": old.start.model, "revision": old.start.revision},
        "new": {"model": new.start.model, "revision": new.start.revision},
        "feature_extractor": extractor.info,
        # Of an adopted model they may be of its own samples.
        "references": old.start.state.get("references", "data"),
        "num_images": len(next(iter(images.values()))[0]),
        **options,
        **result,
        "worse": worse,
        "passed": not worse,
    }


def verdict(row: dict) -> str:
    """Returns what is said of a class or task in one word, or `worse` with the measures that are."""
    found = {measure: row[measure]["verdict"] for measure in ("distance", "accuracy") if row[measure] is not None}
    if worse := [measure for measure, said in found.items() if said == "worse"]:
        return f"worse ({', '.join(worse)})"
    return next((said for said in ("tolerated", "better") if said in found.values()), "same")


def _printable(name: str) -> str:
    return name if name.isprintable() else repr(name)


def _cells(values: dict | None, show: Callable[..., str]) -> list[str]:
    if values is None:
        return ["n/a"] * 3
    low, high = (show(value, True) for value in values["interval"])
    return [show(values["old"]), show(values["new"]), f"{show(values['change'], True)} [{low}, {high}]"]


def gate_lines(result: dict) -> list[str]:
    """Returns the tables of classes and tasks and what they say, in Markdown."""
    has_accuracy = any(row["accuracy"] for row in result["classes"])

    def table(title: str, rows: list[dict]) -> list[str]:
        head = [title, "distance, old", "new", "change [interval]"]
        lines = [[*head, *["accuracy, old", "new", "change [interval]"][: 3 * has_accuracy], "verdict"]]
        lines.append(["---"] * len(lines[0]))
        for row in rows:
            name = _printable(row["name"])
            scale = max(row["distance"]["old"], abs(row["distance"]["change"]))
            cells = _cells(row["distance"], lambda value, sign=False, scale=scale: format_number(value, sign, scale))
            if has_accuracy:
                cells += _cells(row["accuracy"], lambda value, sign=False: f"{value:{'+' if sign else ''}.1%}")
            lines.append([name.replace("|", "\\|"), *cells, verdict(row)])
        return [f"| {' | '.join(line)} |" for line in lines]

    rows = [*result["classes"], *result["tasks"]]
    num_worse = len([row for row in rows if verdict(row).startswith("worse")])
    real = "real images" if result["references"] == "data" else f"its {result['references']}"
    tolerance = result["max_regression"]
    by = f" by more than {tolerance:.1%} (of the old distance, or in accuracy)" if tolerance else ""
    said = f"{num_worse} of {len(rows)} classes and tasks are worse" if num_worse else "no class and no task is worse"
    return [
        *table("class", result["classes"]),
        "",
        *table("task", result["tasks"]),
        "",
        f"{'FAILED' if num_worse else 'PASSED'}: {said}{by}, beyond chance.",
        "",
        f"{result['num_images']} images a class from the same noise. Distance: Frechet distance of the features"
        f" ({result['feature_extractor']['name']}) to the statistics of {real} that travel with the old model, with diagonal"
        " covariance for a class and with all of it for a task; lower is better. Accuracy: what the extractor recognises."
        f" Intervals have {result['confidence']:.0%} for all {result['num_comparisons']} comparisons together (Bonferroni): plus"
        f" or minus {result['num_deviations']:.2f} standard deviations over {result['resamplings']} resamplings of the pairs. A"
        " whole interval on the worse side fails.",
    ]


def _strip(images: torch.Tensor) -> np.ndarray:
    """Images side by side with a gap, (height, width, 3)."""
    pictures = images.expand(-1, 3, -1, -1).permute(0, 2, 3, 1).numpy()
    gap = np.full((pictures.shape[1], max(1, pictures.shape[2] // 16), 3), 255, dtype=np.uint8)
    return np.concatenate([part for picture in pictures for part in (picture, gap)][:-1], axis=1)


def _shortened(text: str, length: int) -> str:
    return text if len(text) <= length else f"{text[: length // 2 - 1]}..{text[-(length // 2 - 1) :]}"


def plot_side_by_side(path: Path, images: dict[str, tuple[torch.Tensor, torch.Tensor]], result: dict) -> None:
    """
    Saves a picture of the first images of every class, the old model's left and the new one's right, a pair of places from
    the same noise; what is worse is red, and comes first where there are too many classes.

    Args:
        path (`Path`): the PNG file.
        images (`dict`): from [`sample_both`].
        result (`dict`): from [`run_gate`].
    """
    said = {row["name"]: verdict(row).split(" ")[0] for row in result["classes"]}
    shown = list(images)
    if len(shown) > MAX_PICTURE_ROWS:
        shown = sorted(shown, key=lambda name: said[name] != "worse")[:MAX_PICTURE_ROWS]
    strips = {name: [_strip(side[:PICTURE_COLUMNS]) for side in images[name]] for name in shown}
    height, width = next(iter(strips.values()))[0].shape[:2]
    # In inches; small images are enlarged.
    row = max(0.5, height / 120)
    figure = Figure(figsize=(1.6 + 2 * row * width / height, 0.5 + len(shown) * (row + 0.1)), layout="constrained")
    for i, axes_of_class in enumerate(figure.subplots(len(shown), 2, squeeze=False)):
        name = shown[i]
        for axes, strip, which in zip(axes_of_class, strips[name], ("old", "new"), strict=True):
            axes.imshow(strip, interpolation="nearest")
            axes.set_xticks([])
            axes.set_yticks([])
            axes.spines[:].set_visible(False)
            if i == 0:
                title = f"{which.upper()}: {_shortened(result[which]['model'], 40)}"
                axes.set_title(title, fontsize=9, loc="left", parse_math=False)
        label = _shortened(_printable(name), 16) + (f"\n{said[name]}" if said[name] != "same" else "")
        axes_of_class[0].set_ylabel(
            label,
            fontsize=9,
            rotation=0,
            ha="right",
            va="center",
            color="tab:red" if said[name] == "worse" else "black",
            parse_math=False,
        )
    if len(shown) < len(images):
        figure.supxlabel(f"{len(shown)} of {len(images)} classes", fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, facecolor="white")
