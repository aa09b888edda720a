"""The output folder of a run: who may write into it, what it holds at the start, and how its last run ended."""

import contextlib
import errno
import fcntl
import os
import shlex
import socket
import sys
import time
from dataclasses import asdict
from pathlib import Path

import yaml

from .arguments import load_yaml, to_yaml
from .config import OPERATIONAL_KEYS, SECRET_KEYS, TrainingConfig
from .errors import ConfigError, FolderInUseError
from .files import recover, remove_folder, write_json, write_text
from .processes import rank


LOCK_NAME = ".lock"
CONFIG_NAME = "config.yaml"
STATUS_NAME = "status.json"
# Of file systems that have no locks.
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


def _is_fresh(output_dir: Path) -> bool:
    """Whether a folder is not there, or holds at most what a run leaves that was killed before its first file."""
    return not output_dir.exists() or all(
        path.name == LOCK_NAME or path.match(".*.partial") for path in output_dir.iterdir()
    )


def check_output_dir(config: TrainingConfig, lock: "OutputLock") -> None:
    """
    Raises `ConfigError` unless the folder is empty, holds this very run, or may be overwritten; a run's is locked from here
    on.
    """
    output_dir = Path(config.output_dir)
    existing = next(path for path in (output_dir, *output_dir.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ConfigError(f"output_dir is {output_dir}, but {existing} is not a folder that can be written to")
    checkpoint = config.resume_from_checkpoint
    if checkpoint is not None and Path(checkpoint).resolve().parent != output_dir.resolve():
        raise ConfigError(
            f"resume_from_checkpoint is {checkpoint!r}; allowed: a checkpoint in output_dir ({output_dir})"
        )
    if _is_fresh(output_dir):
        return
    try:
        found = load_yaml((output_dir / CONFIG_NAME).read_text(encoding="utf-8"))
        if not isinstance(found, dict) or not {"output_dir", "penalty", "replay"} <= found.keys():
            raise yaml.YAMLError("not the configuration of a run")
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(
            f"output_dir: {output_dir} holds files that are not a run's; allowed: a new folder"
        ) from error
    # A run of an older version lacks keys.
    found = asdict(TrainingConfig()) | found
    for key, value in asdict(config).items():
        # The number of threads that there are is compared, in inputs.json.
        moves_numbers = key not in (*OPERATIONAL_KEYS, "num_threads")
        if not config.overwrite_output_dir and moves_numbers and found[key] != value:
            raise ConfigError(
                f"output_dir: {output_dir} holds a run with {key} = {found[key]!r}, this one has {value!r}."
                " Give another output_dir, or overwrite_output_dir to start over"
            )
    lock.acquire(output_dir)


class OutputLock:
    """
    Keeps other runs out of an output folder, from [`acquire`] to the end of a `with` block: `.lock`, which the main process
    holds (`flock`) and which goes with it. Its content says who holds it.
    """

    def __init__(self):
        self._file = None
        # A data loader's worker, which may outlive its trainer by seconds, must not hold the lock.
        os.register_at_fork(after_in_child=self.release)

    def __enter__(self) -> "OutputLock":
        return self

    def __exit__(self, *exception) -> None:
        self.release()

    @property
    def held(self) -> bool:
        """Whether this process has the folder to itself."""
        return self._file is not None

    def release(self) -> None:
        """Lets others in."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def acquire(self, output_dir: Path) -> None:
        """
        Takes the lock of a folder, if this process does not have it and is the main one. What a kill has left half done is
        put right.

        Raises:
            FolderInUseError: at once, saying who holds it.
        """
        if self.held or rank() != 0:
            return
        file = open(output_dir / LOCK_NAME, "a+")  # noqa: SIM115 (open as long as the lock is held)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            file.seek(0)
            holder = " ".join(file.read().split())[:300] or "another run"
            file.close()
            raise FolderInUseError(f"output_dir: {output_dir} is in use by {holder}") from error
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            print(f"output_dir: {output_dir} cannot be locked here; see that no other run uses it", file=sys.stderr)
        self._file = file
        file.truncate(0)
        began = time.strftime("%Y-%m-%d %H:%M:%S")
        file.write(
            f"process {os.getpid()} on {socket.gethostname()} since {began}: {shlex.join(_to_go_on(sys.argv))}\n"
        )
        file.flush()
        for folder in (output_dir, output_dir / "replay"):
            recover(folder)


def prepare_output_dir(config: TrainingConfig, lock: OutputLock) -> None:
    """Makes the folder, or empties it (`overwrite_output_dir`), takes its lock, and writes `config.yaml` into a new one."""
    output_dir = Path(config.output_dir)
    output_dir.mkdir(parents=True, exist_ok=True)
    lock.acquire(output_dir)
    # Another run may have been here since the first look.
    check_output_dir(config, lock)
    # How the last run ended: it would stand there after a kill of this one.
    (output_dir / STATUS_NAME).unlink(missing_ok=True)
    if config.overwrite_output_dir:
        # By its configuration a folder is known as a run's, so it goes last.
        last = (CONFIG_NAME, LOCK_NAME)
        for path in sorted(output_dir.iterdir(), key=lambda path: path.name in last):
            if path.is_dir() and not path.is_symlink():
                remove_folder(path)
            elif path.name != LOCK_NAME:
                path.unlink()
    if not (output_dir / CONFIG_NAME).exists():
        write_text(output_dir / CONFIG_NAME, to_yaml(config))
    (output_dir / "logs").mkdir(exist_ok=True)
    (output_dir / "samples").mkdir(exist_ok=True)


def _to_go_on(arguments: list[str]) -> list[str]:
    """A command line without what starts over or goes back, and without secrets."""
    kept, is_value, left_out = [], False, (*SECRET_KEYS, "resume_from_checkpoint", "overwrite_output_dir")
    for argument in arguments:
        key, has_value, _ = argument.removeprefix("--").partition("=")
        is_key = argument.startswith("--")
        skipped = is_key and key in left_out
        # A switch may stand alone.
        if not (skipped or (is_value and not is_key)):
            kept.append(argument)
        is_value = skipped and not has_value
    return kept


def _launcher() -> str:
    """What has started this process."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return "accelerate launch"
    on_cpu = "ACCELERATE_USE_CPU=1 " * (os.environ.get("ACCELERATE_USE_CPU", "").lower() in ("1", "true"))
    return f"{on_cpu}torchrun --nproc_per_node {os.environ.get('LOCAL_WORLD_SIZE', 1)}"


def write_status(output_dir: Path, exit_code: int, message: str) -> None:
    """
    Writes `status.json`: how the run ended, and the command to go on. Only into a folder that is a run's, and where there is
    room for it.
    """
    if (output_dir / CONFIG_NAME).exists() and rank() == 0:
        command = f"{_launcher()} {shlex.join(_to_go_on(sys.argv))}"
        with contextlib.suppress(OSError):
            write_json(output_dir / STATUS_NAME, {"exit_code": exit_code, "message": message, "command": command})
