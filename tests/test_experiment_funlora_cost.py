"""What an adapted step costs: the lines of scripts/experiments/funlora_cost.py, and that they are of what they say."""

import json
import runpy
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "scripts" / "experiments" / "funlora_cost.py"


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT), run_name="script")


def test_lines(script):
    found = script["lines"](torch.device("cpu"), 2, classes=(1, 2))
    assert [line["what"].split(",")[:2] for line in found] == [
        ["a step", " 1 classes in the batch"],
        ["a step", " 2 classes in the batch"],
        ["a forward pass without gradients", " 1 classes in the batch"],
        ["a forward pass without gradients", " 2 classes in the batch"],
    ]
    assert all(0.2 < line["ratio"] < 20 and line["repetitions"] == 2 for line in found)


def test_only_the_classes_train(script):
    unet = script["network"]("digits", torch.device("cpu"))
    model = script["adapted"](unet, 2)
    assert {name.split(".")[2] for name, p in model.named_parameters() if p.requires_grad} == {"2", "3"}


def test_the_committed_cost_is_within_the_limit():
    """A step with the two classes of a task costs at most twice a plain one."""
    content = json.loads((ROOT / "results" / "funlora" / "cost.json").read_text())
    step = next(line for line in content["rows"] if line["what"].startswith("a step, 2 classes"))
    assert step["ratio"] <= 2.0 and step["reached"]
    readme = " ".join((ROOT / "README.md").read_text().split())
    eight = next(line for line in content["rows"] if line["what"].startswith("a step, 8 classes"))
    assert (
        f"{step['ratio']:.2f} times a plain one with two classes in the batch, {eight['ratio']:.2f} with eight"
        in readme
    )
