"""What a run cost: seconds by phase, images, memory, device and versions."""

import contextlib
import platform
import resource
import time
from pathlib import Path

import accelerate
import datasets
import diffusers
import torch
from accelerate import Accelerator

from . import __version__
from .files import read_json, write_json
from .processes import note_place, rank


def versions() -> dict[str, str]:
    """Returns what the numbers of a run depend on, by name."""
    return {
        "python": platform.python_version(),
        **{module.__name__: module.__version__ for module in (torch, diffusers, accelerate, datasets)},
        "diffusers_cl": __version__,
    }


class RunRecord:
    """
    What `run.json` says: seconds and CPU seconds by phase, images, versions, device; it adds up over restarts.

    Attributes:
        task (`int`): that the phases are of.
        content (`dict`): of `run.json`.
    """

    def __init__(self, output_dir: Path, accelerator: Accelerator, changes: list[dict]):
        self.output_dir, self.file, self.accelerator = output_dir, output_dir / "run.json", accelerator
        self.task = 0
        before = read_json(self.file) if self.file.exists() else {}
        self.content = {
            "seconds": before.get("seconds", {}),
            # Of this process and its threads: on a machine with other work they say more.
            "cpu_seconds": before.get("cpu_seconds", {}),
            "images": before.get("images", {"trained": 0, "replayed": 0, "generated": 0}),
            "stored_bytes": before.get("stored_bytes", {}),
            "peak_memory_gib": before.get("peak_memory_gib", 0.0),
            "device": str(accelerator.device)
            + (f" ({torch.cuda.get_device_name()})" if accelerator.device.type == "cuda" else ""),
            "processes": accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "host": platform.machine() + " " + platform.system(),
            "restarts": before["restarts"] + 1 if before else 0,
            # By step: so that one that is taken again after a kill counts once.
            "skipped": before.get("skipped", {}),
            # Under `allow_inexact`: what changed between two starts.
            "inexact": before.get("inexact", []) + changes,
            "versions": versions(),
        }

    @contextlib.contextmanager
    def phase(self, name: str):
        """Adds the seconds that the block takes to a phase; what goes wrong in it is told where it was."""
        started = time.perf_counter(), time.process_time()
        if self.accelerator.num_processes > 1:
            note_place(self.output_dir, self.task, name)
        try:
            yield
        except BaseException as error:
            place = f"task {self.task}, phase {name}"
            error.add_note(f"rank {rank()}, {place}" if self.accelerator.num_processes > 1 else place)
            self._spend(name, *started)
            # On a full disk, the first error says more.
            with contextlib.suppress(OSError):
                self.write()
            raise
        self._spend(name, *started)

    def _spend(self, name: str, start: float, cpu_start: float) -> None:
        spent = {"seconds": time.perf_counter() - start, "cpu_seconds": time.process_time() - cpu_start}
        for clock, elapsed in spent.items():
            for key in (name, "total"):
                self.content[clock][key] = self.content[clock].get(key, 0.0) + elapsed

    def stored(self, **tensors: dict[str, torch.Tensor] | None) -> None:
        """Notes the bytes that the method has to keep for the next task beside the model, by what they are."""
        self.content["stored_bytes"] = {
            name: sum(tensor.nbytes for tensor in (kept or {}).values()) for name, kept in tensors.items()
        }

    def skip(self, step: int, limit: int, values: dict[str, float], rows: list[int]) -> bool:
        """
        Returns whether a step that is not finite may be skipped, and notes it.

        Args:
            step (`int`): optimizer steps before it, over all tasks.
            limit (`int`): how many of a run may be skipped.
            values (`dict`): what was measured.
            rows (`list[int]`): of the training images in it, in the dataset.
        """
        skipped = self.content["skipped"]
        if str(step) not in skipped and len(skipped) >= limit:
            return False
        named = {name: str(value) for name, value in values.items()}
        skipped[str(step)] = {"task": self.task, **named, "rows": rows}
        self.write()
        return True

    def write(self) -> None:
        """Writes `run.json`, in the main process."""
        if not self.accelerator.is_main_process:
            return
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if self.accelerator.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
        self.content["peak_memory_gib"] = max(self.content["peak_memory_gib"], peak)
        write_json(self.file, self.content)
