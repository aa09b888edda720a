"""The pushes of a run: what is missing, one after the other, and in the background of its training."""

import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from huggingface_hub.errors import HfHubHTTPError

from .endpoint import CLIENT_ERRORS, EndpointError, fault, open_api, retry
from .errors import CheckpointError, ConfigError, PushPendingError, RunError
from .files import MANIFEST_NAME, file_sha256, read_json, write_json
from .folders import CONSOLIDATION, read_start, task_folder
from .task_repos import full_model_id, push_task_folder, task_repo_id


RECORD_NAME = "push.json"
LOCK_NAME = ".push.lock"
LOG_NAME = "logs/push.log"
# Of a collection's title, in characters.
LONGEST_TITLE = 60
# What an endpoint without collections answers.
NO_SUCH_ENDPOINT = (404, 405, 501)
# What a push that is told to end gets for it.
SECONDS_TO_STOP = 5


def read_record(output_dir: str | Path) -> dict:
    """
    Returns what is pushed of a run, `push.json`: `"tasks"`, by folder name `{"repo_id", "commit", "tag", "url",
    "manifest_sha256", "revision"}` or `{"error": sentence}`; and `"collection"`, `{"slug", "items"}`, `{"error": sentence}`
    or `None`.

    Raises:
        CheckpointError: when it cannot be read.
    """
    path = Path(output_dir) / RECORD_NAME
    try:
        record = read_json(path) if path.exists() else {}
        tasks = {name: dict(entry) for name, entry in record.get("tasks", {}).items()}
        return {"tasks": tasks, "collection": record.get("collection")}
    except (CheckpointError, ValueError, AttributeError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be read ({error}); without it, the Hub is asked what it has") from error


def missing_tasks(output_dir: str | Path, hub_model_id: str, revision: str | None = None) -> list[int]:
    """
    Returns the finished tasks of a run that are not recorded as pushed, in order; makes no request. The task that a run
    goes on from, and those before it, are not its own.

    Args:
        output_dir (`Path`).
        hub_model_id (`str`): with or without its namespace.
        revision (`str`, *optional*): the branch.

    Raises:
        CheckpointError: when `push.json` or `start.json` cannot be read.
    """
    output_dir = Path(output_dir)
    record, start, missing = read_record(output_dir)["tasks"], read_start(output_dir), []
    first = start["task"] + 1 if start else 0
    numbers = [path.name.removeprefix("task-") for path in output_dir.glob("task-*") if path.is_dir()]
    for task in sorted(int(number) for number in numbers if number.isdecimal() and int(number) >= first):
        folder, wanted = task_folder(output_dir, task), task_repo_id(hub_model_id, task)
        entry, manifest = record.get(folder.name, {}), folder / CONSOLIDATION / MANIFEST_NAME
        repo_id = entry.get("repo_id", "")
        same_repo = wanted == (repo_id if "/" in wanted else repo_id.partition("/")[2])
        if not (
            same_repo
            and entry.get("revision") == revision
            and manifest.is_file()
            and entry.get("manifest_sha256") == file_sha256(manifest)
        ):
            missing.append(task)
    return missing


@contextmanager
def _lock(output_dir: Path, log: Callable[[str], None]) -> Iterator[None]:
    """Keeps other processes from pushing this run; it goes with the process."""
    with open(output_dir / LOCK_NAME, "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            log("waiting for another push of this run")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _group(output_dir: Path, name: str, token: str | None, private: bool | None, log: Callable[[str], None]) -> None:
    """Puts the repos of a run into a collection; an endpoint that has none is warned of once."""
    record = read_record(output_dir)
    collection = record["collection"] or {"slug": None, "items": []}
    repo_ids = [entry["repo_id"] for entry in record["tasks"].values() if "repo_id" in entry]
    if "error" in collection or set(repo_ids) <= set(collection["items"]):
        return
    api, namespace = open_api(token), repo_ids[0].partition("/")[0]
    try:
        if collection["slug"] is None:
            options = {"title": name[:LONGEST_TITLE], "namespace": namespace, "private": bool(private)}
            collection["slug"] = retry(lambda: api.create_collection(**options, exists_ok=True), "collection").slug
        for repo_id in repo_ids:
            if repo_id not in collection["items"]:
                item = {"collection_slug": collection["slug"], "item_id": repo_id, "item_type": "model"}
                retry(lambda item=item: api.add_collection_item(**item, exists_ok=True), "collection")
                collection["items"].append(repo_id)
    except CLIENT_ERRORS as error:
        sentence = str(fault(error, "collection", api.token))
        if isinstance(error, HfHubHTTPError) and error.response.status_code in NO_SUCH_ENDPOINT:
            collection = {"error": sentence}
        log(f"warning: the repos are not grouped ({sentence})")
    write_json(output_dir / RECORD_NAME, {**record, "collection": collection})


def push_run(
    output_dir: str | Path,
    hub_model_id: str,
    *,
    token: str | None = None,
    private: bool | None = None,
    revision: str | None = None,
    collection: bool = True,
    log: Callable[[str], None] = print,
) -> list[str]:
    """
    Pushes what is missing of a run, in order, and what is finished meanwhile; `push.json` records it. Where nothing is
    missing, no request is made.

    Args:
        output_dir (`Path`), hub_model_id (`str`): the repos' common name; without a namespace, the user's.
        token, private, revision: as in [`push_task_folder`].
        collection (`bool`): group the repos in a collection, where the endpoint has them.
        log: gets a line for each task.

    Returns:
        `list[str]`: a sentence for each task that is not pushed.

    Raises:
        ConfigError: for a token or a name that will not do.
        CheckpointError: when `push.json` or `start.json` cannot be read.
    """
    output_dir = Path(output_dir)
    options = {"token": token, "private": private, "revision": revision}
    failed, fatal = {}, None
    with _lock(output_dir, log):
        while waiting := [t for t in missing_tasks(output_dir, hub_model_id, revision) if t not in failed]:
            folder = task_folder(output_dir, waiting[0])
            try:
                if "/" not in hub_model_id:
                    hub_model_id = full_model_id(hub_model_id, token)
                pushed = push_task_folder(folder, task_repo_id(hub_model_id, waiting[0]), **options)
                entries = {folder.name: {**pushed, "revision": revision}}
                log(f"{folder.name}: {pushed['url']} has it as {pushed['tag']}, commit {pushed['commit']}")
            except RunError as error:
                # What is wrong with the token or the endpoint is so for all tasks.
                fatal = error if isinstance(error, (ConfigError, EndpointError)) else None
                affected = waiting if fatal else waiting[:1]
                failed |= dict.fromkeys(affected, str(error))
                entries = {task_folder("", task).name: {"error": str(error)} for task in affected}
                for name in entries:
                    log(f"{name}: not pushed: {error}")
            record = read_record(output_dir)
            write_json(output_dir / RECORD_NAME, {**record, "tasks": {**record["tasks"], **entries}})
            if isinstance(fatal, ConfigError):
                raise fatal
        if collection and fatal is None:
            _group(output_dir, hub_model_id.rpartition("/")[2], token, private, log)
    return [f"{task_folder('', task).name}: {error}" for task, error in failed.items()]


class BackgroundPush:
    """
    Pushes a run in a child process while it trains.

    Args:
        output_dir (`Path`), hub_model_id (`str`): as in [`push_run`].
        script (`Path`): scripts/push.py. Its output is appended to `logs/push.log`.
        token (`str`, *optional*): passed in the child's environment.
        private (`bool`, *optional*), revision (`str`, *optional*): as in [`push_task_folder`].
    """

    def __init__(
        self,
        output_dir: str | Path,
        hub_model_id: str,
        *,
        script: str | Path,
        token: str | None = None,
        private: bool | None = None,
        revision: str | None = None,
    ):
        self.output_dir, self.hub_model_id, self.revision = Path(output_dir), hub_model_id, revision
        self.command = [sys.executable, str(script), str(output_dir), "--hub_model_id", hub_model_id]
        if private is not None:
            self.command.append("--hub_private_repo" if private else "--no-hub_private_repo")
        if revision is not None:
            self.command += ["--hub_revision", revision]
        self.environment = {
            **os.environ,
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
            **({"HF_TOKEN": token} if token else {}),
        }
        self.process = None

    def missing(self) -> list[int]:
        """Returns the tasks that are finished and not pushed."""
        return missing_tasks(self.output_dir, self.hub_model_id, self.revision)

    def start(self) -> None:
        """
        Lets a child push what is missing, and does not wait for it. One that is at work takes up what is finished
        meanwhile; what it leaves, the next call or [`finish`] does.
        """
        if (self.process is not None and self.process.poll() is None) or not self.missing():
            return
        # Linux tells it of the end of the thread that started it: the main one.
        command = [*self.command, "--parent_pid", str(os.getpid())]
        (self.output_dir / LOG_NAME).parent.mkdir(exist_ok=True)
        with open(self.output_dir / LOG_NAME, "ab") as log:
            # In its own session: Ctrl-C is the trainer's, whose end it follows.
            self.process = subprocess.Popen(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def finish(self, timeout: float) -> list[str]:
        """
        Returns a sentence for each task that is not pushed, once nothing is missing, or a last try was made, or so many
        seconds have passed. Ends the child.
        """
        deadline = time.monotonic() + timeout
        self._wait(deadline)
        if time.monotonic() < deadline:
            self.start()
            self._wait(deadline)
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            self._wait(time.monotonic() + SECONDS_TO_STOP)
            self.process.kill()
            self.process.wait()
            reason = f"not pushed within {timeout:g} s"
        else:
            reason = f"not pushed; {self.output_dir / LOG_NAME} says why"
        record = read_record(self.output_dir)["tasks"]
        names = [task_folder("", task).name for task in self.missing()]
        return [f"{name}: {record.get(name, {}).get('error', reason)}" for name in names]

    def _wait(self, deadline: float) -> None:
        """Waits for the child, until a time of `time.monotonic` at most."""
        if self.process is not None:
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(max(0.0, deadline - time.monotonic()))


def finish_push(push: BackgroundPush | None, timeout: float) -> None:
    """Waits for what is still being pushed; raises `PushPendingError` if that takes too long or fails."""
    if push is not None and (pending := push.finish(timeout)):
        raise PushPendingError(f"{'; '.join(pending)}. The same command, or scripts/push.py, pushes what is missing")
