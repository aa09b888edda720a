"""
What a run computes and leaves behind.

`python tests/test_train.py` writes tests/assets/golden_losses.txt anew: do that, and say why, when losses are meant to move.
"""

import itertools
import json
import math
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from script_helpers import EVERYTHING, arguments, finished_run, interrupted_copy, read_log, run, start, tiny_files

from diffusers_cl import __version__
from diffusers_cl.checkpoint import list_checkpoints
from diffusers_cl.files import verify_folder
from diffusers_cl.pipeline import ClassConditionalPipeline
from diffusers_cl.replay_images import replay_images_for_task


GOLDEN_LOSSES = Path(__file__).parent / "assets" / "golden_losses.txt"
UNET = "unet/diffusion_pytorch_model.safetensors"
TASK_FOLDER = {
    "README.md",
    "model_index.json",
    "pipeline.py",
    "samples.png",
    "scheduler/scheduler_config.json",
    "unet/config.json",
    UNET,
    "consolidation/state.json",
    "consolidation/ewc.safetensors",
    "consolidation/references.safetensors",
    "consolidation/manifest.json",
}
METRICS = {"fd_features", "kd_features", "precision", "recall", "accuracy", "kld"}


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    return finished_run(tmp_path_factory, "plain")


def names_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def read_json(path: Path) -> dict:
    return json.loads(path.read_text())


def test_files_of_a_run(plain_run):
    expected = {f"task-{task:02d}/{name}" for task in range(2) for name in TASK_FOLDER}
    expected |= {"config.yaml", "metrics.json", "run.json", "status.json", "report.md", "logs/train_log.jsonl"}
    expected |= {".lock", "inputs.json"}
    expected |= {"samples/task-00.png", "samples/task-01.png"}
    expected |= {f"plots/{name}.png" for name in ("average", "forgetting", "losses", "nearest", "task_matrix")}
    checkpoint = ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")
    expected |= {f"checkpoint-{step}/{name}" for step in range(1, 11) for name in checkpoint}
    expected |= {"replay/task-01/images.safetensors", "replay/task-01/manifest.json"}
    assert names_of(plain_run) == expected
    config = yaml.safe_load((plain_run / "config.yaml").read_text())
    assert config["tasks"] == [[0, 1], [2, 3]] and config["penalty"] == "rank1_ewc"
    assert read_json(plain_run / "status.json")["exit_code"] == 0
    record = read_json(plain_run / "run.json")
    assert {"replay", "train", "fisher", "evaluate", "publish", "total"} <= record["seconds"].keys()
    # 5 steps of 8 images a task, as many replayed in the second; 2 x 8 of them evaluated after it.
    assert record["images"] == {"trained": 80, "replayed": 40, "generated": 8 + 16 + 4}
    assert record["threads"] == 1 and record["restarts"] == 0 and record["peak_memory_gib"] > 0


def test_metrics_file(plain_run):
    metrics = read_json(plain_run / "metrics.json")
    assert metrics["schema"] == 1 and metrics["stream"] == "sequential"
    assert metrics["tasks"] == [["0", "1"], ["2", "3"]] and metrics["num_images"] == [[8], [8, 8]]
    assert metrics["metrics"].keys() == METRICS and len(metrics["fisher"]) == 2
    assert metrics["floor"].keys() == {"fd_features", "kd_features"}
    for name, metric in metrics["metrics"].items():
        first, last = metric["matrix"]
        assert len(first) == 1 and len(last) == 2
        assert metric["average"] == pytest.approx([first[0], (last[0] + last[1]) / 2])
        assert metric["learning"] == pytest.approx((first[0] + last[1]) / 2)
        assert metric["forgetting"] == pytest.approx((last[0] - first[0]) / 2)
        assert metric["worst"] == (min if name in ("accuracy", "precision", "recall") else max)(last)
    # What moves no number is not in it: two runs elsewhere compare equal.
    assert not {"output_dir", "checkpointing_steps", "cache_dir"} & metrics["config"].keys()


def test_task_folders(plain_run):
    seen, sizes = {0: ["0", "1"], 1: ["0", "1", "2", "3"]}, []
    for task, names in seen.items():
        folder = plain_run / f"task-{task:02d}"
        state = read_json(folder / "consolidation" / "state.json")
        assert state["class_ids"] == {"0": 0, "1": 1, "2": 2, "3": 3} and state["seen_classes"] == names
        assert state["task"] == task and state["global_step"] == 5 * (task + 1) and len(state["rows"]) == task + 1
        assert state["lineage"]["previous"] == (None if task == 0 else {"model": "task-00", "revision": None})
        assert state["version"] == __version__ and state["config"]["seed"] == 0
        pipeline = ClassConditionalPipeline.from_pretrained(folder)
        assert list(pipeline.known_classes.values()) == names
        images = pipeline(class_labels=names, num_inference_steps=2, output_type="np").images
        assert images.shape[:3] == (len(names), 8, 8)
        with Image.open(plain_run / "samples" / f"{folder.name}.png") as grid:
            sizes.append(grid.size)
    # As wide as ever, and a row a class.
    assert sizes[0][0] == sizes[1][0] and sizes[1][1] == pytest.approx(2 * sizes[0][1], rel=0.1)
    with pytest.raises(ValueError, match="Known .*: 0: '0', 1: '1'$"):
        ClassConditionalPipeline.from_pretrained(plain_run / "task-00")(class_labels="2", num_inference_steps=2)


def test_golden_losses(plain_run):
    # Sums are taken in another order on another machine: 1e-4 holds over ten steps, a changed draw moves 1e-1.
    losses = [line["loss"] for line in read_log(plain_run)]
    np.testing.assert_allclose(losses, np.loadtxt(GOLDEN_LOSSES), rtol=1e-4)


def test_evaluating_does_not_move_training(plain_run, files, tmp_path):
    assert run(arguments(files, tmp_path / "run", eval_images_per_class=6, eval_num_inference_steps=3)) == 0
    assert read_log(tmp_path / "run") == read_log(plain_run)
    assert load_file(tmp_path / "run" / "task-01" / UNET)["conv_in.weight"].equal(
        load_file(plain_run / "task-01" / UNET)["conv_in.weight"]
    )
    assert read_json(tmp_path / "run" / "metrics.json")["num_images"] == [[12], [12, 12]]


def test_two_processes_sample_and_measure_the_same(plain_run, files, tmp_path):
    """Two processes take over when task 0 is trained: evaluation, Fisher and replay are theirs, the model is the same."""
    output_dir = interrupted_copy(plain_run, tmp_path / "run", 5, 0, False)
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    process = start(files, arguments(files, output_dir, "--allow_inexact"), launcher)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    record = read_json(output_dir / "run.json")
    assert record["processes"] == 2 and record["inexact"] == [{"key": "processes", "before": 1, "now": 2}]
    one, other = load_file(output_dir / "task-00" / UNET), load_file(plain_run / "task-00" / UNET)
    assert all(one[name].equal(other[name]) for name in other)
    replayed = [load_file(folder / "replay" / "task-01" / "images.safetensors") for folder in (output_dir, plain_run)]
    assert replayed[0]["images"].equal(replayed[1]["images"]) and len(replayed[0]["images"]) == 4
    grids = [(folder / "samples" / "task-00.png").read_bytes() for folder in (output_dir, plain_run)]
    assert grids[0] == grids[1]
    rows = [read_json(f / "task-00" / "consolidation" / "state.json")["rows"] for f in (output_dir, plain_run)]
    assert rows[0] == rows[1]
    # Each process sums its part of the draws: the order of the sum differs.
    fishers = [
        load_file(folder / "task-00" / "consolidation" / "ewc.safetensors") for folder in (output_dir, plain_run)
    ]
    assert fishers[0].keys() == fishers[1].keys()
    for name, expected in fishers[1].items():
        scale = max(expected.double().abs().max().item(), 1e-30) if expected.numel() else 1.0
        torch.testing.assert_close(fishers[0][name], expected, rtol=1e-5, atol=1e-5 * scale, equal_nan=True)


def test_ema_is_published_and_the_schedule_counts_optimizer_steps(tmp_path_factory):
    folder = finished_run(tmp_path_factory, "everything", **EVERYTHING)
    for task in range(2):
        published = load_file(folder / f"task-{task:02d}" / UNET)
        ema = load_file(folder / f"checkpoint-{5 * task + 5}" / "ema.safetensors")
        trained = load_file(folder / f"checkpoint-{5 * task + 5}" / "model.safetensors")
        assert all(published[name].equal(ema[name]) for name in ema)
        assert not published["conv_in.weight"].equal(trained["conv_in.weight"])
    log = read_log(folder)
    # Two batches a step; one step of warm-up, then a cosine over the other four.
    expected = [0] + [0.5 * (1 + math.cos(math.pi * step / 4)) * 1e-3 for step in range(4)]
    assert [line["lr"] for line in log] == pytest.approx(2 * expected)
    assert [line["step"] for line in log] == list(range(1, 11))
    assert all("penalty" in line and "ema_decay" in line for line in log)
    assert log[0]["penalty"] == 0 and log[-1]["penalty"] > 0


def test_joint(files, tmp_path):
    settings = {"stream": "joint", "replay": "none", "penalty": "none", "max_train_steps": "[1, 2]"}
    assert run(arguments(files, tmp_path / "run", **settings)) == 0
    assert [path.name for path in (tmp_path / "run").glob("task-*")] == ["task-00"]
    assert [line["step"] for line in read_log(tmp_path / "run")] == [1, 2, 3]
    metrics = read_json(tmp_path / "run" / "metrics.json")
    for metric in metrics["metrics"].values():
        assert [len(row) for row in metric["matrix"]] == [2]
        assert metric["forgetting"] is None and metric["learning"] is None
    pipeline = ClassConditionalPipeline.from_pretrained(tmp_path / "run" / "task-00")
    assert list(pipeline.known_classes.values()) == ["0", "1", "2", "3"]


def test_cumulative(files, tmp_path, caplog):
    settings = {"stream": "cumulative", "replay": "none", "penalty": "none", "max_train_steps": 1}
    assert run(arguments(files, tmp_path / "run", **settings)) == 0
    num_images = [
        int(m.rsplit("= ", 1)[1]) for m in caplog.messages if m.strip().startswith("[RANK 0]   Num examples")
    ]
    if not num_images:
        num_images = [int(m.rsplit("= ", 1)[1]) for m in caplog.messages if "  Num examples = " in m]
    # Of the digits' training split, 288 images show a 0 or 1, and as many a 2 or 3.
    assert num_images == [288, 576]
    assert [len(row) for row in read_json(tmp_path / "run" / "metrics.json")["num_images"]] == [1, 2]


def test_a_non_finite_loss_stops_the_run(files, tmp_path, capfd):
    settings = {"learning_rate": 1e30, "lr_scheduler": "constant", "replay": "none", "penalty": "none"}
    assert run(arguments(files, tmp_path / "run", **settings)) == 5
    error = capfd.readouterr().err
    assert "error: step 1: loss nan" in error and "(task 0, phase train)" in error and "Traceback" not in error
    status = read_json(tmp_path / "run" / "status.json")
    assert status["exit_code"] == 5 and "step 1: loss nan" in status["message"]
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-1"]
    verify_folder(tmp_path / "run" / "checkpoint-1")


@pytest.mark.parametrize("refresh", ["once", "latest"])
def test_replay_refresh(tmp_path, refresh):
    accelerator, levels = Accelerator(cpu=True), itertools.count(1)
    asked = []

    def sample(labels, keys):
        asked.append(list(zip(labels, keys, strict=True)))
        return torch.full((len(labels), 1, 2, 2), next(levels), dtype=torch.uint8)

    def replay(task, teacher="first", warn=pytest.fail):
        images, labels, generated = replay_images_for_task(
            tmp_path, task, [[4, 0], [2], [1]], 3, refresh, sample, accelerator, warn, teacher
        )
        assert labels.bincount().tolist() == [
            3 if c in [[4, 0], [2], [1]][0] + [2] * (task > 1) else 0 for c in range(5)
        ]
        return images[:, 0, 0, 0].tolist(), labels.tolist(), generated

    assert replay(1) == ([1] * 6, [4, 4, 4, 0, 0, 0], 6)
    # What a run that goes on finds is not generated again.
    assert replay(1) == ([1] * 6, [4, 4, 4, 0, 0, 0], 0)
    images, labels, generated = replay(2)
    assert labels == [4, 4, 4, 0, 0, 0, 2, 2, 2]
    assert (images, generated) == (
        {"once": [1] * 6 + [2] * 3, "latest": [2] * 9}[refresh],
        {"once": 3, "latest": 9}[refresh],
    )
    assert [path.name for path in (tmp_path / "replay").iterdir()] == ["task-02"]
    # Noise differs between tasks, classes and images.
    keys = [key for call in asked for _, key in call]
    assert len(set(keys)) == len(keys) and all(key[0] == "replay" for key in keys)
    # What another model has drawn is not used; and what `once` keeps is gone with the task before.
    warnings = []
    assert replay(2, "second", warnings.append)[2] == 9
    assert "another model" in warnings[0] and ("is gone" in warnings[-1]) == (refresh == "once")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        assert run(arguments(tiny_files(folder / "tiny"), folder / "run")) == 0
        GOLDEN_LOSSES.parent.mkdir(exist_ok=True)
        GOLDEN_LOSSES.write_text("".join(f"{line['loss']:.8f}\n" for line in read_log(folder / "run")))
        print(GOLDEN_LOSSES.read_text())
