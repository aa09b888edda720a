"""Numbers that are not finite, put into a run one at a time: it stops before the update, and goes on in the same bits."""

import shutil
from pathlib import Path

import torch
from kill_harness import KillServer, environment_of
from safetensors.torch import load_file
from script_helpers import arguments, tiny_files
from torture_runs import different, reference


# Penalties and replay begin in task 1, with step 6; of a task with EMA, accumulation takes two calls a step.
INJECTIONS = [
    *({"what": "loss", "moment": moment} for moment in (1, 4, 9)),
    {"what": "loss", "moment": 2, "value": float("inf")},
    *({"what": "gradient", "moment": moment} for moment in (1, 5, 8)),
    *({"what": "penalty", "moment": moment} for moment in (4, 8)),
    *({"what": "ema", "moment": moment} for moment in (1, 5, 7)),
    *({"what": "weights", "moment": moment} for moment in (2, 6)),
    {"what": "teacher", "moment": 3},
    *({"what": "fisher", "task": task} for task in (0, 1)),
    *({"what": "images", "phase": "evaluate", "task": task} for task in (0, 1)),
    {"what": "images", "phase": "replay", "task": 1},
]
SETTINGS = {"penalty_mode": "loss", "use_ema": "true"}


def not_finite(output_dir: Path) -> list[str]:
    """Returns the tensors on disk that are not finite."""
    return [
        f"{file.relative_to(output_dir)}: {name}"
        for file in sorted(output_dir.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
        # A quantity that was not measured is NaN in a penalty's statistics.
        if not name.startswith("statistics.") and not torch.isfinite(tensor.double()).all()
    ]


def injections(folder: Path, count: int = 20, seed: int = 0) -> dict:
    """
    Puts one number that is not finite into each of many runs.

    Returns:
        `dict`: how many were tried and stopped with exit code 5, and what went wrong after that.
    """
    files = tiny_files(folder / "tiny")
    result = {"tried": 0, "stopped": 0, "problems": []}
    with KillServer(environment_of(files), folder / "injections.log") as server:
        expected = reference(server, folder, files, SETTINGS)["fingerprints"]
        # Spread over all kinds, where not all are asked for.
        chosen = [
            INJECTIONS[i * len(INJECTIONS) // min(count, len(INJECTIONS))] for i in range(min(count, len(INJECTIONS)))
        ]
        for injection in chosen:
            output_dir = folder / "spoilt"
            command = arguments(files, output_dir, **SETTINGS)
            status = server.run(command, inject=injection)[0]
            result["tried"] += 1
            result["stopped"] += status == 5
            found = [] if status == 5 else [f"exit code {status}: {server.tail(500)}"]
            if output_dir.exists():
                found += not_finite(output_dir)
            found += (
                [f"went on with {again}"]
                if (again := server.run(command)[0]) != 0
                else different(output_dir, expected)
            )
            result["problems"] += [f"{injection}: {problem}" for problem in found]
            shutil.rmtree(output_dir)
    return result
