"""What surviving costs: the seconds that a run of configs/digits.yaml spends on it, as a share of all its seconds."""

import json
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from kill_harness import environment_of
from script_helpers import ROOT, tiny_files


# Two tasks of the preset, at its interval of checkpoints.
COMMAND = [
    "--config",
    str(ROOT / "configs" / "digits.yaml"),
    "--classes_per_task",
    "null",
    "--tasks",
    "[[0, 1], [2, 3]]",
]


def measure(output_dir: str) -> dict:
    """Runs the preset in this process and returns its seconds, and those of each thing that is there for surviving."""
    import train_continual
    from diffusers_cl.shards import Shards
    from diffusers_cl.signals import StopSignals

    seconds: Counter = Counter()

    def timed(holder, name: str) -> None:
        function = getattr(holder, name)

        def call(*args, **kwargs):
            began = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[name] += time.perf_counter() - began

        setattr(holder, name, call)

    for name in (
        "scan",
        "check_output_dir",
        "prepare_output_dir",
        "find_resume_point",
        "check_inputs",
        "collect_inputs",
    ):
        timed(train_continual, name)
    for name in ("check_finite", "save_checkpoint"):
        timed(train_continual, name)
    for name in ("save", "load"):
        timed(Shards, name)
    timed(StopSignals, "__enter__")
    began = time.perf_counter()
    code = train_continual.run([*COMMAND, "--output_dir", output_dir])
    return {"exit_code": code, "seconds": time.perf_counter() - began, "of_these": dict(seconds)}


def cost(folder: Path, count: int = 1, seed: int = 0) -> dict:
    """
    Measures a run of the preset.

    Returns:
        `dict`: its seconds, the share in percent that went into surviving, by what it was, and problems.
    """
    files = tiny_files(folder / "tiny")
    ended = subprocess.run(
        [sys.executable, __file__, str(folder / "digits")], env=environment_of(files), capture_output=True, text=True
    )
    measured = json.loads(ended.stdout.strip().splitlines()[-1])
    total, parts = measured["seconds"], measured["of_these"]
    return {
        "seconds": round(total, 1),
        "percent": round(100 * sum(parts.values()) / total, 2),
        "percent_by_part": {name: round(100 * part / total, 3) for name, part in parts.items()},
        "problems": [] if measured["exit_code"] == 0 else [ended.stderr[-1000:]],
    }


if __name__ == "__main__":
    print(json.dumps(measure(sys.argv[1])))
