"""Task folders and start.json are read only as runs write them."""

import json
import shutil

import pytest
from torture_storage import write_task

from diffusers_cl.errors import CheckpointError
from diffusers_cl.files import file_sha256, write_json
from diffusers_cl.folders import finished_tasks, read_start, read_task_state


STATE = "consolidation/state.json"


@pytest.fixture
def run(tmp_path):
    """The folder of a run with two finished tasks."""
    for task in (0, 1):
        write_task(tmp_path, task)
    return tmp_path


def rewrite(folder, **values) -> None:
    """Puts values into a task's state (`None` takes one out), and its manifest."""
    state = json.loads((folder / STATE).read_text()) | values
    (folder / STATE).write_text(json.dumps({key: value for key, value in state.items() if value is not None}))
    manifest = folder / "consolidation" / "manifest.json"
    sums = json.loads(manifest.read_text())["sha256"]
    manifest.write_text(json.dumps({"sha256": {**sums, STATE: file_sha256(folder / STATE)}}))


def test_finished_tasks(run):
    # Beside a task's files others may lie.
    (run / "task-00" / ".gitattributes").touch()
    assert [state["task"] for state in finished_tasks(run)] == [0, 1]
    assert [len(state["rows"]) for state in finished_tasks(run)] == [1, 2]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"schema": "1"}, "schema is '1'; allowed: int"),
        ({"schema": None}, "has no 'schema'"),
        ({"schema": 2, "version": "9.9"}, "was written by diffusers-cl 9.9"),
        ({"task": True}, "task is True; allowed: int"),
        ({"task": -1}, "task is -1; allowed: numbers from 0"),
        ({"task": 0}, "task-01 is task 0, by its consolidation/state.json"),
        ({"global_step": 1.5}, "global_step is 1.5; allowed: int"),
        ({"rows": {}}, "rows is {}; allowed: list"),
        ({"fisher": "x"}, "fisher is 'x'; allowed: list"),
        ({"class_ids": ["class 0"]}, r"class_ids is \['class 0'\]; allowed: dict"),
        ({"class_ids": {"class 0": 0, "class 1": "1"}}, "allowed: numbers from 0, each once"),
        ({"class_ids": {"class 0": 0, "class 1": 0}}, "allowed: numbers from 0, each once"),
        ({"class_ids": {"class 0": 0}}, "seen_classes has 'class 1', which is not in class_ids"),
        ({"seen_classes": [["class 0"]]}, r"seen_classes has \['class 0'\]"),
        ({"tasks": [["class 0"], "class 1"]}, "tasks has 'class 1'; allowed: lists of class names"),
        ({"config": []}, r"config is \[\]; allowed: dict"),
    ],
)
def test_a_state_that_no_run_writes(run, values, words):
    rewrite(run / "task-01", **values)
    for read in (lambda: read_task_state(run / "task-01"), lambda: finished_tasks(run)):
        with pytest.raises(CheckpointError, match=words):
            read()


@pytest.mark.parametrize("key", ["tasks", "seen_classes", "global_step", "rows", "fisher"])
def test_a_run_needs_more_of_its_own_tasks(run, key):
    rewrite(run / "task-01", **{key: None})
    # By itself it can be read: fetching asks for what it needs.
    assert key not in read_task_state(run / "task-01")
    with pytest.raises(CheckpointError, match=f"state.json has no '{key}'"):
        finished_tasks(run)


def test_a_folder_of_another_name_has_any_task(run):
    shutil.move(run / "task-01", run / "0123abcd")
    assert read_task_state(run / "0123abcd")["task"] == 1
    (run / "task-00").rename(run / "task-01")
    (run / "0123abcd").rename(run / "task-00")
    with pytest.raises(CheckpointError, match="task-00 is task 1"):
        finished_tasks(run)


def test_a_state_that_the_manifest_does_not_name(run):
    manifest = run / "task-01" / "consolidation" / "manifest.json"
    sums = json.loads(manifest.read_text())["sha256"]
    manifest.write_text(json.dumps({"sha256": {name: sums[name] for name in sums if name != STATE}}))
    with pytest.raises(CheckpointError, match="state.json is not in its manifest"):
        read_task_state(run / "task-01")


def test_start(tmp_path):
    assert read_start(tmp_path) is None
    start = {"task": 1, "model": "me/x", "is_repo": True, "revision": "0123", "asked": None}
    write_json(tmp_path / "start.json", start)
    assert read_start(tmp_path) == start
    for values in ({"task": "1"}, {"task": -1}, {"model": 1}, {"is_repo": "yes"}, {"revision": 1}):
        write_json(tmp_path / "start.json", start | values)
        with pytest.raises(CheckpointError, match=r"start\.json"):
            read_start(tmp_path)
    (tmp_path / "start.json").write_text("[" * 100_000)
    with pytest.raises(CheckpointError, match=r"start\.json cannot be read"):
        read_start(tmp_path)
