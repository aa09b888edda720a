"""The output folder of a run: what may be written into it, and how its last run ended."""

import os
import shlex
import sys
from dataclasses import asdict
from pathlib import Path

import yaml

from .config import OPERATIONAL_KEYS, SECRET_KEYS, TrainingConfig
from .errors import ConfigError
from .files import write_json


def check_output_dir(config: TrainingConfig) -> None:
    """Raises `ConfigError` unless the folder is empty, holds this very run, or may be overwritten."""
    output_dir = Path(config.output_dir)
    existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(f"output_dir is {output_dir}, but {existing} is not a folder that can be written to")
    checkpoint = config.resume_from_checkpoint
    if checkpoint is not None and Path(checkpoint).resolve().parent != output_dir.resolve():
        raise ConfigError(
            f"resume_from_checkpoint is {checkpoint!r}; allowed: a checkpoint in output_dir ({output_dir})"
        )
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return
    try:
        found = yaml.safe_load((output_dir / "config.yaml").read_text())
        if not isinstance(found, dict) or not {"output_dir", "penalty", "replay"} <= found.keys():
            raise yaml.YAMLError("not the configuration of a run")
    except (OSError, yaml.YAMLError) as error:
        raise ConfigError(
            f"output_dir: {output_dir} holds files that are not a run's; allowed: a new folder"
        ) from error
    if config.overwrite_output_dir:
        return
    # A run of an older version lacks keys.
    found = asdict(TrainingConfig()) | found
    for key, value in asdict(config).items():
        if key not in OPERATIONAL_KEYS and found[key] != value:
            raise ConfigError(
                f"output_dir: {output_dir} holds a run with {key} = {found[key]!r}, this one has {value!r}."
                " Give another output_dir, or overwrite_output_dir to start over"
            )


def _to_go_on(arguments: list[str]) -> list[str]:
    """A command line without what starts over and without secrets."""
    kept, is_value = [], False
    for argument in arguments:
        key, has_value, _ = argument.removeprefix("--").partition("=")
        secret = argument.startswith("--") and key in SECRET_KEYS
        if not (is_value or secret or argument.startswith("--overwrite_output_dir")):
            kept.append(argument)
        is_value = secret and not has_value
    return kept


def write_status(output_dir: Path, exit_code: int, message: str) -> None:
    """Writes `status.json`: how the run ended, and the command to go on. Only into a folder that is a run's."""
    if (output_dir / "config.yaml").exists() and int(os.environ.get("RANK", 0)) == 0:
        command = f"accelerate launch {shlex.join(_to_go_on(sys.argv))}"
        write_json(output_dir / "status.json", {"exit_code": exit_code, "message": message, "command": command})
