"""
Runs the script as `torchrun` would, with one process that goes wrong: `faulty_rank.py FAULT RANK PHASE TASK [arguments]`.
"""

import contextlib
import os
import signal
import sys
from pathlib import Path


sys.path[:0] = [str(Path(__file__).parents[1])]

import train_continual  # noqa: E402 (after the path)
from diffusers_cl.record import RunRecord  # noqa: E402
from diffusers_cl.signals import end_with_the_launcher  # noqa: E402


class PlantedError(Exception):
    """Stands for a bug."""


def fail(fault: str) -> None:
    """Goes wrong in this way: `kill`, `exception`, `exit` (with 0) or `stop`."""
    if fault == "exception":
        raise PlantedError("planted")
    if fault == "exit":
        os._exit(0)
    os.kill(os.getpid(), {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}[fault])


def plant(fault: str, rank: int, phase: str, task: int) -> None:
    """Lets one process go wrong in a phase of a task."""
    entered = RunRecord.phase

    @contextlib.contextmanager
    def faulty(self, name):
        with entered(self, name):
            if (int(os.environ["RANK"]), name, self.task) == (rank, phase, task):
                fail(fault)
            yield

    RunRecord.phase = faulty


if __name__ == "__main__":
    plant(sys.argv[1], int(sys.argv[2]), sys.argv[3], int(sys.argv[4]))
    sys.argv[1:5] = []
    end_with_the_launcher()
    sys.exit(train_continual.run(sys.argv[1:]))
