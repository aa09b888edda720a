"""Runs of two tasks that are killed wherever it hurts and started again: nothing is lost, and they end in the same bits."""

import json
import os
import random
import shutil
import signal
import tempfile
from collections import Counter
from pathlib import Path

from kill_harness import PHASES, KillServer, Survivors, environment_of, fingerprints, leftovers
from script_helpers import EVERYTHING, arguments, tiny_files


# Three batches of draws for a Fisher, so that a kill comes within one.
VARIANTS = {"plain": {}, "everything": {**EVERYTHING, "fisher_samples": 24}}
# Of a run that is killed so often that it would not end.
MOST_ATTEMPTS = 60
LONGEST_DELAY = 0.3


def reference(server: KillServer, folder: Path, files: Path, settings: dict, processes: int = 1) -> dict:
    """Returns the fingerprints of a run that nobody disturbs, and what its phases take in seconds."""
    output_dir = Path(tempfile.mkdtemp(dir=folder)) / "whole"
    command = arguments(files, output_dir, **settings)
    assert set(server.run(command, processes)) == {0}, server.tail()
    seconds = json.loads((output_dir / "run.json").read_text())["seconds"]
    return {"fingerprints": fingerprints(output_dir), "seconds": {phase: seconds[phase] / 2 for phase in PHASES}}


def different(output_dir: Path, expected: dict[str, str]) -> list[str]:
    """Returns the names of files that are not those of the run that was left alone."""
    found = fingerprints(output_dir)
    return [name for name in {**expected, **found} if expected.get(name) != found.get(name)]


def _plan(draw: random.Random, output_dir: Path, seconds: dict[str, float], wanted: Counter) -> dict:
    """A place to kill at, in a part of the run that is still to come: in the rarest phase, in a save, or anywhere."""
    kind = draw.choice(["phase"] * 3 + ["save"] * 3 + ["seconds"])
    if kind == "save":
        return {"save": draw.randint(1, 25), "delay": draw.choice([0.0, draw.uniform(0, 0.004)])}
    if kind == "seconds":
        return {"seconds": draw.uniform(0, 0.8)}
    task = 1 if (output_dir / "task-00").exists() else 0
    phase = min(PHASES[task == 0 :], key=lambda name: (wanted[name], draw.random()))
    return {"phase": phase, "task": task, "delay": draw.uniform(0, min(LONGEST_DELAY, seconds[phase]))}


def _half_written(output_dir: Path) -> set[tuple[str, int]]:
    """What is half written in a run's folder, each with the time at which it was last changed."""
    return {(name, os.stat(name).st_ctime_ns) for name in leftovers(output_dir)}


def kills(folder: Path, count: int = 200, seed: int = 0) -> dict:
    """
    Kills runs with SIGKILL until there were so many kills, and lets each run end.

    Returns:
        `dict`: kills by phase and within a save, runs, and what went wrong: finished tasks or checkpoints lost, runs that
        ended otherwise than by themselves, files that differ from those of a run that was left alone.
    """
    draw, files = random.Random(seed), tiny_files(folder / "tiny")
    result = {"kills": 0, "in_a_save": 0, "in_recovery": 0, "runs": 0, "lost": [], "failed": [], "different": []}
    phases: Counter = Counter()
    with KillServer(environment_of(files), folder / "kills.log") as server:
        references = {name: reference(server, folder, files, settings) for name, settings in VARIANTS.items()}
        while result["kills"] < count:
            variant = draw.choice(list(VARIANTS))
            output_dir = folder / f"run-{result['runs']}"
            command, survivors = arguments(files, output_dir, **VARIANTS[variant]), Survivors(output_dir)
            for attempt in range(MOST_ATTEMPTS):
                enough = result["kills"] >= count or attempt == MOST_ATTEMPTS - 1
                plan = {} if enough else _plan(draw, output_dir, references[variant]["seconds"], phases)
                before = _half_written(output_dir)
                status = server.run(command, **plan)[0]
                if status != -signal.SIGKILL:
                    break
                result["kills"] += 1
                phases[server.phase()] += 1
                result["in_a_save"] += bool(_half_written(output_dir) - before)
                result["in_recovery"] += attempt > 0 and server.phase() == "start"
                result["lost"] += survivors.lost()
            if status != 0:
                result["failed"].append({"run": result["runs"], "status": status, "printed": server.tail()})
            else:
                result["different"] += different(output_dir, references[variant]["fingerprints"])
                result["different"] += [f"left: {name}" for name in leftovers(output_dir)]
            result["runs"] += 1
            shutil.rmtree(output_dir)
    return {**result, "by_phase": dict(phases)}


def every_step(folder: Path, count: int = 10, seed: int = 0, variant: str = "plain", processes: int = 1) -> dict:
    """
    Kills a run right after the checkpoint of a step, each from the beginning, and lets it go on to the end.

    Args:
        count (`int`): how many of the ten steps, spread evenly.
        variant (`str`): `everything` has two workers.

    Returns:
        `dict`: how many steps were tried, and what differs from a run that was left alone.
    """
    files = tiny_files(folder / "tiny")
    result = {"tried": 0, "problems": []}
    with KillServer(environment_of(files), folder / "steps.log") as server:
        expected = reference(server, folder, files, VARIANTS[variant], processes)["fingerprints"]
        for step in sorted({round((i + 0.5) * 10 / count + 0.5) for i in range(count)}):
            output_dir = folder / f"step-{step}"
            command = arguments(files, output_dir, **VARIANTS[variant])
            killed = server.run(command, processes, rename=f"checkpoint-{step}")
            went_on = server.run(command, processes)
            # The other process may have found out that it was left, before it was killed too.
            if killed[0] != -signal.SIGKILL or 0 in killed or set(went_on) != {0}:
                result["problems"].append(f"step {step}: {killed}, then {went_on}: {server.tail(500)}")
            else:
                result["problems"] += [f"step {step}: {name}" for name in different(output_dir, expected)]
            result["tried"] += 1
            shutil.rmtree(output_dir)
    return result


def sigterms(folder: Path, count: int = 40, seed: int = 0) -> dict:
    """
    Sends SIGTERM in every phase in turn, then the same command: exit code 143, no step taken twice, the same bits.

    Returns:
        `dict`: signals by phase, steps that were lost, and problems.
    """
    draw, files = random.Random(seed), tiny_files(folder / "tiny")
    result = {"signals": 0, "exit_143": 0, "steps_lost": 0, "problems": []}
    phases: Counter = Counter()
    with KillServer(environment_of(files), folder / "sigterms.log") as server:
        known = reference(server, folder, files, {})
        while result["signals"] < count:
            task = draw.randint(0, 1)
            phase = min(PHASES[task == 0 :], key=lambda name: (phases[name], draw.random()))
            output_dir = folder / "terminated"
            # Checkpoints are far apart: the signal has to make its own.
            command = arguments(files, output_dir, checkpointing_steps=1000)
            delay = draw.uniform(0, 0.9 * known["seconds"][phase])
            status = server.run(command, phase=phase, task=task, delay=delay, signal=int(signal.SIGTERM))[0]
            if status != 0:
                phases[server.phase()] += 1
                result["signals"] += 1
                result["exit_143"] += status == 143
                again = server.run(command)[0]
                log = (output_dir / "logs" / "train_log.jsonl").read_text().splitlines()
                steps = [json.loads(line)["step"] for line in log]
                result["steps_lost"] += len(steps) - len(set(steps))
                if status != 143 or again != 0:
                    result["problems"].append(f"{phase}: {status}, then {again}: {server.tail(500)}")
                else:
                    result["problems"] += [f"{phase}: {name}" for name in different(output_dir, known["fingerprints"])]
            shutil.rmtree(output_dir)
    return {**result, "by_phase": dict(phases)}
