"""What a run cost: seconds by phase, images, memory, device and versions."""

import contextlib
import json
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
from .files import write_json


class RunRecord:
    """What `run.json` says: seconds by phase, images, versions, device; it adds up over restarts."""

    def __init__(self, output_dir: Path, accelerator: Accelerator):
        self.file, self.accelerator = output_dir / "run.json", accelerator
        before = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.content = {
            "seconds": before.get("seconds", {}),
            "images": before.get("images", {"trained": 0, "replayed": 0, "generated": 0}),
            "stored_bytes": before.get("stored_bytes", {}),
            "peak_memory_gib": before.get("peak_memory_gib", 0.0),
            "device": str(accelerator.device)
            + (f" ({torch.cuda.get_device_name()})" if accelerator.device.type == "cuda" else ""),
            "processes": accelerator.num_processes,
            "threads": torch.get_num_threads(),
            "host": platform.machine() + " " + platform.system(),
            "restarts": before["restarts"] + 1 if before else 0,
            "versions": {
                "python": platform.python_version(),
                **{m.__name__: m.__version__ for m in (torch, diffusers, accelerate, datasets)},
                "diffusers_cl": __version__,
            },
        }

    @contextlib.contextmanager
    def phase(self, name: str):
        """Adds the seconds that the block takes to a phase."""
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = self.content["seconds"]
            elapsed = time.perf_counter() - start
            seconds[name] = seconds.get(name, 0.0) + elapsed
            seconds["total"] = seconds.get("total", 0.0) + elapsed

    def stored(self, **tensors: dict[str, torch.Tensor] | None) -> None:
        """Notes the bytes that the method has to keep for the next task beside the model, by what they are."""
        self.content["stored_bytes"] = {
            name: sum(tensor.nbytes for tensor in (kept or {}).values()) for name, kept in tensors.items()
        }

    def write(self) -> None:
        """Writes `run.json`."""
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
        if self.accelerator.device.type == "cuda":
            peak = torch.cuda.max_memory_allocated() / 2**30
        self.content["peak_memory_gib"] = max(self.content["peak_memory_gib"], peak)
        write_json(self.file, self.content)
