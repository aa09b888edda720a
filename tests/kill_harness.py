"""A run that is killed and started again, many times in little time, and what has to be there after each kill."""

import json
import os
import subprocess
import sys
from pathlib import Path

from diffusers_cl.checkpoint import list_checkpoints
from diffusers_cl.errors import CheckpointError
from diffusers_cl.files import file_sha256, verify_folder
from diffusers_cl.folders import CONSOLIDATION, tasks_of_run


SERVER = Path(__file__).with_name("kill_server.py")
# In the order of a task.
PHASES = ("replay", "train", "fisher", "evaluate", "publish")


class KillServer:
    """
    A process that has imported torch and forks a run whenever it is asked.

    Args:
        environment (`dict`): of the runs.
        log (`Path`): what they print is appended to it.
    """

    def __init__(self, environment: dict[str, str], log: Path):
        self.log, self.where = log, log.with_suffix(".phase")
        self.process = subprocess.Popen(
            [sys.executable, str(SERVER)],
            env={**environment, "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
            cwd=SERVER.parents[1],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert json.loads(self.process.stdout.readline())["ready"]

    def __enter__(self) -> "KillServer":
        return self

    def __exit__(self, *exception) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def run(self, arguments: list[str], processes: int = 1, rank: int = 0, **plan) -> list[int]:
        """
        Runs the script and returns the exit status of each process, negative for a signal.

        Args:
            arguments (list of `str`): of the script.
            processes (`int`): how many share the run.
            rank (`int`): which of them the plan is for.
            plan: when to send which `signal` (SIGKILL): see [`kill_server.watch`].
        """
        request = {"arguments": arguments, "processes": processes, "rank": rank, "plan": plan}
        request |= {"log": str(self.log), "where": str(self.where)}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        answer = json.loads(self.process.stdout.readline())
        self.seconds = answer["seconds"]
        return answer["statuses"]

    def phase(self) -> str:
        """Returns the phase that the last run ended in: `start` before the first, `between` them, or one of `PHASES`."""
        return self.where.read_text() or "between"

    def tail(self, length: int = 3000) -> str:
        """Returns the last that the runs have printed."""
        return self.log.read_text(errors="replace")[-length:]


def fingerprints(output_dir: Path) -> dict[str, str]:
    """
    Returns the sha256 of all that a finished run must agree in: every file of its task folders (weights, Fisher, state,
    card) and of its last checkpoint (weights, moments, EMA), the replayed images, and the metrics.
    """
    found = {"metrics.json": file_sha256(output_dir / "metrics.json")}
    folders = [*tasks_of_run(output_dir), *list_checkpoints(output_dir)[:1], *(output_dir / "replay").glob("task-*")]
    for folder in folders:
        for file in sorted(path for path in folder.rglob("*") if path.is_file()):
            found[str(file.relative_to(output_dir))] = file_sha256(file)
    return found


class Survivors:
    """What a run has published until now: nothing of it may be lost by a kill."""

    def __init__(self, output_dir: Path):
        self.output_dir, self.known = output_dir, set()

    def lost(self) -> list[str]:
        """Returns the task folders and checkpoints that were there before and are not, or not whole."""
        lost = []
        for folder in [*tasks_of_run(self.output_dir), *list_checkpoints(self.output_dir)]:
            self.known.add(folder.name)
        for name in sorted(self.known):
            try:
                verify_folder(self.output_dir / name, CONSOLIDATION if name.startswith("task-") else ".")
            except CheckpointError as error:
                lost.append(str(error))
        return lost


def leftovers(output_dir: Path) -> list[str]:
    """Returns the names of half-written files and folders in a run's folder."""
    marks = (".partial", ".replaced", ".removed")
    return [str(path) for path in output_dir.rglob(".*") if any(mark in path.name for mark in marks)]


def environment_of(files: Path) -> dict[str, str]:
    """Returns the environment of the runs."""
    from script_helpers import environment

    return {**environment(files), "PYTHONPATH": os.pathsep.join(sys.path)}
