"""
The whole story, for real and offline: a model is published task by task, everything local is deleted, and somebody else
teaches it new classes from its Hub page alone.

    make story            # or: python scripts/story.py [--work_dir runs/story] [--output results/story.json]

A Hub of the project's own (tests/hub_server.py, loopback only) stands in for huggingface.co; the clients are the real ones.
Digits 0 to 5 are learned in three tasks, with pushes; then 6 to 9 come as a folder of images, once with the method that the
repo's state names and once with plain fine-tuning. The judge of scripts/recognise.py counts what is recognised.
"""

import argparse
import json
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import torch
import yaml
from huggingface_hub import ModelCard

from diffusers_cl import __version__
from diffusers_cl.config import TrainingConfig
from diffusers_cl.data import load_splits
from diffusers_cl.files import write_json
from diffusers_cl.folders import CONSOLIDATION, STATE_NAME, task_folder
from diffusers_cl.report import read_json
from diffusers_cl.sampling import to_pil


ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from hub_server import HubServer  # noqa: E402 (not part of the package)


MODEL = "me/digits"
OLD, NEW = ["0", "1", "2", "3", "4", "5"], ["6", "7", "8", "9"]
FIRST = ["--config", "configs/digits.yaml", "--tasks", "[[0, 1], [2, 3], [4, 5]]", "--classes_per_task", "null"]
NUM_IMAGES = 100


def write_new_classes(folder: Path) -> None:
    """Writes the digits 6 to 9 as image folders `train/<class>` and `test/<class>`, split as the data set is."""
    config = TrainingConfig(dataset_name="digits", classes_per_task=2, resolution=8)
    for split, name in zip(load_splits(config), ("train", "test"), strict=True):
        for class_name in NEW:
            (folder / name / class_name).mkdir(parents=True)
            for index, picture in enumerate(to_pil(split.decode(split.rows_of([class_name])))):
                picture.save(folder / name / class_name / f"{index:03d}.png")


def run(script: str, *arguments: str | Path, environment: dict[str, str]) -> None:
    """Runs a script of the checkout; its output is shown."""
    command = [sys.executable, str(ROOT / script), *map(str, arguments)]
    print("$ " + " ".join(["python", script, *map(str, arguments)]), flush=True)
    subprocess.run(command, cwd=ROOT, env=environment, check=True)


def recognised(folder: Path, environment: dict[str, str], *options: str) -> dict[str, int]:
    """Returns how many of `NUM_IMAGES` samples of every class of a run's last model the judge recognises."""
    output = folder.parent / "recognised.json"
    run(
        "scripts/recognise.py",
        folder,
        "--num_images",
        NUM_IMAGES,
        "--output",
        output,
        *options,
        environment=environment,
    )
    return json.loads(output.read_text())[0]["recognised"]


def summary(folder: Path) -> dict:
    """Returns what a run that went on measured: the Frechet distance's matrix, average and forgetting, and the time."""
    metrics, machine = read_json(folder / "metrics.json"), read_json(folder / "run.json")
    values = metrics["metrics"]["fd_classifier"]
    return {
        "tasks": metrics["tasks"],
        "matrix": values["matrix"],
        "average": values["average"],
        "forgetting": values["forgetting"],
        "replay": metrics["config"]["replay"],
        "minutes": machine["seconds"]["total"] / 60,
        "generated": machine["images"]["generated"],
    }


def tell(work_dir: Path) -> dict:
    """Returns what came of it, after checking that nothing of it is missing."""
    shutil.rmtree(work_dir, ignore_errors=True)
    work_dir.mkdir(parents=True)
    with HubServer(work_dir / "hub") as hub:
        # Two people, with a cache each: the second has nothing of the first.
        first, second = (hub.environment(work_dir / name) for name in ("first", "second"))
        run_dir = work_dir / "first" / "run"
        publish = ["--push_to_hub", "--hub_model_id", MODEL, "--report_to", "none"]
        run("train_continual.py", *FIRST, *publish, "--output_dir", run_dir, environment=first)
        before = recognised(run_dir, first)
        pushed = read_json(run_dir / "push.json")
        shutil.rmtree(work_dir / "first")

        write_new_classes(work_dir / "new_digits")
        start = ["--pretrained_model_name_or_path", f"{MODEL}-task-02", "--train_data_dir", work_dir / "new_digits"]
        options = ["--report_to", "none", "--num_threads", "1"]
        after, plain = work_dir / "second" / "run", work_dir / "second" / "finetune"
        run("train_continual.py", *start, *options, *publish[:3], "--output_dir", after, environment=second)
        run("train_continual.py", *start, *options, "--replay", "none", "--output_dir", plain, environment=second)

        card = ModelCard((task_folder(after, 3) / "README.md").read_text())
        state = read_json(task_folder(after, 3) / CONSOLIDATION / STATE_NAME)
        judge = ("--dataset_name", "digits")
        result = {
            "made_by": "python scripts/story.py",
            "before": {"recognised": before},
            "after": {"recognised": recognised(after, second, *judge), **summary(after)},
            "finetune": {"recognised": recognised(plain, second, *judge), **summary(plain)},
            "num_images_per_class": NUM_IMAGES,
            "pushed": sorted([*pushed["tasks"], *read_json(after / "push.json")["tasks"]]),
            "base_model": card.data.base_model,
            "lineage": state["lineage"]["previous"]["model"],
            "config": yaml.safe_load((after / "config.yaml").read_text()),
            "versions": {"python": platform.python_version(), "torch": torch.__version__, "diffusers_cl": __version__},
            **{key: read_json(after / "run.json")[key] for key in ("device", "threads")},
        }
    assert result["after"]["tasks"] == [["0", "1"], ["2", "3"], ["4", "5"], NEW], result["after"]["tasks"]
    assert all(None not in row for row in result["after"]["matrix"]), "an old column is missing"
    assert result["base_model"] == result["lineage"] == f"{MODEL}-task-02", "the lineage is wrong"
    for key in ("train_data_dir", "output_dir"):
        result["config"][key] = Path(result["config"][key]).name
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work_dir", type=Path, default=Path("runs/story"), help="emptied first")
    parser.add_argument("--output", type=Path, default=ROOT / "results" / "story.json")
    args = parser.parse_args()
    result = tell(args.work_dir.resolve())
    write_json(args.output, result)
    for name in ("before", "after", "finetune"):
        print(f"{name}: of {NUM_IMAGES} images of a class, recognised: {result[name]['recognised']}")
    print(args.output)


if __name__ == "__main__":
    main()
