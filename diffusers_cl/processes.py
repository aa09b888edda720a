"""The processes of a run: what each may be part of, where each stands, and which of them is lost."""

import os
import re
import socket
from pathlib import Path

import psutil
import torch

from .config import TrainingConfig
from .errors import CheckpointError, ConfigError, ProcessLostError, first_line
from .files import read_json, write_json


# What collectives raise when another process is gone, or does not answer within `ddp_timeout`.
LOST = re.compile(r"gloo|nccl|ProcessGroup|Connection (reset|closed|refused)|Application timeout|[Tt]imed out", re.I)
SHARDED = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed (ZeRO)"}


def rank() -> int:
    """Returns the number of this process, 0 for the main one, before and after the processes know one another."""
    return int(os.environ.get("RANK", 0))


def refuse_sharded_parameters() -> None:
    """Raises `ConfigError` where the launcher would split the parameters over processes."""
    for variable, name in SHARDED.items():
        if os.environ.get(variable, "false").lower() in ("true", "1", "yes"):
            raise ConfigError(
                f"{name} is not supported: Fisher, penalty and checkpoints need whole parameters in every process;"
                " allowed: one process, or data parallel (accelerate launch --multi_gpu, torchrun)"
            )


def num_cores() -> int:
    """Returns how many CPU cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def set_num_threads(config: TrainingConfig) -> None:
    """Sets the CPU threads of this process, before the first tensor operation: `accelerate launch` sets one."""
    num_local_processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    torch.set_num_threads(config.num_threads or max(1, num_cores() // num_local_processes))


def _place_file(output_dir: str | Path, number: int) -> Path:
    return Path(output_dir) / "logs" / f"process-{number}.json"


def note_place(output_dir: str | Path, task: int, phase: str) -> None:
    """Writes down where this process stands, for the others: `logs/process-<rank>.json`."""
    place = {"task": task, "phase": phase, "pid": os.getpid(), "parent": os.getppid(), "host": socket.gethostname()}
    write_json(_place_file(output_dir, rank()), place)


def _state(pid: int) -> str | None:
    """What is wrong with a process of this machine, `None` if nothing."""
    try:
        status = psutil.Process(pid).status()
    except psutil.NoSuchProcess:
        return "has ended"
    return {psutil.STATUS_ZOMBIE: "has ended", psutil.STATUS_STOPPED: "is stopped"}.get(status)


def lost_processes(output_dir: str | Path, hanging: bool) -> list[str]:
    """
    Returns a sentence for each other process that this launcher has started on this machine, and that has ended or is
    stopped; if there is none and one is `hanging`, one for each that has not, saying where it was last.
    """
    found, others = [], []
    for number in set(range(int(os.environ.get("WORLD_SIZE", 1)))) - {rank()}:
        try:
            place = read_json(_place_file(output_dir, number))
            if (place["host"], place["parent"]) != (socket.gethostname(), os.getppid()):
                continue
            state, where = _state(place["pid"]), f"in task {place['task']}, phase {place['phase']}"
        except (CheckpointError, KeyError, TypeError):
            # It had not begun a phase.
            continue
        found += [f"rank {number} {state} {where}"] if state is not None else []
        others.append(f"rank {number} was last seen {where}")
    return found or (others if hanging else [])


def as_lost_process(error: Exception) -> ProcessLostError | None:
    """Returns what a collective's failure means, `None` for any other error."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1 or not isinstance(error, RuntimeError):
        return None
    if isinstance(error, torch.distributed.DistError) or LOST.search(str(error)):
        reason = re.sub(r"^\[[^]]*\] ", "", first_line(error)).partition(". ")[0]
        return ProcessLostError(f"another process is lost ({reason}); the same command goes on")
    return None
