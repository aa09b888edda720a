"""Every fault that a user can mend: its exit code, one message that names it, and nothing trained or overwritten."""

import json
import sys
import time
from pathlib import Path

import datasets
import numpy as np
import pytest
from PIL import Image
from script_helpers import arguments, run, start, write_images


def message_of(errors: str) -> str:
    """Returns our message: it is the last thing on stderr, three lines at most, and there is no traceback."""
    assert "Traceback" not in errors, errors[-3000:]
    _, found, message = errors.rpartition("train_continual.py: error: ")
    assert found, errors[-3000:]
    assert len(message.strip().splitlines()) <= 3, message
    return message


def assert_refused(files: Path, tmp_path: Path, capfd, exit_code: int, words: list[str], *extra, **settings) -> None:
    """Runs in a new output folder: the exit code, the words of the message, and that nothing was made."""
    output_dir = settings.pop("output_dir", tmp_path / "run")
    assert run(arguments(files, output_dir, *extra, **settings)) == exit_code
    message = message_of(capfd.readouterr().err)
    assert [word for word in words if word not in message] == []
    assert not (tmp_path / "run").exists()


# What the configuration alone shows.
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"learning_rat": 1}, ["learning_rat", "learning_rate"]),
        ({"seed": "abc"}, ["seed", "abc", "whole number"]),
        ({"stream": "parallel"}, ["stream", "parallel", "joint"]),
        ({"learning_rate": ".nan"}, ["learning_rate", "nan"]),
        ({"tasks": "[[0, 1], [1, 2]]"}, ["tasks", "'1'", "more than one"]),
        ({"tasks": "[[0], []]"}, ["tasks", "[]"]),
        ({"resolution": 9}, ["resolution", "9", "multiples of 2"]),
        ({"stream": "joint", "penalty": "none"}, ["replay", "generative_distillation", "joint"]),
        ({"stream": "cumulative", "replay": "none"}, ["penalty", "rank1_ewc", "cumulative"]),
        ({"model_config_name_or_path": "/nowhere/unet.json"}, ["model_config_name_or_path", "/nowhere/unet.json"]),
        ({"config": "/nowhere/method.yaml"}, ["/nowhere/method.yaml"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_configuration(files, tmp_path, capfd, settings, words):
    assert_refused(files, tmp_path, capfd, 2, words, **settings)


# What needs the data.
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"label_column": "labels"}, ["label_column", "'labels'", "image, label"]),
        ({"image_column": "img"}, ["image_column", "'img'", "image, label"]),
        ({"image_column": "label"}, ["image_column", "'label'"]),
        ({"tasks": "[[0], [cat]]"}, ["tasks", "'cat'", "0, 1, 2"]),
        ({"tasks": "[[0], [10]]"}, ["tasks", "10", "0, 1, 2"]),
        ({"max_train_samples": 2}, ["class", "no images", "train"]),
        ({"train_split": "training"}, ["train_split", "'training'", "train"]),
        ({"eval_split": "test"}, ["eval_split", "'test'", "train"]),
        ({"eval_split": "train"}, ["eval_split", "'train'"]),
        ({"num_class_embeds": 3}, ["num_class_embeds", "3", "4"]),
        ({"dataset_name": "nobody/nothing"}, ["nobody/nothing"]),
        ({"dataset_name": "null", "train_data_dir": "/nowhere"}, ["train_data_dir", "/nowhere"]),
        ({"feature_extractor": "/nowhere/extractor"}, ["feature_extractor", "/nowhere/extractor", "classifier"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_data(files, tmp_path, capfd, settings, words):
    assert_refused(files, tmp_path, capfd, 3, words, **settings)


def test_a_class_by_name_and_by_id(files, tmp_path, capfd):
    folder = write_images(tmp_path / "data", {"cat": 10, "dog": 10})
    settings = {"dataset_name": "null", "train_data_dir": folder, "tasks": "[[cat], [0]]"}
    assert_refused(files, tmp_path, capfd, 3, ["'cat'", "more than one"], **settings)


def test_too_few_images_to_measure(files, tmp_path, capfd):
    # A fifth of five is one, and halves of it have no covariance.
    folder = write_images(tmp_path / "data", {"0": 5, "1": 5})
    settings = {"dataset_name": "null", "train_data_dir": folder, "tasks": "[[0], [1]]"}
    assert_refused(files, tmp_path, capfd, 3, ["the task 0 has 1 image"], **settings)


def test_the_least_number_of_evaluated_images_works(files, tmp_path):
    settings = {"tasks": "[[0], [1]]", "max_train_steps": 1, "replay": "none", "penalty": "none"}
    assert run(arguments(files, tmp_path / "run", eval_images_per_class=4, **settings)) == 0
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    values = [value for metric in metrics["metrics"].values() for row in metric["matrix"] for value in row]
    assert np.isfinite(values).all()


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_corrupt_image_names_its_row(files, tmp_path, capfd, split):
    """Before the first step, although it is of the second task; truncated, it is an image by its first bytes."""
    for name in ("train", "test"):
        write_images(tmp_path / "data" / name, {"0": 10, "1": 10})
    file = tmp_path / "data" / split / "1" / "07.png"
    noise = np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    settings = {"dataset_name": "null", "train_data_dir": tmp_path / "data", "tasks": "[[0], [1]]"}
    words = ["1 of 40 images", "row 17", f"'{split}'", str(file), "truncated"]
    assert_refused(files, tmp_path, capfd, 3, words, replay="none", penalty="none", max_train_steps=1, **settings)


FOREIGN = {
    "a-file": {"notes.txt": "mine"},
    "another-program's-config": {"config.yaml": "model: resnet\n", "notes.txt": "mine"},
    "no-mapping": {"config.yaml": "- 1\n"},
    "empty-config": {"config.yaml": ""},
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("content", list(FOREIGN.values()), ids=list(FOREIGN))
def test_an_output_dir_that_is_not_a_run(files, tmp_path, capfd, content, overwrite):
    output_dir = tmp_path / "mine"
    output_dir.mkdir()
    for name, text in content.items():
        (output_dir / name).write_text(text)
    extra = ["--overwrite_output_dir"] if overwrite else []
    assert run(arguments(files, output_dir, *extra)) == 2
    message = message_of(capfd.readouterr().err)
    assert "output_dir" in message and str(output_dir) in message
    assert {path.name: path.read_text() for path in output_dir.iterdir()} == content


@pytest.mark.parametrize("below", [False, True])
def test_an_output_dir_that_is_a_file(files, tmp_path, capfd, below):
    (tmp_path / "file").write_text("mine")
    assert run(arguments(files, tmp_path / "file" / "run" if below else tmp_path / "file")) in (2, 6)
    assert str(tmp_path / "file") in message_of(capfd.readouterr().err)
    assert (tmp_path / "file").read_text() == "mine"


def test_an_output_dir_of_another_run(files, tmp_path, capfd):
    settings = {"tasks": "[[0]]", "max_train_steps": 1, "replay": "none", "penalty": "none"}
    assert run(arguments(files, tmp_path / "run", **settings)) == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    capfd.readouterr()
    assert run(arguments(files, tmp_path / "run", **settings, seed=1)) == 2
    message = message_of(capfd.readouterr().err)
    assert all(word in message for word in ("output_dir", "seed = 0", "1", "overwrite_output_dir"))
    assert {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()} == before
    assert run(arguments(files, tmp_path / "run", "--overwrite_output_dir", **settings, seed=1)) == 0
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["config"]["seed"] == 1


def test_processes_have_the_exit_code(files, tmp_path):
    """In new processes: without a network Inception's weights are refused at once, with both ways out."""
    misspelt = start(files, arguments(files, tmp_path / "run", learning_rat=1))
    begin = time.monotonic()
    offline = start(files, arguments(files, tmp_path / "run", feature_extractor="inception"))
    _, errors = misspelt.communicate(timeout=120)
    assert misspelt.returncode == 2 and "learning_rate" in message_of(errors)
    _, errors = offline.communicate(timeout=120)
    assert offline.returncode == 3 and time.monotonic() - begin < 60
    message = message_of(errors)
    assert "feature_extractor_weights_path" in message and "feature_extractor: classifier" in message
    assert not (tmp_path / "run").exists()


def test_status_has_the_command_to_go_on(files, tmp_path, capfd, monkeypatch):
    settings = {"learning_rate": 1e30, "lr_warmup_steps": 0, "replay": "none", "penalty": "none"}
    command = arguments(files, tmp_path / "run with spaces", **settings)
    monkeypatch.setattr(sys, "argv", ["train_continual.py", *command])
    assert run(command) == 5
    status = json.loads((tmp_path / "run with spaces" / "status.json").read_text())
    assert status["exit_code"] == 5 and status["message"] in message_of(capfd.readouterr().err)
    assert status["command"].startswith("accelerate launch train_continual.py --config ")
    assert f"--output_dir '{tmp_path / 'run with spaces'}'" in status["command"]


@pytest.mark.parametrize("split", ["train", "test"])
def test_a_label_out_of_range(files, tmp_path, capfd, split):
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog"])})
    images = [Image.new("L", (8, 8), 10 * i) for i in range(6)]
    (tmp_path / "data").mkdir()
    for name in ("train", "test"):
        # -1 stands for an unknown label in test splits on the Hub.
        labels = [0, 1, 0, -1 if name == split else 1, 1, 0]
        dataset = datasets.Dataset.from_dict({"image": images, "label": labels}, features=features)
        dataset.to_parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet")
    settings = {"dataset_name": tmp_path / "data", "tasks": "[[cat], [dog]]"}
    assert_refused(files, tmp_path, capfd, 3, ["row 3", f"'{split}'", "-1", "2 classes"], **settings)
