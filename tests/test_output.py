"""The output folder belongs to one run at a time, and says who has it."""

import json
import os
import subprocess
import sys

import pytest

from diffusers_cl.config import TrainingConfig
from diffusers_cl.errors import ConfigError, FolderInUseError
from diffusers_cl.output import OutputLock, check_output_dir, prepare_output_dir, write_status


def test_a_second_run_is_told_who_has_the_folder(tmp_path):
    with OutputLock() as lock, OutputLock() as other:
        lock.acquire(tmp_path)
        lock.acquire(tmp_path)
        with pytest.raises(FolderInUseError, match=f"{tmp_path} is in use by process {os.getpid()} on "):
            other.acquire(tmp_path)
        assert lock.held and not other.held
        lock.release()
        other.acquire(tmp_path)
        assert other.held


def test_the_lock_goes_with_its_process_and_not_with_its_workers(tmp_path):
    """A killed run leaves workers behind for seconds; the next run must not wait for them."""
    script = f"""
import os, signal, time
from pathlib import Path
from diffusers_cl.output import OutputLock
lock = OutputLock()
lock.acquire(Path({str(tmp_path)!r}))
if os.fork() == 0:
    time.sleep(30)
os.kill(os.getpid(), signal.SIGKILL)
"""
    process = subprocess.Popen([sys.executable, "-c", script], start_new_session=True)
    assert process.wait(60) == -9
    with OutputLock() as lock:
        lock.acquire(tmp_path)
        assert lock.held
    os.killpg(process.pid, 9)


def test_only_the_main_process_locks(tmp_path, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    with OutputLock() as lock:
        lock.acquire(tmp_path)
        assert not lock.held and not any(tmp_path.iterdir())


def test_secrets_are_not_in_the_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["train_continual.py", "--hub_token", "hf_canary", "--seed", "1"])
    with OutputLock() as lock:
        lock.acquire(tmp_path)
        content = (tmp_path / ".lock").read_text()
    assert "--seed 1" in content and "canary" not in content


@pytest.mark.parametrize("left", [[], [".lock"], [".lock", ".config.yaml.partial"]])
def test_what_a_kill_leaves_before_the_first_file_is_no_obstacle(tmp_path, left):
    for name in left:
        (tmp_path / name).write_text("half")
    config = TrainingConfig(output_dir=str(tmp_path))
    with OutputLock() as lock:
        check_output_dir(config, lock)
        prepare_output_dir(config, lock)
        # It is this run's now, and stays so.
        check_output_dir(config, lock)
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "config.yaml", "logs", "samples"}


def test_overwriting_that_is_killed_can_be_repeated(tmp_path, monkeypatch):
    config = TrainingConfig(output_dir=str(tmp_path / "run"))
    with OutputLock() as lock:
        prepare_output_dir(config, lock)
    (tmp_path / "run" / "task-00").mkdir()
    (tmp_path / "run" / "zzz").write_text("last by name")
    overwriting = TrainingConfig(output_dir=str(tmp_path / "run"), overwrite_output_dir=True, seed=1)
    real, removed = type(tmp_path).unlink, []

    def unlink(path, missing_ok=False):
        if path.name != "status.json":
            removed.append(path.name)
            if len(removed) == 1:
                raise InterruptedError("killed")
        real(path, missing_ok)

    monkeypatch.setattr(type(tmp_path), "unlink", unlink)
    for _ in range(2):
        with OutputLock() as lock:
            check_output_dir(overwriting, lock)
            if not removed:
                with pytest.raises(InterruptedError):
                    prepare_output_dir(overwriting, lock)
                continue
            prepare_output_dir(overwriting, lock)
    assert "seed: 1" in (tmp_path / "run" / "config.yaml").read_text()
    assert not (tmp_path / "run" / "task-00").exists() and not (tmp_path / "run" / "zzz").exists()


def test_a_folder_with_only_a_foreign_lock_is_still_refused(tmp_path):
    (tmp_path / ".lock").write_text("")
    (tmp_path / "notes.txt").write_text("mine")
    with OutputLock() as lock, pytest.raises(ConfigError, match="not a run's"):
        check_output_dir(TrainingConfig(output_dir=str(tmp_path)), lock)


def status_command(tmp_path, monkeypatch, *arguments: str, **environment: str) -> str:
    """The command that status.json of a run with these arguments says."""
    monkeypatch.setattr(sys, "argv", ["train_continual.py", *arguments])
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "config.yaml").write_text("")
    write_status(tmp_path, 143, "interrupted")
    return json.loads((tmp_path / "status.json").read_text())["command"]


@pytest.mark.parametrize(
    "way", [["--overwrite_output_dir", "true"], ["--overwrite_output_dir"], ["--hub_token", "hf_x"]]
)
def test_the_command_to_go_on_neither_starts_over_nor_tells_secrets(tmp_path, monkeypatch, way):
    found = status_command(tmp_path, monkeypatch, *way, "--resume_from_checkpoint=x", "--seed", "1")
    assert found == "accelerate launch train_continual.py --seed 1"


def test_the_command_to_go_on_has_as_many_processes(tmp_path, monkeypatch):
    launched = {"TORCHELASTIC_RUN_ID": "1", "LOCAL_WORLD_SIZE": "2", "ACCELERATE_USE_CPU": "1"}
    found = status_command(tmp_path, monkeypatch, "--seed", "1", **launched)
    assert found == "ACCELERATE_USE_CPU=1 torchrun --nproc_per_node 2 train_continual.py --seed 1"


def test_a_killed_run_does_not_keep_the_status_of_the_one_before(tmp_path):
    config = TrainingConfig(output_dir=str(tmp_path))
    with OutputLock() as lock:
        prepare_output_dir(config, lock)
        write_status(tmp_path, 130, "interrupted")
        prepare_output_dir(config, lock)
        assert not (tmp_path / "status.json").exists()
