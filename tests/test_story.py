"""
The whole story in a few steps: published task by task, deleted, gone on from on another machine with other data. `make
story` tells it for real.
"""

import json
import shutil
import subprocess
import sys

import pytest
import yaml
from hub_server import TOKEN, HubServer
from huggingface_hub import ModelCard
from script_helpers import ROOT, arguments, write_images


UNET = "unet/diffusion_pytorch_model.safetensors"
MODEL = "me/tiny"
# Of going on; also what makes the files of the first run small.
SHORT = ["--max_train_steps", "2", "--report_to", "none", "--num_threads", "1"]
PUSH = ["--push_to_hub", "--hub_model_id", MODEL]


def train(hub, home, command, token=TOKEN) -> subprocess.CompletedProcess:
    """Runs the script with the real clients, as a user would."""
    return subprocess.run(
        [sys.executable, str(ROOT / "train_continual.py"), *map(str, command)],
        env=hub.environment(home, token) | {"ACCELERATE_USE_CPU": "1"},
        cwd=ROOT,
        text=True,
        capture_output=True,
    )


def card_of(hub, repo_id: str) -> ModelCard:
    return ModelCard(hub.head_files(repo_id)["README.md"].decode())


@pytest.fixture(scope="module")
def story(files, tmp_path_factory):
    """A hub with what two people pushed, and the second one's run; of the first there is nothing left."""
    folder = tmp_path_factory.mktemp("story")
    with HubServer(folder / "hub") as hub:
        first = arguments(files, folder / "first" / "run", *PUSH, hub_private_repo="true", max_train_steps=2)
        done = train(hub, folder / "first" / "home", [*first, "--hub_token", TOKEN], token=None)
        assert done.returncode == 0, done.stderr
        written = [path for path in (folder / "first").rglob("*") if path.is_file() and "home" not in path.parts]
        assert len(written) > 20 and not [path for path in written if TOKEN.encode() in path.read_bytes()]
        assert TOKEN not in done.stdout + done.stderr
        run_before = {
            "config": yaml.safe_load((folder / "first" / "run" / "config.yaml").read_text()),
            "status": json.loads((folder / "first" / "run" / "status.json").read_text()),
            "metrics": json.loads((folder / "first" / "run" / "metrics.json").read_text()),
        }
        shutil.rmtree(folder / "first")
        data = write_images(folder / "data", {"10": 12, "apple": 12})
        start = ["--pretrained_model_name_or_path", f"{MODEL}-task-01", "--revision", "task-01"]
        second = [*start, "--train_data_dir", data, "--output_dir", folder / "run", *SHORT]
        done = train(hub, folder / "home", [*second, *PUSH])
        assert done.returncode == 0, done.stderr
        yield hub, folder, run_before, second


def test_every_task_is_a_repo_with_its_tag_and_lineage(story):
    hub, folder, _, _ = story
    repos = {name: hub.store.repos[name] for name in sorted(hub.store.repos)}
    assert list(repos) == [f"{MODEL}-task-{task:02d}" for task in range(3)]
    for task, name in enumerate(repos):
        assert repos[name]["tags"] == {f"task-{task:02d}": repos[name]["branches"]["main"]}
        card = card_of(hub, name)
        assert card.data.base_model == (f"{MODEL}-task-{task - 1:02d}" if task else None)
        assert card.data.library_name == "diffusers" and card.data.model_name is not None
        # The clean folder and nothing else.
        manifest = json.loads(hub.head_files(name)["consolidation/manifest.json"])["sha256"]
        assert set(hub.head_files(name)) == {*manifest, "consolidation/manifest.json", ".gitattributes"}
    state = json.loads(hub.head_files(f"{MODEL}-task-02")["consolidation/state.json"])
    commit = repos[f"{MODEL}-task-01"]["branches"]["main"]
    assert state["lineage"]["previous"] == {"model": f"{MODEL}-task-01", "revision": commit}


def test_no_path_and_no_token_is_published(story):
    hub, folder, before, _ = story
    assert "hub_token" not in before["config"] and "--hub_token" not in before["status"]["command"]
    for task in range(3):
        for name, content in hub.head_files(f"{MODEL}-task-{task:02d}").items():
            assert TOKEN.encode() not in content, name
            # The extractor of this test lies in a folder, which the state has to name.
            if name != "consolidation/state.json":
                assert str(folder).encode() not in content, name


def test_what_was_learned_elsewhere_is_measured_here(story):
    hub, folder, before, _ = story
    metrics = json.loads((folder / "run" / "metrics.json").read_text())
    assert metrics["tasks"] == [["0", "1"], ["2", "3"], ["10", "apple"]]
    matrix = metrics["metrics"]["fd_features"]["matrix"]
    assert matrix[:2] == before["metrics"]["metrics"]["fd_features"]["matrix"]
    assert len(matrix[2]) == 3 and None not in matrix[2]
    record = json.loads((folder / "run" / "push.json").read_text())["tasks"]
    assert list(record) == ["task-02"], "the task that it went on from is not its own"
    # The model on the Hub is the one here.
    assert hub.head_files(f"{MODEL}-task-02")[UNET] == (folder / "run" / "task-02" / UNET).read_bytes()


def test_the_same_command_again_does_nothing(story):
    hub, folder, _, second = story
    writing = "^(PUT|POST) .*(commit|lfs|preupload)"
    num_requests = len(hub.sent(writing))
    done = train(hub, folder / "home", [*second, *PUSH])
    assert done.returncode == 0 and "is finished" in done.stdout, done.stderr
    assert len(hub.sent(writing)) == num_requests > 0


FETCH = """
import json, sys
from diffusers_cl import endpoint
from diffusers_cl.errors import RunError
from diffusers_cl.start import fetch_task
endpoint.FIRST_WAIT = 0.05
for line in sys.stdin:
    try:
        start = fetch_task(**json.loads(line))
        print(json.dumps([0, start.revision]), flush=True)
    except RunError as error:
        print(json.dumps([error.exit_code, str(error)]), flush=True)
"""


def test_what_cannot_be_fetched_is_one_sentence(story, tmp_path):
    hub, _, _, _ = story
    model, commit = f"{MODEL}-task-01", hub.store.repos[f"{MODEL}-task-01"]["branches"]["main"]
    # A repo that is none of ours, and one of which a file was exchanged.
    files = hub.store.files(hub.store.repos[model], "main")
    for name, change in (
        ("me/plain", {"consolidation/state.json": None}),
        ("me/tampered", {UNET: files["samples.png"]}),
    ):
        changed = {path: file for path, file in ({**files, **change}).items() if file is not None}
        hub.store.repos[name] = {"private": False, "branches": {}, "tags": {}, "commits": {}}
        hub.store._commit(name, "main", None, "made by hand", changed)
    process = subprocess.Popen(
        [sys.executable, "-c", FETCH],
        env=hub.environment(tmp_path / "home", token=None),
        cwd=ROOT,
        text=True,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )

    def fetch(**options):
        process.stdin.write(json.dumps(options) + "\n")
        process.stdin.flush()
        return json.loads(process.stdout.readline())

    for options, code, words in (
        ({"model": model}, 2, ["private", "hub_token"]),
        ({"model": model, "token": TOKEN, "revision": "task-09"}, 2, ["no such branch, tag or commit", "task-09"]),
        ({"model": "me/plain"}, 2, ["me/plain has no consolidation/state.json", "scripts/adopt.py"]),
        ({"model": "me/tampered"}, 4, [UNET, "damaged"]),
        ({"model": "me/nothing"}, 2, ["no such repo"]),
    ):
        found, text = fetch(**options)
        assert found == code and "\n" not in text and all(word in text for word in words), text
    # Now and then a server is busy.
    hub.fail("GET /api/models/me/tiny-task-01", times=1, status=429, headers={"Retry-After": "0"})
    hub.fail("GET /api/models/me/tiny-task-01", times=1, status=503)
    assert fetch(model=model, token=TOKEN) == [0, commit]
    # What is in the cache is not taken for what was asked for.
    hub.fail("GET /api/models/me/tiny-task-01", times=99, status=503)
    found, text = fetch(model=model, token=TOKEN)
    hub.failures.clear()
    assert found == 3 and "cannot be fetched" in text and "503" in text
    process.stdin.close()
    assert process.wait(30) == 0
