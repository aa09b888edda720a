"""The first signal lets a step end, the second ends the process; a launcher's death ends it too."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import diffusers_cl
from diffusers_cl.signals import EXIT_CODES


ROOT = Path(diffusers_cl.__file__).parents[1]
SCRIPT = """
import os, sys, time
from diffusers_cl.signals import Interrupted, StopSignals, end_with_the_launcher
with StopSignals() as stop:
    try:
        {body}
    except Interrupted as error:
        stop.ignore()
        print("ended", error.exit_code, flush=True)
        sys.exit(error.exit_code)
"""
# A step of half a second in which a signal is only noted.
DEFERRED = """
        with stop.deferred():
            print("ready", flush=True)
            time.sleep(0.5)
            print("step", flush=True)
            stop.check()
            print("another step", flush=True)
"""
AT_ONCE = """
        print("ready", flush=True)
        time.sleep(60)
"""


def start(body: str, **environment: str) -> subprocess.Popen:
    """Returns a process that has installed its handlers and is in `body`."""
    process = subprocess.Popen(
        [sys.executable, "-c", SCRIPT.format(body=body.strip())],
        cwd=ROOT,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs, and so their children, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout.readline() == "ready\n", process.communicate()
    return process


@pytest.mark.parametrize("number", list(EXIT_CODES), ids=lambda number: number.name)
@pytest.mark.parametrize("body", [DEFERRED, AT_ONCE], ids=["deferred", "at-once"])
def test_the_first_signal(number, body):
    process = start(body)
    process.send_signal(number)
    output, errors = process.communicate(timeout=10)
    # The step was finished, the next one not begun.
    assert output == ("step\n" if body is DEFERRED else "") + f"ended {EXIT_CODES[number]}\n"
    assert process.returncode == EXIT_CODES[number] and "Traceback" not in errors
    assert ("second signal" in errors) == (body is DEFERRED)


def test_a_second_signal_ends_at_once():
    process = start(DEFERRED)
    process.send_signal(signal.SIGTERM)
    # Read by the process before the next one is sent.
    assert "second signal" in process.stderr.readline()
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 143 and "step" not in output


def test_what_a_launcher_passes_on_is_no_second_signal():
    process = start(DEFERRED, ACCELERATE_MIXED_PRECISION="no")
    for _ in range(3):
        process.send_signal(signal.SIGINT)
        time.sleep(0.05)
    output, _ = process.communicate(timeout=10)
    assert output == "step\nended 130\n" and process.returncode == 130


def test_what_was_ignored_stays_ignored():
    script = 'import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN); print("ready", flush=True)'
    process = subprocess.Popen(
        [sys.executable, "-c", script + SCRIPT.format(body="time.sleep(0.5); print('done', flush=True)")],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
    )
    process.stdout.readline()
    process.send_signal(signal.SIGHUP)
    output, _ = process.communicate(timeout=10)
    assert output == "done\n" and process.returncode == 0


@pytest.mark.parametrize("launched", [True, False])
def test_the_end_of_a_launcher(launched, tmp_path):
    """A launcher that is killed takes its process along; a person's shell does not."""
    child = f"""
import os
{"os.environ['TORCHELASTIC_RUN_ID'] = '1'" if launched else ""}
from diffusers_cl.signals import StopSignals, end_with_the_launcher
import time
end_with_the_launcher()
with StopSignals():
    try:
        open({str(tmp_path / "pid")!r}, "w").write(str(os.getpid()))
        time.sleep(1.5)
    finally:
        open({str(tmp_path / "ended")!r}, "w").write(str(time.monotonic()))
"""
    (tmp_path / "child.py").write_text(child)
    environment = {key: value for key, value in os.environ.items() if not key.startswith("TORCHELASTIC")}
    launcher = subprocess.Popen(
        [
            sys.executable,
            "-c",
            f"import subprocess, sys; subprocess.run([sys.executable, {str(tmp_path / 'child.py')!r}])",
        ],
        env={**environment, "PYTHONPATH": str(ROOT)},
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 10
    while not (tmp_path / "pid").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.1)
    launcher.kill()
    launcher.wait()
    killed = time.monotonic()
    while not (tmp_path / "ended").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    assert (float((tmp_path / "ended").read_text()) - killed < 0.8) == launched


def test_the_script_watches_its_launcher_before_it_imports_anything_heavy():
    source = (ROOT / "train_continual.py").read_text()
    watching, *imports = (
        source.index(line) for line in ("    end_with_the_launcher()\n", "import torch\n", "import datasets\n")
    )
    assert watching < min(imports)
