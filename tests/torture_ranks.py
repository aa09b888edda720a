"""One of two processes under `torchrun` goes wrong: the others end too, say which, and the run goes on in the same bits."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import psutil
from kill_harness import PHASES, KillServer, environment_of
from script_helpers import arguments, tiny_files
from torture_runs import different, reference


FAULTS = ("kill", "exception", "exit", "stop")
LAUNCHER = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
SCRIPT = Path(__file__).with_name("faulty_rank.py")
# In seconds: `ddp_timeout`, and what `torchrun` gives a process that does not end.
TIMEOUT = 5
GRACE = 35
# From the start of the launcher to the fault, on a busy machine.
STARTING = 60


def _left(output_dir: Path) -> list[str]:
    """The processes that still have the run's folder on their command line."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline"]):
        if any(str(output_dir) in part for part in process.info["cmdline"] or []):
            found.append(f"process {process.info['pid']} is left")
    return found


def rank_faults(folder: Path, count: int = 20, seed: int = 0) -> dict:
    """
    Tries faults of rank 1 (killed, a bug, an early exit, stopped) in the phases of the second task.

    Returns:
        `dict`: faults tried, the longest time in seconds that a run took to end by the kind of fault, with its start, and
        problems.
    """
    files = tiny_files(folder / "tiny")
    result = {"tried": 0, "longest_seconds": dict.fromkeys(FAULTS, 0.0), "problems": []}
    # Each kind first, where not all are asked for.
    chosen = [
        (fault, PHASES[(i + shift) % len(PHASES)]) for shift in range(len(PHASES)) for i, fault in enumerate(FAULTS)
    ]
    with KillServer(environment_of(files), folder / "ranks.log") as server:
        expected = reference(server, folder, files, {}, processes=2)["fingerprints"]
        for fault, phase in chosen[:count]:
            output_dir = folder / f"{fault}-{phase}"
            command = arguments(files, output_dir)
            options = [fault, "1", phase, "1", *command, "--ddp_timeout", str(TIMEOUT)]
            began = time.monotonic()
            launched = subprocess.run(
                [sys.executable, *LAUNCHER, str(SCRIPT), *options],
                env=environment_of(files),
                capture_output=True,
                text=True,
                timeout=STARTING + TIMEOUT + GRACE,
            )
            seconds = time.monotonic() - began
            result["longest_seconds"][fault] = max(result["longest_seconds"][fault], round(seconds, 1))
            found = _left(output_dir)
            if launched.returncode == 0:
                found.append("the launcher ended with 0")
            # By those that are left, or by itself before it ends.
            said = rf"rank 1( has ended in| is stopped in| was last seen in|,) task 1, phase {phase}\b"
            if not re.search(said, launched.stderr):
                found.append(f"nothing names rank 1, task 1, phase {phase}: {launched.stderr[-1500:]}")
            again = server.run(command, processes=2)
            found += (
                different(output_dir, expected) if set(again) == {0} else [f"went on with {again}: {server.tail(500)}"]
            )
            result["tried"] += 1
            result["problems"] += [f"{fault} in {phase}: {problem}" for problem in found]
            shutil.rmtree(output_dir)
    return result
