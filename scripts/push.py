"""
Pushes what is missing of a run to the Hub: a model repo for every finished task.

    python scripts/push.py runs/digits [--hub_model_id me/digits] [--hub_private_repo] [--hub_revision main]

What the command line does not say comes from the run's `config.yaml`; the token from `HF_TOKEN` or `hf auth login`, if
`--hub_token` does not give one. What is pushed stands in `push.json` and is not sent again. Exit code 0: all is pushed;
8: something is not, and the same command tries again. An endpoint that is not huggingface.co (`HF_ENDPOINT`) and has no
Xet storage needs `HF_HUB_DISABLE_XET=1`.
"""

import argparse
import ctypes
import logging
import os
import signal
import sys
from functools import partial
from pathlib import Path

import yaml

from diffusers_cl.endpoint import REQUEST_TIMEOUT, client_timeout
from diffusers_cl.errors import ConfigError, PushPendingError, RunError, StorageError
from diffusers_cl.folders import CONSOLIDATION, task_folder
from diffusers_cl.publish import missing_tasks, push_run, read_record


PR_SET_PDEATHSIG = 1


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the options, from the command line by default."""
    parser = argparse.ArgumentParser(description="Pushes what is missing of a run to the Hub, a model repo a task.")
    parser.add_argument("run", type=Path, help="A run's output_dir, with folders task-00, task-01, ...")
    parser.add_argument(
        "--hub_model_id", help="Name of the repos, to which -task-00, ... is added. Default: the run's."
    )
    parser.add_argument(
        "--hub_private_repo", action=argparse.BooleanOptionalAction, default=None, help="Make new repos private."
    )
    parser.add_argument("--hub_revision", help="Branch to push to. Default: the run's, else the main one.")
    parser.add_argument("--hub_token", help="A write token; other users may see it here. Default: the saved one.")
    parser.add_argument(
        "--request_timeout",
        type=float,
        default=REQUEST_TIMEOUT,
        help="Seconds without an answer after which a request is given up.",
    )
    parser.add_argument("--parent_pid", type=int, help="End with this process, which started this one.")
    return parser.parse_args(argv)


def end_with(parent_pid: int) -> None:
    """Ends this process when its parent does, or now if it has."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent_pid:
        sys.exit("push.py: the process that started it has ended")


def push(args: argparse.Namespace) -> None:
    """
    Pushes what `args` asks for, with a line for each task.

    Raises:
        ConfigError: for a folder that is not a run's, a token or a name that will not do.
        CheckpointError: for records of the run that cannot be read.
        PushPendingError: when tasks are left that are not pushed.
    """
    if (args.run / CONSOLIDATION).is_dir():
        raise ConfigError(f"{args.run} is the folder of a task, pass the run's: {args.run.resolve().parent}")
    if not args.run.is_dir() or not ((args.run / "config.yaml").is_file() or any(args.run.glob("task-*"))):
        raise ConfigError(f"{args.run} is not the folder of a run")
    try:
        config = yaml.safe_load((args.run / "config.yaml").read_text()) if (args.run / "config.yaml").exists() else {}
        config = dict(config)
    except (OSError, yaml.YAMLError, TypeError, ValueError) as error:
        raise ConfigError(
            f"{args.run / 'config.yaml'} cannot be read: it is not the configuration of a run"
        ) from error

    def option(key: str):
        return config.get(key) if getattr(args, key) is None else getattr(args, key)

    hub_model_id = option("hub_model_id") or args.run.resolve().name
    revision = option("hub_revision")
    missing = {task_folder("", task).name for task in missing_tasks(args.run, hub_model_id, revision)}
    for name, entry in sorted(read_record(args.run)["tasks"].items()):
        if "url" in entry and name not in missing:
            print(f"{name}: {entry['url']} has it already", flush=True)
    with client_timeout(args.request_timeout):
        failures = push_run(
            args.run,
            hub_model_id,
            token=args.hub_token,
            private=option("hub_private_repo"),
            revision=revision,
            log=partial(print, flush=True),
        )
    if failures:
        raise PushPendingError(f"{len(failures)} task(s) of {args.run} not pushed; the same command tries again")


def main() -> int:
    """Returns the exit code; what the user can mend ends it with one line."""
    logging.basicConfig(format="%(asctime)s %(levelname)s: %(message)s", level=logging.WARNING)
    args = parse_args()
    if args.parent_pid is not None:
        end_with(args.parent_pid)
    try:
        push(args)
    except RunError as error:
        print(f"push.py: error: {error}", file=sys.stderr)
        return error.exit_code
    except OSError as error:
        print(f"push.py: error: cannot write {error.filename or args.run}: {error.strerror}", file=sys.stderr)
        return StorageError.exit_code
    except KeyboardInterrupt:
        print("push.py: interrupted; the same command goes on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
