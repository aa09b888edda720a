"""scripts/push.py by hand and in the background of a run, and what else the tests' local Hub serves."""

import json
import os
import runpy
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from hub_helpers import PUSH_SCRIPT, ROOT, run_push, start_push, write_run, write_task
from hub_server import TOKEN
from pipeline_helpers import saved_files

from diffusers_cl.errors import CheckpointError, ConfigError
from diffusers_cl.publish import BackgroundPush


pytestmark = pytest.mark.usefixtures("fresh_hub")
# A trainer that is killed while it pushes.
TRAINER = """
import sys, time
from diffusers_cl.publish import BackgroundPush
push = BackgroundPush(sys.argv[1], "me/orphan", script=sys.argv[2])
push.start()
print(push.process.pid, flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def pushed(hub, saved, tmp_path_factory):
    """A run of two tasks after `push.py`, what that printed, and its requests."""
    run = write_run(tmp_path_factory.mktemp("runs") / "digits", saved, 2)
    hub.requests.clear()
    code, output, errors = run_push(hub, run.parent, run, "--hub_private_repo")
    assert (code, errors) == (0, ""), errors
    return run, output, list(hub.requests)


@pytest.fixture
def in_background(hub, tmp_path, monkeypatch):
    """Returns a function of a run and a hub_model_id that gives a `BackgroundPush`, with the environment of a client."""
    for name in [name for name in os.environ if name.startswith("HF_")]:
        monkeypatch.delenv(name)
    for name, value in hub.environment(tmp_path / "home", token=None).items():
        monkeypatch.setenv(name, value)
    return lambda run, name, **options: BackgroundPush(run, name, script=PUSH_SCRIPT, token=TOKEN, **options)


def wait_for(condition, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def has_ended(pid: int) -> bool:
    """Whether a process is gone, or only waits to be reaped."""
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] == "Z"
    except FileNotFoundError:
        return True


def test_a_run_by_hand(hub, pushed):
    run, output, _ = pushed
    lines = output.splitlines()
    record = json.loads((run / "push.json").read_text())["tasks"]
    for task, line in enumerate(lines):
        name = f"me/digits-task-0{task}"
        commit = hub.store.repos[name]["branches"]["main"]
        assert line == f"task-0{task}: {hub.url}/{name} has it as task-0{task}, commit {commit}"
        assert hub.store.repos[name]["private"] and record[f"task-0{task}"]["commit"] == commit
    assert len(lines) == 2
    # Again: no token is needed for what is done.
    code, output, errors = run_push(hub, run.parent, run, token=None)
    assert (code, errors) == (0, "") and not hub.requests
    assert output.splitlines() == [f"task-0{task}: {hub.url}/me/digits-task-0{task} has it already" for task in (0, 1)]


def test_the_token_is_in_the_header_and_nowhere_else(pushed):
    run, output, requests = pushed
    secret = TOKEN.encode()
    assert len(requests) > 20
    for request in requests:
        # As to a bucket, an upload's URL is all that it takes.
        authorization = request.headers.pop("authorization", None)
        assert authorization == (None if request.method == "PUT" else f"Bearer {TOKEN}")
        assert secret not in request.body and TOKEN not in f"{request.path} {request.headers}"
    assert TOKEN not in output
    assert not [name for name, content in saved_files(run.parent).items() if secret in content]


def test_what_the_hub_serves(hub, pushed):
    url = f"{hub.url}/me/digits-task-00/resolve/task-00/unet/diffusion_pytorch_model.safetensors"
    content = hub.head_files("me/digits-task-00")["unet/diffusion_pytorch_model.safetensors"]
    headers = {"Authorization": f"Bearer {TOKEN}"}
    request = urllib.request.Request(url, headers={**headers, "Range": "bytes=10-19"})
    with urllib.request.urlopen(request) as answer:
        assert answer.status == 206 and answer.read() == content[10:20]
        assert answer.headers["Content-Range"] == f"bytes 10-19/{len(content)}"
        assert answer.headers["X-Repo-Commit"] == hub.store.repos["me/digits-task-00"]["tags"]["task-00"]
        assert answer.headers["X-Linked-Etag"].strip('"') in os.listdir(hub.store.folder / "objects")
    # As on the Hub, who may not read a repo is not told whether it is there.
    for path, sent, expected in (
        ("me/digits-task-00", {}, (401, "RepoNotFound")),
        ("me/nothing", {}, (401, "RepoNotFound")),
        ("me/nothing", headers, (404, "RepoNotFound")),
        ("me/digits-task-00/revision/nothing", headers, (404, "RevisionNotFound")),
    ):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(f"{hub.url}/api/models/{path}", headers=sent))
        assert (refused.value.code, refused.value.headers["X-Error-Code"]) == expected


def test_the_hub_as_a_process_goes_on_with_its_folder(tmp_path):
    command = [sys.executable, str(ROOT / "tests" / "hub_server.py"), "--port", "0", "--folder", str(tmp_path)]
    for status in (200, 409):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            try:
                url, token = process.stdout.readline().split()
                headers = {"Authorization": f"Bearer {token}"}
                request = urllib.request.Request(f"{url}/api/repos/create", b'{"name": "kept"}', headers)
                try:
                    assert urllib.request.urlopen(request).status == status
                except urllib.error.HTTPError as error:
                    assert error.code == status
            finally:
                process.terminate()


def test_what_is_not_a_run_is_refused(hub, pushed, saved, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    script = runpy.run_path(str(PUSH_SCRIPT))

    def push(*arguments):
        script["push"](script["parse_args"]([str(argument) for argument in arguments]))

    with pytest.raises(ConfigError, match="task-00 is the folder of a task, pass the run's: .*digits$"):
        push(pushed[0] / "task-00")
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(ConfigError, match="is not the folder of a run"):
            push(folder)
    (tmp_path / "config.yaml").write_text("- [")
    with pytest.raises(ConfigError, match="config.yaml cannot be read"):
        push(tmp_path)
    (tmp_path / "config.yaml").write_text("{}")
    (tmp_path / "push.json").write_text("{")
    with pytest.raises(CheckpointError, match="push.json cannot be read"):
        push(tmp_path)


def test_exit_codes_and_the_runs_own_configuration(hub, saved, tmp_path):
    config = "hub_model_id: lab/own\nhub_revision: dev\nhub_private_repo: true\n"
    run = write_run(tmp_path / "run", saved, 2, config)
    hub.add_token("hf_member", name="her", orgs={"lab": "admin"})
    (run / "task-00" / "README.md").unlink()
    code, output, errors = run_push(hub, tmp_path, run, token="hf_member")
    assert code == 8 and errors == f"push.py: error: 1 task(s) of {run} not pushed; the same command tries again\n"
    assert "task-00: not pushed: " in output and "README.md is missing" in output and "Traceback" not in output
    repo = hub.store.repos["lab/own-task-01"]
    assert repo["private"] and repo["tags"]["task-01"] == repo["branches"]["dev"] != repo["branches"]["main"]
    arguments = ("--hub_model_id", "me/refused", "--hub_token", "hf_nobody")
    code, output, errors = run_push(hub, tmp_path, run, *arguments, token=None)
    assert code == 2 and errors.startswith("push.py: error: hub_token is not a token that http://127.0.0.1")
    assert errors.count("\n") == 1 and "hf_nobody" not in f"{output}{errors}"


def test_two_pushes_at_once_push_everything_once(hub, saved, tmp_path):
    run = write_run(tmp_path / "run", saved, 2)
    hub.fail("POST .*/commit/", delay=1.5)
    # The second one starts when the first one is at work.
    first = start_push(hub, tmp_path / "home", run, "--hub_model_id", "me/twice")
    wait_for(lambda: hub.sent("repos/create"))
    second = start_push(hub, tmp_path / "home", run, "--hub_model_id", "me/twice")
    outputs = [process.communicate(timeout=120) for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), outputs
    assert outputs[1][0].splitlines()[0] == "waiting for another push of this run"
    assert len(hub.sent("/commit/")) == len(hub.sent("/tag/")) == 2
    assert not [output for output, _ in outputs if "not pushed" in output]


def test_in_the_background(hub, saved, tmp_path, in_background):
    run = write_run(tmp_path / "run", saved, 1)
    push = in_background(run, "me/background", private=True, revision="dev")
    hub.fail("POST .*/commit/", delay=0.5)
    start = time.monotonic()
    push.start()
    child = push.process
    # One that is at work is left alone, and takes up what comes.
    write_task(run, saved, 1)
    push.start()
    assert push.process is child and time.monotonic() - start < 5
    assert not [part for part in child.args if TOKEN in part]
    assert push.finish(120) == [] and child.poll() is not None
    for repo in (hub.store.repos["me/background-task-00"], hub.store.repos["me/background-task-01"]):
        assert repo["private"] and list(repo["tags"].values()) == [repo["branches"]["dev"]]
    assert not [name for name, content in saved_files(run).items() if TOKEN.encode() in content]
    log = (run / "logs" / "push.log").read_text()
    assert log.count(" has it as ") == 2 and len(hub.sent("/commit/")) == 2
    # Nothing is missing: no child.
    push.start()
    assert push.process.args == child.args and push.finish(0) == []


def test_what_is_still_missing_after_the_timeout(hub, saved, tmp_path, in_background):
    run = write_run(tmp_path / "run", saved, 2)
    hub.fail("repos/create", times=9, delay=60)
    push = in_background(run, "me/slow")
    start = time.monotonic()
    push.start()
    assert push.finish(1.0) == [f"task-0{task}: not pushed within 1 s" for task in (0, 1)]
    assert push.process.poll() is not None and time.monotonic() - start < 10
    # Nobody is there, or what is there cannot be pushed.
    push.environment["HF_ENDPOINT"] = "http://127.0.0.1:9"
    assert push.finish(1.0) == [f"task-0{task}: not pushed within 1 s" for task in (0, 1)]
    hub.failures.clear()
    (run / "task-00" / "README.md").unlink()
    push.environment["HF_ENDPOINT"] = hub.url
    assert push.finish(60.0) == [f"task-00: {run / 'task-00'}: README.md is missing"]
    push.environment["HF_TOKEN"] = "hf_nobody"
    write_task(run, saved, 0)
    (pending,) = push.finish(60.0)
    assert pending.startswith("task-00: hub_token is not a token that ")


def test_the_child_ends_with_its_trainer(hub, saved, tmp_path):
    run = write_run(tmp_path / "run", saved, 1)
    hub.fail("repos/create", delay=60)
    command = [sys.executable, "-c", TRAINER, str(run), str(PUSH_SCRIPT)]
    trainer = subprocess.Popen(command, env=hub.environment(tmp_path), cwd=ROOT, stdout=subprocess.PIPE, text=True)
    with trainer:
        child = int(trainer.stdout.readline())
        wait_for(lambda: hub.sent("repos/create"))
        assert not has_ended(child)
        trainer.kill()
        wait_for(lambda: has_ended(child))
