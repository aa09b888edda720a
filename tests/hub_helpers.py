"""What the tests of pushing share: task folders, a process with the real client, and ways to run scripts/push.py."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import torch
from hub_server import TOKEN, HubServer
from PIL import Image
from safetensors.torch import save_file

from diffusers_cl import __version__
from diffusers_cl.files import publish_folder
from diffusers_cl.folders import CONSOLIDATION, task_folder


ROOT = Path(__file__).parent.parent
PUSH_SCRIPT = ROOT / "scripts" / "push.py"

# Evaluates what it is sent, one JSON line at a time. The pauses between attempts are short.
CLIENT = """
import json, logging, os, sys, time
from contextlib import redirect_stdout
import huggingface_hub
from diffusers_cl import endpoint, publish, task_repos
logging.basicConfig(level=logging.WARNING)
endpoint.FIRST_WAIT = 0.05
names = {**globals()}
for line in sys.stdin:
    code, values = json.loads(line)
    try:
        with redirect_stdout(sys.stderr):
            answer = [None, eval(code, names, values)]
    except Exception as error:
        answer = [type(error).__name__, str(error)]
    print(json.dumps(answer), flush=True)
"""


class ClientError(Exception):
    """What the code in the client's process raised: the error's class and message."""

    def __init__(self, kind: str, message: str):
        super().__init__(f"{kind}: {message}")
        self.kind, self.message = kind, message


class Client:
    """
    A process with the real client. `client("task_repos.push_task_folder(folder, repo_id)", folder=..., repo_id=...)` gives
    the result as JSON has it, or raises [`ClientError`]. The modules endpoint, task_repos and publish are there.
    """

    def __init__(self, hub: HubServer, home: Path, stderr=None):
        self.process = subprocess.Popen(
            [sys.executable, "-c", CLIENT],
            env=hub.environment(home),
            cwd=ROOT,
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
        )

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *_) -> None:
        self.process.stdin.close()
        self.process.wait(30)
        self.process.stdout.close()

    def __call__(self, code: str, **values):
        self.process.stdin.write(json.dumps([code, {name: _plain(value) for name, value in values.items()}]) + "\n")
        self.process.stdin.flush()
        kind, result = json.loads(self.process.stdout.readline())
        if kind is not None:
            raise ClientError(kind, result)
        return result

    def push(self, folder: Path, repo_id: str, **options) -> dict:
        """Returns what `push_task_folder` does."""
        code = "task_repos.push_task_folder(folder, repo_id, **options)"
        return self(code, folder=folder, repo_id=repo_id, options=options)


def _plain(value):
    return str(value) if isinstance(value, Path) else value


def write_task(output_dir: Path, pipeline: Path, task: int, card: str = "# A model\n", extra: bool = True) -> Path:
    """
    Publishes `task-<k>` with all that a task folder has.

    Args:
        output_dir (`Path`), pipeline (`Path`): a saved pipeline.
        task (`int`), card (`str`): the text of its README.md.
        extra (`bool`): with `consolidation/ewc.safetensors`.
    """

    def write(folder: Path) -> None:
        shutil.copytree(pipeline, folder, dirs_exist_ok=True)
        (folder / "README.md").write_text(f"---\nlibrary_name: diffusers\n---\n\n{card}")
        Image.new("L", (8, 8), task).save(folder / "samples.png")
        (folder / CONSOLIDATION).mkdir()
        state = {"schema": 1, "version": __version__, "task": task, "tasks": [["cat", "7"], ["dog"]]}
        (folder / CONSOLIDATION / "state.json").write_text(json.dumps(state))
        save_file({"mean": torch.full((4,), float(task))}, folder / CONSOLIDATION / "references.safetensors")
        if extra:
            save_file({"direction": torch.full((4,), float(task))}, folder / CONSOLIDATION / "ewc.safetensors")

    path = task_folder(output_dir, task)
    publish_folder(path, write, CONSOLIDATION)
    return path


def write_run(output_dir: Path, pipeline: Path, num_tasks: int, config: str = "hub_model_id: me/digits\n") -> Path:
    """Writes what pushing reads of a run."""
    for task in range(num_tasks):
        write_task(output_dir, pipeline, task)
    (output_dir / "config.yaml").write_text(config)
    return output_dir


def start_push(hub: HubServer, home: Path, *arguments, token: str | None = TOKEN) -> subprocess.Popen:
    """Starts scripts/push.py in a new process."""
    return subprocess.Popen(
        [sys.executable, str(PUSH_SCRIPT), *map(str, arguments)],
        env=hub.environment(home, token),
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def run_push(hub: HubServer, home: Path, *arguments, token: str | None = TOKEN) -> tuple[int, str, str]:
    """Returns exit code, output and errors of scripts/push.py."""
    process = start_push(hub, home, *arguments, token=token)
    output, errors = process.communicate(timeout=120)
    return process.returncode, output, errors
