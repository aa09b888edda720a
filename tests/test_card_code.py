"""The model card's code blocks run as they stand."""

import json
import re
import shlex
import subprocess
import sys

import numpy as np
import pytest
from hub_server import HubServer
from pipeline_helpers import tiny_pipeline
from test_card import parts

from diffusers_cl.card import model_card
from diffusers_cl.config import TrainingConfig


# The first one is what the card draws: its id is not 0, and its name is no plain string.
CLASSES = {1: 'it\'s a "cat"\n', 3: "dog"}
DISTANCE = {"matrix": [[1.0]], "average": [1.0], "learning": 1.0, "forgetting": 0.0, "worst": 1.0}
REPO = "me/animals-task-00"
RUNNER = """
import json, sys

import huggingface_hub
import numpy as np

folder, repo, blocks, results = sys.argv[1:]
huggingface_hub.create_repo(repo)
huggingface_hub.upload_folder(repo_id=repo, folder_path=folder)
trusting, own, zero_trust = json.loads(blocks)
images = {}


def repo_code():
    return [name for name in sys.modules if name.startswith("diffusers_modules.")]


def run(name, block):
    names = {}
    exec(compile(block, name, "exec"), names)
    images[name] = np.asarray(names["image"])
    again = block[block.index("generator = ") :].replace("generator=generator", 'generator=generator, output_type="np"')
    exec(compile(again, name, "exec"), names)
    images[name + " float"] = names["image"]


run("zero trust", zero_trust)
assert "diffusers_cl" not in sys.modules
run("own", own)
assert not repo_code(), "code of the repo was run"
run("trusting", trusting)
assert repo_code()
huggingface_hub.constants.HF_HUB_OFFLINE = True
run("offline", own)
np.savez(results, **images)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model's folder with its card."""
    pipeline = tiny_pipeline(id2label=CLASSES)
    folder = tmp_path_factory.mktemp("card") / "task-00"
    pipeline.save_pretrained(folder)
    _, state, metrics, config = parts(folder.parent, DISTANCE, [list(CLASSES.values())])
    (folder / "README.md").write_text(model_card(pipeline, state, metrics, config, REPO), "utf-8")
    return folder


def blocks(folder, language: str) -> list[str]:
    return re.findall(
        rf"^```{language}\n(.*?)^```$", (folder / "README.md").read_text("utf-8"), re.DOTALL | re.MULTILINE
    )


def test_python_blocks_draw_one_image(folder, tmp_path):
    found = blocks(folder, "python")
    assert len(found) == 3
    with HubServer(tmp_path / "hub") as hub:
        process = subprocess.run(
            [sys.executable, "-I", "-c", RUNNER, folder, REPO, json.dumps(found), tmp_path / "images.npz"],
            cwd=tmp_path,
            env=hub.environment(tmp_path / "hf"),
            capture_output=True,
            text=True,
        )
        assert process.returncode == 0, process.stderr
        (validated,) = {json.loads(request.body)["content"] for request in hub.sent("POST /api/validate-yaml")}
    assert validated == (folder / "README.md").read_text("utf-8")
    with np.load(tmp_path / "images.npz") as images:
        assert images["trusting"].shape == (8, 8) and images["trusting"].std() > 0
        for name in ("own", "zero trust", "offline"):
            assert np.array_equal(images[f"{name} float"], images["trusting float"])
            # diffusers and ours round to bytes in other ways, which may differ in a tie.
            assert np.abs(images[name].astype(int) - images["trusting"]).max() <= 1


def test_the_command_has_options_of_the_script(folder):
    (command,) = blocks(folder, "bash")
    launcher, script, *options = shlex.split(command.removeprefix("accelerate "))
    assert (launcher, script) == ("launch", "train_continual.py")
    options = dict(zip(options[::2], options[1::2], strict=True))
    assert options == {"--pretrained_model_name_or_path": REPO, "--train_data_dir": "my_new_classes/"}
    assert all(hasattr(TrainingConfig, option.removeprefix("--")) for option in options)
