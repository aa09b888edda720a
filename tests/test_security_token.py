"""A token is in the requests' headers and nowhere else, however it is given: a random one is looked for in every byte."""

import contextlib
import json
import os
import secrets
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from huggingface_hub import constants
from pipeline_helpers import saved_files
from script_helpers import arguments, run
from test_security_source import is_pickle


# The flag last: what says how to go on is of the last run.
WAYS = ("file", "environment", "flag")


@pytest.fixture(scope="module")
def pushed(hub, files, tmp_path_factory):
    """A tiny run that is pushed under three names, with a token of its own each: tokens, exit codes, places, folder."""
    folder = tmp_path_factory.mktemp("pushed")
    tokens = {way: f"hf_{secrets.token_hex(16)}" for way in WAYS}
    (folder / "token.yaml").write_text(yaml.safe_dump({"hub_token": tokens["file"]}))
    given = {"flag": ["--hub_token", tokens["flag"]], "file": ["--config", str(folder / "token.yaml")]}
    settings = {"tasks": "[[0, 1]]", "max_train_steps": 2, "report_to": "tensorboard", "push_to_hub": "true"}
    codes, started = [], []

    class Noted(subprocess.Popen):
        def __init__(self, *args, **options):
            super().__init__(*args, **options)
            started.append([str(self.args), Path(f"/proc/{self.pid}/cmdline").read_text()])

    with pytest.MonkeyPatch.context() as patch, open(folder / "output", "w") as output:
        before = constants.ENDPOINT
        # The script's own requests; its children read their environment.
        patch.setattr(constants, "ENDPOINT", hub.url)
        template = constants.HUGGINGFACE_CO_URL_TEMPLATE.replace(before, hub.url)
        patch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        patch.setattr(constants, "HF_HUB_OFFLINE", False)
        for name in [name for name in os.environ if name.startswith("HF_")]:
            patch.delenv(name)
        for name, value in hub.environment(folder / "home", token=None).items():
            patch.setenv(name, value)
        patch.setattr(subprocess, "Popen", Noted)
        for way, token in tokens.items():
            hub.add_token(token)
            if way == "environment":
                patch.setenv("HF_TOKEN", token)
            command = [*arguments(files, folder / "run", **settings, hub_model_id=f"me/{way}"), *given.get(way, [])]
            patch.setattr(sys, "argv", ["train_continual.py", *command])
            with contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
                codes.append(run(command))
    places = {
        f"request {r.line}": f"{r.path} {dict(r.headers, authorization='')}".encode() + r.body for r in hub.requests
    }
    places |= {f"repo {path}": path.read_bytes() for path in hub.store.folder.rglob("*") if path.is_file()}
    places |= {name: content for name, content in saved_files(folder).items() if name != "token.yaml"}
    return tokens, codes, places | {"command lines": json.dumps(started).encode()}, folder


def test_every_way_is_a_way(hub, pushed):
    tokens, codes, places, folder = pushed
    assert codes == [0, 0, 0], places["output"].decode()
    for way, token in tokens.items():
        assert hub.head_files(f"me/{way}-task-00")["model_index.json"]
        sent = [r for r in hub.requests if r.headers.get("authorization") == f"Bearer {token}"]
        assert [r for r in sent if f"/me/{way}-task-00/commit/" in r.line], way
    assert list((folder / "run" / "logs").rglob("events.*"))


def test_it_is_in_the_header_alone(pushed):
    tokens, _, places, _ = pushed
    assert len(places) > 80 and places["output"] and b"push.py" in places["command lines"]
    assert {"run/config.yaml", "run/status.json", "run/push.json", "run/logs/push.log"} <= set(places)
    for way, token in tokens.items():
        assert [name for name, content in places.items() if token.encode() in content or token in name] == [], way


def test_no_file_of_a_run_that_is_tracked_and_pushed_is_a_pickle(pushed):
    files = [path for path in (pushed[-1] / "run").rglob("*") if path.is_file()]
    assert [path for path in files if is_pickle(path)] == []
