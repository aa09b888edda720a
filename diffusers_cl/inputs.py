"""What a run is a function of beside its configuration: a run that goes on must find it as it was."""

import json
from pathlib import Path

import torch
from accelerate import Accelerator

from .errors import CheckpointError, ConfigError, DataError
from .files import read_json
from .record import versions


INPUTS_NAME = "inputs.json"


def collect_inputs(data: dict, class_ids: dict[str, int], architecture: dict, accelerator: Accelerator) -> dict:
    """
    Returns what `inputs.json` says.

    Args:
        data (`dict`): what [`preflight.scan`] found: the fingerprint of the images and labels, and what is converted.
        class_ids (`dict[str, int]`): the model's id of every class.
        architecture (`dict`): of the network, without sizes of the class table.
        accelerator (`accelerate.Accelerator`).
    """
    device = accelerator.device.type
    # On a GPU the threads of the CPU move no number.
    threads = torch.get_num_threads() if device == "cpu" else None
    name = torch.cuda.get_device_name() if device == "cuda" else device
    exact = {"processes": accelerator.num_processes, "threads": threads, "device": name, **versions()}
    found = {"data": data, "class_ids": class_ids, "architecture": architecture, "exact": exact}
    return json.loads(json.dumps(found))


def _first_difference(before: dict, now: dict) -> tuple[str, object, object] | None:
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return (keys[0], before.get(keys[0]), now.get(keys[0])) if keys else None


def check_inputs(output_dir: str | Path, inputs: dict, allow_inexact: bool) -> list[dict]:
    """
    Compares with what the run in a folder had when it was last started.

    Args:
        output_dir (`Path`): the run's.
        inputs (`dict`): of [`collect_inputs`].
        allow_inexact (`bool`): let processes, threads, device and versions differ.

    Returns:
        `list[dict]`: what differs with leave: `{"key", "before", "now"}`.

    Raises:
        DataError: for other images, labels or class ids, with both values. ConfigError: for another architecture.
        CheckpointError: for other processes, threads, device or versions, or a file that cannot be read.
    """
    path = Path(output_dir) / INPUTS_NAME
    if not path.exists():
        return []
    try:
        before = read_json(path)
        parts = {key: dict(before[key]) for key in inputs}
        counts = [
            f"{part['images']} images, fingerprint {part['fingerprint'][:12]}"
            for part in (before["data"], inputs["data"])
        ]
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path} is not what a run writes ({error!r}); overwrite_output_dir starts over"
        ) from error
    way_out = "give another output_dir, or overwrite_output_dir to start over"
    if parts["data"]["fingerprint"] != inputs["data"]["fingerprint"]:
        raise DataError(
            f"the data are not those that the run in {output_dir} began with ({counts[0]}), but {counts[1]}; {way_out}"
        )
    if (found := _first_difference(parts["class_ids"], inputs["class_ids"])) is not None:
        name, old, new = found
        raise DataError(f"the class {name!r} has the id {old} in the run in {output_dir}, and {new} now; {way_out}")
    if (found := _first_difference(parts["architecture"], inputs["architecture"])) is not None:
        name, old, new = found
        raise ConfigError(f"the network in {output_dir} has {name} = {old!r}, this one {new!r}; {way_out}")
    changes = [
        {"key": key, "before": parts["exact"].get(key), "now": value}
        for key, value in inputs["exact"].items()
        if parts["exact"].get(key) != value
    ]
    if changes and not allow_inexact:
        listed = ", ".join(f"{change['key']} {change['before']} before, {change['now']} now" for change in changes)
        listed += " (num_threads sets them)" * any(change["key"] == "threads" for change in changes)
        raise CheckpointError(
            f"the run in {output_dir} cannot go on exactly: {listed}. allow_inexact goes on all the same, and records it"
        )
    return changes
