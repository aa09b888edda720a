"""
Damages real test images by known amounts and asks which metric sees it: the smallest damage that each metric sees.

    python scripts/experiments/metric_sensitivity.py --dataset_name ylecun/mnist --output FILE.json [--plot FILE.png]

Two disjoint, class-balanced sets of real held-out images of a task are compared, as generated images are with real ones,
and again with a part of the second one damaged. A metric sees a damage when its mean is two standard deviations off that
of the undamaged sets: those of one measurement, over random draws of both sets, averaged over tasks (as the floor's).
"""

import argparse
import itertools
import platform
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import kendalltau
from sklearn.cluster import KMeans
from sklearn.decomposition import PCA
from torchvision.transforms.functional import gaussian_blur

from diffusers_cl.classifier import NUM_FEATURES, train_classifier, weights_digest
from diffusers_cl.config import TrainingConfig
from diffusers_cl.data import ImageSplit, load_splits
from diffusers_cl.features import FeatureExtractor
from diffusers_cl.files import write_json
from diffusers_cl.metrics import frechet_distance, kernel_distance, precision_and_recall
from diffusers_cl.randomness import derive_seed
from diffusers_cl.tasks import resolve_tasks


# Standard deviations in pixels; the last one is that of the damage `blur`.
BLUR_SIGMAS = (0.3, 0.4, 0.5, 0.7, 1.0)
# Percentages of the images, or sigmas.
STRENGTHS = {
    "undamaged": (0,),
    **dict.fromkeys(("wrong_classes", "swapped_labels", "blur", "dropped_modes", "copies"), (1, 2, 5, 10, 20)),
    "blur_all": BLUR_SIGMAS,
}
CONDITIONS = [(kind, strength) for kind in STRENGTHS for strength in STRENGTHS[kind]]
NUM_MODES = 5  # k-means centres in a class
SEEN = 2.0
HIGHER_IS_BETTER = ("recall", "precision", "accuracy")


@dataclass
class Pool:
    """
    All that is measured of the held-out images, in rows: first the images as they are, then, for every sigma of
    `BLUR_SIGMAS`, blurred. `labels` and `mode_distances` (to the k-means centres of the image's class, in `pixels`) have the
    first rows only; `pixels` are principal components; `features` and `predictions` go by the classifier's seed.
    """

    labels: np.ndarray
    mode_distances: np.ndarray
    pixels: torch.Tensor
    features: dict[int, torch.Tensor]
    predictions: dict[int, np.ndarray]


def build_pool(train: ImageSplit, test: ImageSplit, seeds: list[int]) -> tuple[Pool, list[dict]]:
    """Returns the pool of the test images, and what there is to record about every classifier."""
    images = test.decode(range(len(test.labels)))
    blurred = [gaussian_blur(images, 2 * int(np.ceil(3 * sigma)) + 1, sigma) for sigma in BLUR_SIGMAS]
    images = torch.cat([images, *blurred])
    fitted = train.decode(np.random.default_rng(0).permutation(len(train.labels))[:10_000])
    components = PCA(NUM_FEATURES, random_state=0).fit(fitted.flatten(1).numpy() / 255)
    pixels = components.transform(images.flatten(1).numpy() / 255)
    distances = np.zeros((len(test.labels), NUM_MODES))
    for label in np.unique(test.labels):
        own = np.flatnonzero(test.labels == label)
        distances[own] = KMeans(NUM_MODES, random_state=0).fit_transform(pixels[own])
    pool, records = Pool(test.labels, distances, torch.from_numpy(pixels).double(), {}, {}), []
    for seed in seeds:
        network = train_classifier(train, np.arange(len(train.labels)), "cpu", True, seed)
        pool.features[seed], names = FeatureExtractor("classifier", network, "cpu", train.names)(images)
        pool.predictions[seed] = np.array([train.names.index(name) for name in names])
        accuracy = float((pool.predictions[seed][: len(test.labels)] == test.labels).mean())
        records.append({"seed": seed, "sha256": weights_digest(network), "test_accuracy": accuracy})
    return pool, records


def draw_pair(labels: np.ndarray, classes: list[int], size: int, rng) -> tuple[np.ndarray, np.ndarray]:
    """
    Returns the rows of a reference and of a candidate set: disjoint, equally many of every class, `size` images each or
    as many as there are. Classes take turns, each in random order: the first `m` rows are a random, balanced part.
    """
    columns = [rng.permutation(np.flatnonzero(labels == label)) for label in classes]
    half = min(size // len(classes), *(len(column) // 2 for column in columns))
    pair = np.stack([column[: 2 * half] for column in columns], axis=1)
    return pair[:half].ravel(), pair[half:].ravel()


def damage(name: str, strength: float, rows: np.ndarray, pool: Pool, rng) -> tuple[np.ndarray, np.ndarray]:
    """
    Returns rows and claimed labels of a candidate set after one of `STRENGTHS`.

    `blur_all` blurs every image. The others damage a percentage, one image at least, from the first row on:
    `wrong_classes` puts images of classes outside the task in their places, under the old labels; `swapped_labels` lets
    them claim to be of the task's next class; `blur` blurs them; `copies` puts copies of other candidates of the class
    in their places. `dropped_modes` does so with as many of each class, but with those nearest to one of its k-means
    centres, drawn at random.
    """
    labels = pool.labels[rows]
    hit = np.arange(len(rows)) < max(1, round(strength / 100 * len(rows)))
    if name == "wrong_classes":
        outside = np.flatnonzero(~np.isin(pool.labels, labels))
        rows = np.where(hit, rng.permutation(outside)[: len(rows)], rows)
    elif name == "swapped_labels":
        classes = np.unique(labels)
        labels = np.where(hit, classes[(np.searchsorted(classes, labels) + 1) % len(classes)], labels)
    elif name == "blur":
        rows = rows + hit * len(BLUR_SIGMAS) * len(pool.labels)
    elif name == "blur_all":
        rows = rows + (1 + BLUR_SIGMAS.index(strength)) * len(pool.labels)
    elif name in ("copies", "dropped_modes"):
        mode = rng.integers(NUM_MODES, size=pool.labels.max() + 1)
        key = np.arange(len(rows)) if name == "copies" else pool.mode_distances[rows, mode[labels]]
        rows = rows.copy()
        for label in np.unique(labels):
            own = np.flatnonzero(labels == label)
            lost, kept = np.split(own[np.argsort(key[own], kind="stable")], [hit[own].sum()])
            rows[lost] = rows[rng.permutation(kept)[: len(lost)]]
    return rows, labels


def measure(rows: np.ndarray, labels: np.ndarray, reference: np.ndarray, pool: Pool, known: dict) -> dict[str, float]:
    """Returns every metric of a candidate set; `known` (for this reference) spares what labels do not change."""
    if (key := rows.tobytes()) not in known:
        # What has no seed in its name is of the first classifier's features.
        generated, real = (next(iter(pool.features.values()))[part] for part in (rows, reference))
        precision, recall = precision_and_recall(generated, real)
        known[key] = {
            **{f"fd_classifier[{seed}]": frechet_distance(f[rows], f[reference]) for seed, f in pool.features.items()},
            "kd_classifier": kernel_distance(generated, real),
            "recall": recall,
            "precision": precision,
            "fd_pixels": frechet_distance(pool.pixels[rows], pool.pixels[reference]),
        }
    accuracy = {f"accuracy[{seed}]": float(np.mean(p[rows] == labels)) for seed, p in pool.predictions.items()}
    return known[key] | accuracy


def measure_resamplings(pool: Pool, tasks: list[list[int]], size: int, num_resamplings: int, seed: int) -> dict:
    """Returns by `(metric, damage, strength)` the values of shape `(tasks, resamplings)`; `tasks` hold labels."""
    values: dict = {}
    for task, resampling in itertools.product(range(len(tasks)), range(num_resamplings)):
        key = (seed, "metric_sensitivity", task, size, resampling)
        reference, rows = draw_pair(pool.labels, tasks[task], size, np.random.default_rng(derive_seed(*key)))
        known: dict = {}
        for kind, strength in CONDITIONS:
            # The same draws at every strength: what 1 % damages, 2 % does too.
            damaged = damage(kind, strength, rows, pool, np.random.default_rng(derive_seed(*key, kind)))
            for name, value in measure(*damaged, reference, pool, known).items():
                place = values.setdefault((name, kind, strength), np.zeros((len(tasks), num_resamplings)))
                place[task, resampling] = value
    return values


def summarize(values: dict) -> dict:
    """
    Returns by metric, damage and strength the mean and the standard deviation of values of shape `(tasks, resamplings)`
    (over resamplings, averaged over tasks) and the score, above 0 where worse: the distance of the mean from that of
    the undamaged sets, in standard deviations of these.
    """
    summary: dict = {}
    for (name, kind, strength), array in values.items():
        none = values[name, "undamaged", 0]
        worse = (none.mean() - array.mean()) * (1 if name.startswith(HIGHER_IS_BETTER) else -1)
        # A classifier that makes no mistake has an accuracy without spread.
        score = worse / max(none.std(axis=1).mean(), 1e-12)
        entry = {"mean": array.mean(), "std": array.std(axis=1).mean(), "score": score}
        summary.setdefault(name, {}).setdefault(kind, {})[strength] = entry
    return summary


def smallest_seen(summary: dict) -> dict:
    """Returns, by metric and damage, the smallest strength with a score of `SEEN` or more, of either sign, or `None`."""
    seen: dict = {}
    for name, kind in itertools.product(summary, list(STRENGTHS)[1:]):
        found = [strength for strength, entry in summary[name][kind].items() if abs(entry["score"]) >= SEEN]
        seen.setdefault(name, {})[kind] = min(found, default=None)
    return seen


def agreement(summary: dict, seeds: list[int]) -> dict:
    """
    Returns for every pair of classifiers how far the mean Frechet distances of sets of damaged images agree: Kendall's tau,
    over all sets and over those that both see, and the ratio (second over first) of the distances (geometric mean)
    and of what the strongest damage of a kind adds.
    """
    sets = [condition for condition in CONDITIONS if condition[0] not in ("undamaged", "swapped_labels")]
    result = {}
    for pair in itertools.combinations(seeds, 2):
        found = [summary[f"fd_classifier[{seed}]"] for seed in pair]
        mean = np.array([[part[kind][strength]["mean"] for kind, strength in sets] for part in found])
        seen = np.all([[part[kind][strength]["score"] >= SEEN for kind, strength in sets] for part in found], axis=0)
        added = mean - np.array([[part["undamaged"][0]["mean"]] for part in found])
        result[f"{pair[0]}, {pair[1]}"] = {
            "tau": float(kendalltau(*mean).statistic),
            "tau_seen": float(kendalltau(*mean[:, seen]).statistic),
            "num_seen": int(seen.sum()),
            "ratio": float(np.exp(np.log(mean[1] / mean[0]).mean())),
            "ratio_added": {k: added[1, i] / added[0, i] for i, (k, s) in enumerate(sets) if s == STRENGTHS[k][-1]},
        }
    return result


def format_table(seen: dict[int, dict]) -> str:
    """Returns what [`smallest_seen`] found, by size, as Markdown: a row a metric, a column a damage."""
    kinds = list(STRENGTHS)[1:]
    lines = [f"smallest damage seen at n = {' / '.join(map(str, seen))}, in % or (blur_all) pixels", ""]
    lines += ["| metric | " + " | ".join(kinds) + " |", "| --- |" + " --- |" * len(kinds)]
    for name in next(iter(seen.values())):
        cells = [" / ".join(str(found[name][kind] or "none") for found in seen.values()) for kind in kinds]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot_scores(path: Path, size: int, summary: dict) -> None:
    """Saves score against strength, a line a metric, a panel a damage."""
    figure = Figure(figsize=(12, 7.5), layout="constrained")
    for axes, kind in zip(figure.subplots(2, 3).flat, list(STRENGTHS)[1:], strict=True):
        for index, (name, kinds) in enumerate(summary.items()):
            scores = [entry["score"] for entry in kinds[kind].values()]
            axes.plot(STRENGTHS[kind], scores, f"C{index}", marker="osD^vPX"[index % 7], markersize=4, label=name)
        axes.axhspan(-SEEN, SEEN, color="0.9", zorder=0)
        axes.set_yscale("symlog", linthresh=SEEN)
        xlabel = "sigma in pixels, all images" if kind == "blur_all" else "% of the images"
        axes.set(title=kind, xlabel=xlabel, xscale="log")
        axes.set_xticks(STRENGTHS[kind], map(str, STRENGTHS[kind]))
        axes.minorticks_off()
    figure.suptitle(f"n = {size}: standard deviations worse than undamaged")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=5, frameon=False)
    figure.savefig(path, dpi=110, facecolor="white")


def run(args: argparse.Namespace) -> dict:
    """Returns everything that the experiment found, as the JSON file has it."""
    start = time.process_time()
    config = TrainingConfig(dataset_name=args.dataset_name, resolution=args.resolution, classes_per_task=2)
    train, test = load_splits(config)
    tasks = resolve_tasks(config, train, test)
    labels = [[test.names.index(name) for name in task] for task in tasks]
    pool, classifiers = build_pool(train, test, args.classifier_seeds)
    results = {n: summarize(measure_resamplings(pool, labels, n, args.num_resamplings, args.seed)) for n in args.sizes}
    rng = np.random.default_rng(0)
    libraries = "diffusers-cl torch numpy scipy scikit-learn torchvision torch-fidelity datasets".split()
    settings = {name: value for name, value in vars(args).items() if name not in ("dataset_name", "output", "plot")}
    return {
        "dataset": Path(args.dataset_name).name,
        "settings": settings | {"resize_mode": config.resize_mode, "num_modes": NUM_MODES, "seen": SEEN},
        "versions": {"python": platform.python_version(), **{name: version(name) for name in libraries}},
        "device": f"cpu ({platform.machine()} {platform.system()})",
        "threads": torch.get_num_threads(),
        "cpu_seconds": time.process_time() - start,
        "tasks": tasks,
        "num_images": {size: [len(draw_pair(pool.labels, t, size, rng)[0]) for t in labels] for size in args.sizes},
        "classifiers": classifiers,
        "smallest_seen": {size: smallest_seen(summary) for size, summary in results.items()},
        "classifier_agreement": {size: agreement(s, args.classifier_seeds) for size, s in results.items()},
        "results": results,
    }


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--dataset_name", default="ylecun/mnist", help="a dataset of the Hub, a local one, or digits")
    parser.add_argument("--resolution", type=int, default=16)
    parser.add_argument("--sizes", type=int, nargs="+", default=[72, 300, 1000], help="images in a set")
    parser.add_argument("--classifier_seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--num_resamplings", type=int, default=20, help="draws of both sets, for every task")
    parser.add_argument("--seed", type=int, default=0, help="of these draws and of the damages")
    parser.add_argument("--output", type=Path, required=True, help="the JSON file to write")
    parser.add_argument("--plot", type=Path, default=None, help="a PNG file to write, of the middle one of the sizes")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Runs the script."""
    result = run(args := parse_args(argv))
    write_json(args.output, result)
    print(format_table(result["smallest_seen"]) + "\n")
    for size, pairs in result["classifier_agreement"].items():
        for pair, found in pairs.items():
            print(f"n = {size}, classifiers {pair}: tau {found['tau']:.3f}, ratio of distances {found['ratio']:.3f}")
    if args.plot is not None:
        plot_scores(args.plot, *list(result["results"].items())[len(args.sizes) // 2])


if __name__ == "__main__":
    main()
