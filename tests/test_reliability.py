"""The short form of `make torture`, for runs: killed, told to end, spoilt, and left by a process; and by their launchers."""

import json
import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from kill_harness import environment_of
from script_helpers import ROOT, arguments
from torture_nonfinite import injections
from torture_ranks import rank_faults
from torture_runs import every_step, kills, sigterms


def test_kills(tmp_path):
    result = kills(tmp_path, 8, seed=1)
    assert result["kills"] == 8 and result["in_a_save"] > 0
    assert result["lost"] == result["failed"] == result["different"] == []


def test_killed_after_a_step_in_two_processes_with_workers(tmp_path):
    assert every_step(tmp_path, 1, variant="everything", processes=2) == {"tried": 1, "problems": []}


def test_told_to_end(tmp_path):
    result = sigterms(tmp_path, 2)
    assert result["problems"] == [] and result["steps_lost"] == 0
    assert result["exit_143"] == result["signals"] == 2


def test_not_finite(tmp_path):
    result = injections(tmp_path, 3)
    assert result["problems"] == [] and result["stopped"] == result["tried"] == 3


def test_a_process_of_two_is_killed(tmp_path):
    result = rank_faults(tmp_path, 1)
    assert result["problems"] == [] and result["tried"] == 1


LAUNCHERS = {
    "accelerate": [*("-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"), "--cpu"]
    + ["--mixed_precision", "no", "--dynamo_backend", "no"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}


@pytest.mark.parametrize("launcher", list(LAUNCHERS))
def test_a_launcher_is_told_to_end(files, tmp_path, launcher):
    """No process is left, a checkpoint is there, and status.json says how it ended."""
    command = arguments(files, tmp_path / "run", max_train_steps=100_000, checkpointing_steps=100_000)
    process = subprocess.Popen(
        [sys.executable, *LAUNCHERS[launcher], str(ROOT / "train_continual.py"), *command],
        env=environment_of(files),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    log, status = tmp_path / "run" / "logs" / "train_log.jsonl", tmp_path / "run" / "status.json"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    told = time.monotonic()
    process.wait(60)
    while _left(process.pid) and time.monotonic() < told + 60:
        time.sleep(0.1)
    assert not _left(process.pid)
    assert json.loads(status.read_text())["exit_code"] == 143
    last = json.loads(log.read_text().splitlines()[-1])["step"]
    assert (tmp_path / "run" / f"checkpoint-{last}").is_dir()


def _left(session: int) -> list[int]:
    """The processes of a session that have not ended."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == session and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except (ProcessLookupError, psutil.NoSuchProcess):
            continue
    return found
