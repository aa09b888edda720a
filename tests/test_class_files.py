"""An adapted model on the Hub and back, whole and a class alone, and scripts/classes.py."""

import json
import subprocess
import sys

import pytest
import torch
from funlora_helpers import ADAPTED, STRANGER, draw
from hub_helpers import ROOT
from script_helpers import finished_run

from diffusers_cl.class_files import fetch_class
from diffusers_cl.sampling import load_pipeline


pytestmark = pytest.mark.usefixtures("fresh_hub")
SCRIPT = ROOT / "scripts" / "classes.py"

# With the package: no trust, and one class alone.
OWN = """
import sys
import torch
from diffusers_cl import add_class, fetch_class, load_pipeline

repo, whole, alone, results = sys.argv[1:]
pipe = load_pipeline(repo, "cpu")
assert add_class(pipe, fetch_class(whole, "4")) == 4
assert add_class(pipe, fetch_class(alone), name="again") == 5
noise = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
torch.save(pipe(["4", "again"], 3, latents=noise, output_type="latent").images, results)
"""


@pytest.fixture(scope="module")
def adapted_run(tmp_path_factory):
    return finished_run(tmp_path_factory, "adapted", tasks="[[0, 1], [2, 3], [4]]", **ADAPTED)


def python(hub, home, *arguments) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, env=hub.environment(home), cwd=ROOT, text=True, capture_output=True, timeout=240)


def test_there_and_back(hub, client, adapted_run, tmp_path):
    whole, other = adapted_run / "task-02", adapted_run / "task-01"
    for folder, name in ((whole, "me/whole"), (other, "me/other")):
        client.push(folder, name)
    assert "adapters/funlora.py" in hub.head_files("me/whole")
    # By a stranger with diffusers alone, and its code.
    again, results = tmp_path / "again", tmp_path / "images.pt"
    done = python(hub, tmp_path / "stranger", "-c", STRANGER, "me/whole", again, results)
    assert done.returncode == 0, done.stderr[-3000:]
    expected = draw(load_pipeline(whole, "cpu"), "4", "2", "0")
    assert torch.equal(torch.load(results, weights_only=True), expected)
    # A class alone.
    pushed = python(hub, tmp_path / "home", SCRIPT, "--model", whole, "--push", "4", "--repo_id", "me/four")
    assert pushed.returncode == 0 and "me/four has the class 4" in pushed.stdout, pushed.stderr
    files = hub.head_files("me/four")
    assert set(files) - {".gitattributes"} == {"README.md", "class.safetensors"}
    assert files["class.safetensors"] == fetch_class(whole, "4", cache_dir=tmp_path).read_bytes()
    card = files["README.md"].decode()
    assert "# 4: one class" in card and "fetch_class(" in card and "me/four" in card
    hub.requests.clear()
    done = python(hub, tmp_path / "own", "-c", OWN, "me/other", "me/whole", "me/four", results)
    assert done.returncode == 0, done.stderr[-3000:]
    fetched = {request.path for request in hub.requests if "/me/whole/resolve/" in request.path}
    assert fetched and not any("/unet/" in path or path.endswith(".py") for path in fetched)
    # Two classes are two groups of one row, where one class is a group of two.
    expected = draw(load_pipeline(whole, "cpu"), "4", "4")
    assert (torch.load(results, weights_only=True) - expected).abs().max() < 1e-4


def run_script(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], text=True, capture_output=True, cwd=ROOT)


def test_the_script_takes_classes_in_and_out(adapted_run, tmp_path):
    whole, other = adapted_run / "task-02", adapted_run / "task-01"
    file = fetch_class(whole, "4", cache_dir=tmp_path)
    done = run_script("--model", other, "--add", file, "--output_dir", tmp_path / "more")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "added '4' as 4"
    assert done.stdout.splitlines()[1:3] == ["0: '0', in the network", "1: '1', in the network"]
    assert torch.equal(draw(load_pipeline(tmp_path / "more", "cpu"), "4"), draw(load_pipeline(whole, "cpu"), "4"))
    done = run_script("--model", tmp_path / "more", "--remove", "2", "--output_dir", tmp_path / "less")
    assert done.returncode == 0, done.stderr
    less = load_pipeline(tmp_path / "less", "cpu")
    assert list(less.known_classes.values()) == ["0", "1", "3", "4"]
    # Without the last one it is a plain model again.
    for start, class_id in (("less", 3), ("least", 4)):
        target = {"less": "least", "least": "plain"}[start]
        done = run_script("--model", tmp_path / start, "--remove", str(class_id), "--output_dir", tmp_path / target)
        assert done.returncode == 0, done.stderr
    plain = load_pipeline(tmp_path / "plain", "cpu")
    assert plain.adapters is None and list(plain.known_classes) == [0, 1]
    names = json.loads((tmp_path / "less" / "adapters" / "config.json").read_text())["names"]
    assert names == {"3": "3", "4": "4"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--add", "{whole}", "--class_label", "9", "--output_dir", "{new}"], "has no class '9'; it has '0', '1'"),
        (["--add", "{whole}", "--class_label", "0", "--output_dir", "{new}"], "the class '0' has no adapters"),
        (["--add", "{whole}", "--class_label", "2", "--output_dir", "{new}"], "has a class '2' already"),
        (["--remove", "1", "--output_dir", "{new}"], "class 1 has no adapters"),
        (["--name", "x"], "--name belongs to --add"),
        (["--remove", "3"], "--output_dir belongs to --add and --remove"),
        (["--push", "3"], "--repo_id to --push"),
        (["--remove", "3", "--output_dir", "{whole}"], "is not empty"),
    ],
)
def test_what_cannot_be_done_is_one_sentence(adapted_run, tmp_path, arguments, message):
    places = {"whole": adapted_run / "task-02", "new": tmp_path / "new"}
    done = run_script("--model", adapted_run / "task-01", *(part.format_map(places) for part in arguments))
    assert done.returncode == 2 and message in done.stderr and len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "new").exists()
