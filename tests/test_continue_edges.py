"""Going on where something is out of the ordinary: refined classes, classes without images, states that lack something."""

import json
import shutil

import datasets
import pytest
from safetensors.torch import load_file
from script_helpers import finished_run, run
from test_continue import go_on, read_json

from diffusers_cl.comparison import generated_images
from diffusers_cl.data import load_digits_dataset
from diffusers_cl.files import publish_folder
from diffusers_cl.results import check_comparable, load_run


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    return finished_run(tmp_path_factory, "plain")


def changed_copy(source, folder, change):
    """A task folder in which something else stands, with a manifest that says so."""

    def write(partial):
        shutil.copytree(source, partial, dirs_exist_ok=True)
        change(partial / "consolidation")

    publish_folder(folder, write, "consolidation")
    return folder


def test_once_generates_refined_classes_anew(plain_run, files, tmp_path):
    options = {"dataset_name": "digits", "tasks": "[[3], [4]]", "replay_refresh": "once", "cache_dir": files / "cache"}
    assert run(go_on(plain_run / "task-01", tmp_path / "run", "--allow_known_classes", **options)) == 0
    labels = load_file(tmp_path / "run" / "replay" / "task-03" / "images.safetensors")["class_labels"]
    assert sorted(labels.tolist()) == [0, 0, 1, 1, 2, 2, 3, 3]
    # Four classes from the loaded model, then the refined one once more.
    found = load_run(tmp_path / "run")
    assert generated_images(found) == 8 + 2
    state = read_json(tmp_path / "run" / "task-03" / "consolidation" / "state.json")
    assert state["dataset"] == "digits" and state["class_ids"] == {"0": 0, "1": 1, "2": 2, "3": 3, "4": 4}
    # What was measured without the old images is no row of a table.
    with pytest.raises(ValueError, match="recall is not known for all tasks"):
        check_comparable([found], "recall")
    check_comparable([found], "fd_features")


def test_a_data_set_may_name_classes_that_it_has_no_images_of(plain_run, files, tmp_path):
    digits = load_digits_dataset()["train"]
    for split, rows in (("train", range(100)), ("test", range(100, 200))):
        chosen = [row for row in rows if digits[row]["label"] in (4, 5)]
        (tmp_path / "data").mkdir(exist_ok=True)
        digits.select(chosen).to_parquet(tmp_path / "data" / f"{split}.parquet")
    assert isinstance(datasets.load_dataset(str(tmp_path / "data"))["train"].features["label"], datasets.ClassLabel)
    options = {"dataset_name": tmp_path / "data", "tasks": "[[4, 5]]", "cache_dir": files / "cache"}
    assert run(go_on(plain_run / "task-01", tmp_path / "run", **options)) == 0
    assert read_json(tmp_path / "run" / "task-02" / "consolidation" / "state.json")["dataset"] == "digits + data"


def test_a_state_that_lacks_something_is_one_sentence(plain_run, files, tmp_path, capsys):
    def state_with(**config):
        def change(kept):
            state = read_json(kept / "state.json")
            state["config"] |= config
            (kept / "state.json").write_text(json.dumps(state))

        return change

    faults = [
        (lambda kept: (kept / "ewc.safetensors").unlink(), 4, "its penalty (rank1_ewc) is not in consolidation"),
        (lambda kept: (kept / "references.safetensors").unlink(), 4, "references.safetensors cannot be read"),
        (state_with(learning_rate="abc"), 2, "learning_rate"),
        (state_with(replay="foo"), 2, "replay"),
    ]
    for number, (change, code, words) in enumerate(faults):
        start = changed_copy(plain_run / "task-01", tmp_path / str(number), change)
        options = {"dataset_name": "digits", "tasks": "[[4, 5]]", "cache_dir": files / "cache"}
        assert run(go_on(start, tmp_path / "run", **options)) == code
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("train_continual.py: error: ") and words in error
        # Nothing was written that stands in the way of a better command.
        assert not (tmp_path / "run").exists()
    options |= {"replay": "memory", "memory_bytes": 200}
    start = changed_copy(plain_run / "task-01", tmp_path / "memory", lambda kept: None)
    shutil.copy(start / "consolidation" / "ewc.safetensors", start / "consolidation" / "memory.safetensors")
    assert run(go_on(start, tmp_path / "run", **options)) == 3
    assert "memory_bytes is 200; one image of each of 6 classes takes 384" in capsys.readouterr().err
