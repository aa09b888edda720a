"""
Asks a classifier that took no part in a run whether it recognises what the run's model draws.

    python scripts/recognise.py runs/digits [runs/digits-seed1 ...] [--num_images 100] [--output FILE]

The judge is a support vector machine on pixels, fitted to the real training split and tested on the held-out one. It is
neither the run's feature extractor nor used in training or selection. A run that went on from a model has the data of its
own classes alone; `--dataset_name` names one with all of them.
"""

import argparse
import json
import sys
from pathlib import Path

import numpy as np
import torch
import yaml
from sklearn.svm import SVC

from diffusers_cl.config import TrainingConfig
from diffusers_cl.data import load_splits
from diffusers_cl.errors import CheckpointError, DataError, RunError
from diffusers_cl.folders import finished_tasks, task_folder
from diffusers_cl.sampling import load_pipeline, sample_images


# Of the judge; fitting takes time that grows with the square of the number of images.
MAX_TRAIN_IMAGES = 10_000
SVC_PARAMETERS = {"C": 10.0, "kernel": "rbf", "gamma": "scale"}


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of train_continual.py")
    parser.add_argument("--num_images", type=int, default=100, help="images a class")
    parser.add_argument("--seed", type=int, default=0, help="of the sampled noise, which training never saw")
    parser.add_argument("--dataset_name", help="the judge's data, by default that of the run")
    parser.add_argument("--task", type=int, help="the model of this task, by default that of the last")
    parser.add_argument("--output", type=Path, default=None, help="a JSON file to write")
    return parser.parse_args(argv)


def recognise(run: Path, num_images: int, seed: int, dataset_name: str | None = None, task: int | None = None) -> dict:
    """
    Returns how many of `num_images` samples of every class the judge takes for that class, after the last task or `task`.

    Raises:
        CheckpointError: when the run has no finished task.
        DataError: when its data cannot be loaded.
    """
    states = [state for state in finished_tasks(run) if task is None or state["task"] == task]
    if not states:
        raise CheckpointError(f"{run} has no finished task" + (f" {task}" if task is not None else ""))
    config = TrainingConfig(**yaml.safe_load((run / "config.yaml").read_text()))
    if dataset_name is not None:
        config.dataset_name, config.train_data_dir = dataset_name, None
    train, test = load_splits(config)

    def pixels(split, positions):
        return split.decode(positions).flatten(1).numpy() / 255

    rows = np.random.default_rng(0).permutation(len(train.labels))[:MAX_TRAIN_IMAGES]
    judge = SVC(**SVC_PARAMETERS).fit(pixels(train, rows), train.labels[rows])
    test_accuracy = float((judge.predict(pixels(test, range(len(test.labels)))) == test.labels).mean())

    folder = task_folder(run, states[-1]["task"])
    pipeline = load_pipeline(folder, torch.device("cpu"), str(folder))
    class_ids = {name: states[-1]["class_ids"][name] for name in states[-1]["seen_classes"]}
    if unknown := [name for name in class_ids if name not in train.names]:
        raise DataError(
            f"{run}: its data has no class {unknown[0]!r} to judge by; --dataset_name names data that has all"
        )
    images = sample_images(
        pipeline,
        [class_id for class_id in class_ids.values() for _ in range(num_images)],
        [("recognise", name, index) for name in class_ids for index in range(num_images)],
        seed,
        num_inference_steps=config.eval_num_inference_steps,
        batch_size=config.eval_batch_size,
    )
    predicted = judge.predict(images.flatten(1).numpy() / 255).reshape(len(class_ids), num_images)
    recognised = {
        name: int((row == train.names.index(name)).sum()) for name, row in zip(class_ids, predicted, strict=True)
    }
    return {
        "seed": config.seed,
        "penalty": [config.penalty, config.penalty_mode, config.ewc_lambda],
        "replay": config.replay,
        "judge": {"name": "SVC on pixels", **SVC_PARAMETERS, "test_accuracy": test_accuracy},
        "num_images_per_class": num_images,
        "sampling_seed": seed,
        "recognised": recognised,
        "lowest": min(recognised.values()),
        "versions": {"torch": torch.__version__, "diffusers_cl": states[-1]["version"]},
    }


def main() -> int:
    """Runs the script and returns its exit code."""
    args = parse_args()
    try:
        results = [recognise(run, args.num_images, args.seed, args.dataset_name, args.task) for run in args.runs]
    except (RunError, OSError) as error:
        print(f"recognise.py: error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", DataError.exit_code)
    for run, result in zip(args.runs, results, strict=True):
        print(f"{run}: lowest {result['lowest']} of {args.num_images}; {result['recognised']}")
        print(f"  the judge recognises {result['judge']['test_accuracy']:.1%} of the real test images")
    if args.output is not None:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(json.dumps(results, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
