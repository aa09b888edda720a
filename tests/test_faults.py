"""What ended a run is said in a sentence, with the exit code of its kind."""

import errno
import json
import os
import subprocess
import sys

import pytest

from diffusers_cl.errors import DataError, ProcessLostError, StorageError
from diffusers_cl.faults import explain
from diffusers_cl.processes import lost_processes, note_place, refuse_sharded_parameters
from diffusers_cl.signals import Interrupted


GLOO = "[/src/gloo/transport/tcp/pair.cc:545] Read error [127.0.0.1]:36751: Connection reset by peer. This is typically caused"


@pytest.mark.parametrize(
    ("error", "exit_code", "words"),
    [
        (DataError("the image in row 3"), 3, ["the image in row 3"]),
        (DataError("Traceback (most recent call last):\n  File\ndiffusers_cl.errors.DataError: row 3"), 3, ["row 3"]),
        (OSError(errno.ENOSPC, "No space left on device", "x/metrics.json"), 6, ["x/metrics.json", "No space left"]),
        (Interrupted(143), 143, ["interrupted", "goes on"]),
        (KeyboardInterrupt(), 130, ["interrupted", "goes on"]),
    ],
)
def test_expected_faults(error, exit_code, words):
    found, message = explain(error, None)
    assert found == exit_code and "Traceback" not in message
    assert [word for word in words if word not in message] == []


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), OSError(errno.EPERM, "no"), KeyError("x")])
def test_bugs_keep_their_traceback(error):
    assert explain(error, None) == (1, None)


def test_where_it_was_is_said():
    error = Interrupted(143)
    error.add_note("rank 1, task 0, phase train")
    assert "(rank 1, task 0, phase train)" in explain(error, None)[1]


def test_another_process_is_lost(tmp_path, monkeypatch):
    """A gloo error means nothing alone; among several processes it names those that have ended, and where they were."""
    assert explain(RuntimeError(GLOO), tmp_path) == (1, None)
    monkeypatch.setenv("WORLD_SIZE", "3")
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    for number, pid in ((0, os.getpid()), (1, ended.pid)):
        monkeypatch.setenv("RANK", str(number))
        note_place(tmp_path, 2, "fisher")
        place = json.loads((tmp_path / "logs" / f"process-{number}.json").read_text())
        (tmp_path / "logs" / f"process-{number}.json").write_text(json.dumps({**place, "pid": pid}))
    # The third has not begun, and this is the first.
    monkeypatch.setenv("RANK", "0")
    assert lost_processes(tmp_path, hanging=True) == ["rank 1 has ended in task 2, phase fisher"]
    # The first, asked about by the second, has not ended: it may hang.
    monkeypatch.setenv("RANK", "1")
    assert lost_processes(tmp_path, hanging=False) == []
    assert lost_processes(tmp_path, hanging=True) == ["rank 0 was last seen in task 2, phase fisher"]
    monkeypatch.setenv("RANK", "0")
    exit_code, message = explain(RuntimeError(GLOO), tmp_path)
    assert exit_code == ProcessLostError.exit_code == 1
    assert "another process is lost (Read error" in message and "rank 1 has ended in task 2, phase fisher" in message
    # Of an older start nothing is said.
    monkeypatch.setattr("os.getppid", lambda: -1)
    assert lost_processes(tmp_path, hanging=True) == []
    monkeypatch.undo()
    monkeypatch.setenv("WORLD_SIZE", "3")
    # A signal came first: a launcher that ends all processes.
    assert explain(RuntimeError(GLOO), tmp_path, stopped=143)[0] == 143


def test_a_full_disk_has_its_exit_code():
    assert explain(StorageError("cannot write"), None) == (6, "cannot write")


@pytest.mark.parametrize("variable", ["ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED"])
def test_split_parameters_are_refused(monkeypatch, variable):
    refuse_sharded_parameters()
    monkeypatch.setenv(variable, "true")
    with pytest.raises(Exception, match="whole parameters") as caught:
        refuse_sharded_parameters()
    assert caught.value.exit_code == 2
