"""
Kills before every change that a publication makes to the disk. Run as a script it loads no torch, so that its forks are
cheap.
"""

import contextlib
import itertools
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from diffusers_cl.files import publish_folder, recover, remove_folder, verify_folder


def killed(action: Callable[[], object], point: int) -> bool:
    """Runs an action in a process that is killed right before its `point`-th change to the disk; returns whether it was."""

    def before_change(event: str, arguments: tuple) -> None:
        nonlocal point
        writes = event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
        if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            if point == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            point -= 1

    child = os.fork()
    if child == 0:
        sys.addaudithook(before_change)
        with contextlib.suppress(BaseException):
            action()
            os._exit(0)
        os._exit(1)
    status = os.waitpid(child, 0)[1]
    assert os.WIFSIGNALED(status) or status == 0, "the action failed"
    return os.WIFSIGNALED(status)


def _text(path: Path) -> str | None:
    """The content of a published folder, which is the same in both of its files; `None` where it is not there."""
    if not path.exists():
        return None
    verify_folder(path)
    first, second = ((path / name).read_text() for name in "ab")
    return first if first == second else f"{first} and {second}"


def kill_all(folder: Path, count: int, seed: int) -> dict:
    """As [`kill_points`], in this process."""
    rng, tried, missed = random.Random(seed), {"publish": 0, "replace": 0, "remove": 0}, []

    def publish(path: Path, content: str) -> None:
        publish_folder(path, lambda partial: [(partial / name).write_text(content) for name in "ab"])

    for number in itertools.count():
        for case in tried:
            for point in itertools.count():
                work = folder / f"{number}-{case}-{point}"
                path = work / "task-00"
                work.mkdir()
                if case != "publish":
                    publish(path, "old")
                if not killed(lambda: remove_folder(path) if case == "remove" else publish(path, "new"), point):  # noqa: B023
                    break
                tried[case] += 1
                # The recovery is killed, too, and then once more.
                for _ in range(2):
                    killed(lambda: recover(work), rng.randrange(4))  # noqa: B023
                before = {entry.name for entry in work.iterdir()}
                # A run that went on without a recovery would lose nothing either.
                if rng.random() < 0.5:
                    recover(work)
                    allowed = {"publish": (None, "new"), "replace": ("old", "new"), "remove": ("old", None)}[case]
                else:
                    publish(path, "newer")
                    recover(work)
                    allowed = ("newer",)
                if _text(path) not in allowed or [entry for entry in work.iterdir() if entry != path]:
                    missed.append(f"{case} killed before change {point}, which left {sorted(before)}: {_text(path)}")
                if sum(tried.values()) == count:
                    return {"tried": count, "whole": count - len(missed), "missed": missed, "of": tried}
    raise AssertionError("unreachable")


def kill_points(folder: Path, count: int = 100, seed: int = 0) -> dict:
    """Kills a publication, a replacement and a deletion before every change to the disk, then their recovery twice."""
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    command = [sys.executable, __file__, str(folder), str(count), str(seed)]
    return json.loads(subprocess.run(command, env=environment, check=True, capture_output=True).stdout)


if __name__ == "__main__":
    print(json.dumps(kill_all(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
