"""What is taken of a repo: files by their names and sizes, and of one commit; the rest is not even asked for."""

import json
from pathlib import Path

import pytest
from hostile_helpers import INDEX, STATE, WEIGHTS, brackets, pickled, write, write_good
from hub_helpers import ClientError
from pipeline_helpers import saved_files


pytestmark = pytest.mark.usefixtures("fresh_hub")
FETCH = "__import__('importlib').import_module('diffusers_cl.fetch')"
PIPELINE = f"str({FETCH}.model_folder(model, None, {FETCH}.PIPELINE_FILES)[0])"
TASK = "str(__import__('importlib').import_module('diffusers_cl.start').fetch_task(model).folder)"
DOWNLOADS = r"^GET .*/resolve/"
# Code, pickles and odd names, beside what a model has.
STRANGE = (
    *("funlora.py", "unet/evil.py", "unet/diffusion_pytorch_model.bin", "optimizer.pt", "unet/a/config.json"),
    *("notes.md", "unet/../../up.json", "/abs.json", "adapters/evil.py", "adapters/a/config.json"),
)


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> Path:
    write_good(folder := tmp_path_factory.mktemp("good"))
    return folder / "task"


def publish(hub, name: str, files: dict[str, bytes], **sizes: int) -> None:
    """Makes a repo by hand, with any names; `sizes` are what the Hub says of some files."""
    hub.store.repos[name] = {"private": False, "branches": {}, "tags": {}, "commits": {}}
    stored = {path: hub.store._file(content) for path, content in files.items()}
    for path, size in sizes.items():
        stored[path]["size"] = size
    hub.store._commit(name, "main", None, "made by hand", stored)


def test_only_allowed_files_are_asked_for(hub, client, task):
    good = saved_files(task)
    publish(hub, "me/strange", {**dict.fromkeys(STRANGE, b"import os"), **good})
    folder = Path(client(PIPELINE, model="me/strange"))
    wanted = {"model_index.json", "unet/config.json", WEIGHTS, "scheduler/scheduler_config.json"}
    assert set(saved_files(folder)) == wanted
    assert {request.path.rpartition("/resolve/")[2].partition("/")[2] for request in hub.sent(DOWNLOADS)} == wanted
    # A task folder: what its manifest names, which has our own pipeline.py and no other.
    hub.requests.clear()
    folder = Path(client(TASK, model="me/strange"))
    names = set(json.loads(good["consolidation/manifest.json"])["sha256"])
    asked = {request.path.rpartition("/resolve/")[2].partition("/")[2] for request in hub.sent(DOWNLOADS)}
    assert asked <= names | {"consolidation/manifest.json"} and {STATE, "pipeline.py"} <= asked
    assert not set(STRANGE) & set(saved_files(folder))


def test_a_file_that_is_too_large_is_not_fetched(hub, client, task):
    for name, size in ((WEIGHTS, 64 * 2**30 + 1), ("model_index.json", 64 * 2**20 + 1)):
        publish(hub, "me/large", saved_files(task), **{name: size})
        for code in (PIPELINE, TASK):
            with pytest.raises(ClientError, match=f"CheckpointError: me/large/{name} has {size:,} bytes; allowed"):
                client(code, model="me/large")
    assert hub.sent("GET /api/models/me/large") and not hub.sent("/resolve/")
    # What would not be taken may have any size.
    publish(hub, "me/beside", {**saved_files(task), "video.mp4": b""}, **{"video.mp4": 2**40})
    assert client(PIPELINE, model="me/beside")


def test_what_is_fetched_is_checked_too(hub, client, task, tmp_path):
    good = saved_files(task)
    write(tmp_path / "index", {"weight_map": {"a": "../../../../../secret.safetensors"}})
    for number, (name, content, words) in enumerate(
        [
            (WEIGHTS, pickled(tmp_path / "canary", 6), "is damaged, or no safetensors file"),
            (INDEX, (tmp_path / "index").read_bytes(), "names '../../../../../secret.safetensors'; allowed"),
            ("model_index.json", brackets(tmp_path, 0).encode(), "model_index.json cannot be read"),
        ]
    ):
        publish(hub, f"me/hostile-{number}", {**good, name: content})
        with pytest.raises(ClientError, match=f"CheckpointError: .*{words}"):
            client(PIPELINE, model=f"me/hostile-{number}")
    assert not (tmp_path / "canary").exists()


def test_a_manifest_names_files_of_a_task_alone(hub, client, task):
    good = saved_files(task)
    for name in ("../../up.json", "/etc/passwd", "evil.py", "unet/*", "consolidation/../../up.json"):
        sums = json.loads(good["consolidation/manifest.json"])["sha256"] | {name: "0" * 64}
        publish(hub, "me/names", {**good, "consolidation/manifest.json": json.dumps({"sha256": sums}).encode()})
        with pytest.raises(ClientError, match="CheckpointError: me/names: .* is no file of a task folder"):
            client(TASK, model="me/names")


def test_a_repo_without_any_of_the_files(hub, client):
    publish(hub, "me/empty", {"README.md": b"# Nothing", "evil.py": b""})
    assert saved_files(Path(client(PIPELINE, model="me/empty"))) == {}
    assert not hub.sent(DOWNLOADS)
