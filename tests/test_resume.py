"""A run that was interrupted anywhere and started again ends, to the bit, as one that was not."""

import json
import shutil
import signal
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from script_helpers import EVERYTHING, arguments, finished_run, interrupted_copy, read_log, run, start


VARIANTS = {"plain": {}, "everything": EVERYTHING}


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    """Returns the folder of the uninterrupted run of a variant, with all its checkpoints: steps 1-5 and 6-10."""
    return lambda variant: finished_run(tmp_path_factory, variant, **VARIANTS[variant])


def assert_equal_runs(output_dir: Path, whole: Path, penalty: bool = True) -> None:
    for task in sorted(folder.name for folder in whole.glob("task-*")):
        for name in ("unet/diffusion_pytorch_model.safetensors", *["consolidation/ewc.safetensors"] * penalty):
            one, other = load_file(output_dir / task / name), load_file(whole / task / name)
            assert one.keys() == other.keys()
            different = [key for key in one if not one[key].equal(other[key])]
            assert not different, f"{task}/{name}: {different[:3]}"
    assert (output_dir / "metrics.json").read_bytes() == (whole / "metrics.json").read_bytes()
    assert (output_dir / "samples" / "task-01.png").read_bytes() == (whole / "samples" / "task-01.png").read_bytes()
    assert (output_dir / "report.md").exists() and (output_dir / "plots" / "nearest.png").exists()


@pytest.mark.parametrize(
    ("variant", "last_step", "num_tasks", "replay"),
    [
        pytest.param("plain", 0, 0, False, id="before-the-first-checkpoint"),
        pytest.param("plain", 2, 0, False, id="in-task-0"),
        pytest.param("plain", 5, 0, False, id="task-0-trained-not-published"),
        pytest.param("plain", 5, 1, True, id="task-0-published-replay-generated"),
        pytest.param("plain", 8, 1, False, id="in-task-1-replay-lost"),
        pytest.param("plain", 10, 1, True, id="task-1-trained-not-published"),
        pytest.param("everything", 1, 0, False, id="everything-in-task-0"),
        pytest.param("everything", 5, 0, False, id="everything-task-0-trained-not-published"),
        pytest.param("everything", 9, 1, True, id="everything-in-task-1"),
    ],
)
def test_an_interrupted_run_ends_like_one_that_was_not(
    whole_run, files, tmp_path, variant, last_step, num_tasks, replay
):
    whole = whole_run(variant)
    output_dir = interrupted_copy(whole, tmp_path / "run", last_step, num_tasks, replay)
    steps = len(read_log(output_dir))
    assert run(arguments(files, output_dir, **VARIANTS[variant])) == 0
    # It went on: only the missing steps were trained.
    assert len(read_log(output_dir)) == steps + 10 - last_step
    assert_equal_runs(output_dir, whole)


def start_until(files, command: list[str], checkpoint: Path):
    """Returns the process of a run that has just published a checkpoint."""
    process = start(files, command)
    deadline = time.monotonic() + 120
    while not checkpoint.exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    return process


def test_interrupted_by_hand(files, tmp_path):
    output_dir = tmp_path / "run"
    process = start_until(files, arguments(files, output_dir, max_train_steps=2000), output_dir / "checkpoint-1")
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130, errors[-2000:]
    assert "Traceback" not in errors
    status = json.loads((output_dir / "status.json").read_text())
    assert status["exit_code"] == 130 and "goes on" in status["message"]


def test_a_finished_run_is_left_alone(whole_run, files, tmp_path, capfd):
    output_dir = tmp_path / "run"
    shutil.copytree(whole_run("plain"), output_dir)
    before = {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()}
    assert run(arguments(files, output_dir)) == 0
    assert "finished" in capfd.readouterr().out
    after = {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()}
    changed = {path.name for path in before.keys() | after.keys() if before.get(path) != after.get(path)}
    assert changed <= {"status.json", ".lock"}


def test_resume_from_checkpoint_goes_back(whole_run, files, tmp_path):
    whole, output_dir = whole_run("plain"), tmp_path / "run"
    shutil.copytree(whole, output_dir)
    (output_dir / "checkpoint-9" / "planted").write_text("of the attempt that is given up")
    steps = len(read_log(output_dir))
    checkpoint = output_dir / "checkpoint-3"
    assert run(arguments(files, output_dir, resume_from_checkpoint=checkpoint)) == 0
    # The rest of task 0, then all of task 1.
    assert [line["step"] for line in read_log(output_dir)[steps:]] == [4, 5, 6, 7, 8, 9, 10]
    assert_equal_runs(output_dir, whole)
    assert not (output_dir / "checkpoint-9" / "planted").exists()


def test_a_damaged_newest_checkpoint_is_passed_over(whole_run, files, tmp_path, caplog):
    whole = whole_run("plain")
    output_dir = interrupted_copy(whole, tmp_path / "run", 9, 1, True)
    file = output_dir / "checkpoint-9" / "optimizer.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    steps = len(read_log(output_dir))
    assert run(arguments(files, output_dir)) == 0
    assert [line["step"] for line in read_log(output_dir)[steps:]] == [9, 10]
    assert any("checkpoint-9" in message and "damaged" in message for message in caplog.messages)
    assert_equal_runs(output_dir, whole)


@pytest.mark.parametrize("damage", ["truncated", "missing"])
def test_a_damaged_task_folder_stops_the_run(whole_run, files, tmp_path, capfd, damage):
    output_dir = interrupted_copy(whole_run("plain"), tmp_path / "run", 5, 1, False)
    file = output_dir / "task-00" / "unet" / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    file.unlink()
    if damage == "truncated":
        file.write_bytes(content[:-10])
    assert run(arguments(files, output_dir)) == 4
    assert file.name in capfd.readouterr().err
    status = json.loads((output_dir / "status.json").read_text())
    assert status["exit_code"] == 4 and file.name in status["message"]


def test_the_task_folder_is_written_last(whole_run):
    # Once it is there, the task counts as finished and nothing about it is written again.
    output_dir = whole_run("plain")
    published = (output_dir / "task-01" / "consolidation" / "manifest.json").stat().st_mtime_ns
    for name in ("metrics.json", "report.md", "samples/task-01.png", "plots/nearest.png", "plots/losses.png"):
        assert (output_dir / name).stat().st_mtime_ns <= published, name


def test_a_checkpoint_that_is_not_there(whole_run, files, tmp_path, capfd):
    output_dir = interrupted_copy(whole_run("plain"), tmp_path / "run", 2, 0, False)
    missing = output_dir / "checkpoint-99"
    assert run(arguments(files, output_dir, resume_from_checkpoint=missing)) == 4
    assert str(missing) in capfd.readouterr().err


def test_operational_keys_may_change_and_others_may_not(whole_run, files, tmp_path, capfd):
    whole = whole_run("plain")
    output_dir = interrupted_copy(whole, tmp_path / "run", 8, 1, True)
    assert run(arguments(files, output_dir, learning_rate=5e-4)) == 2
    error = capfd.readouterr().err
    assert "learning_rate" in error and "0.0005" in error and "0.001" in error
    changed = {"checkpointing_steps": 4, "checkpoints_total_limit": 1, "dataloader_num_workers": 1}
    assert run(arguments(files, output_dir, **changed)) == 0
    assert_equal_runs(output_dir, whole)
    # Two are kept, whatever the limit: the newest may turn out to be damaged.
    assert {path.name for path in output_dir.glob("checkpoint-*")} == {"checkpoint-8", "checkpoint-10"}
