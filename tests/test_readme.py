"""What README says: its commands, the options it names, and its tables, which come from committed results."""

import dataclasses
import json
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from diffusers_cl.config import TrainingConfig, parse_config


ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_two_commands_stand_at_the_top():
    first_block = re.search(r"```bash\n(.*?)```", README, re.DOTALL)[1]
    assert [line.split("#")[0].strip() for line in first_block.strip().splitlines()] == ["make demo", "make test"]
    targets = (ROOT / "Makefile").read_text()
    assert re.search(r"^demo:", targets, re.MULTILINE) and re.search(r"^test:", targets, re.MULTILINE)
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def commands() -> list[list[str]]:
    blocks = re.findall(r"```bash\n(.*?)```", README, re.DOTALL)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines()
    return [line.split("train_continual.py", 1)[1] for line in lines if "train_continual.py" in line]


@pytest.mark.parametrize("command", commands())
def test_training_commands_are_valid(command, monkeypatch):
    import shlex

    monkeypatch.chdir(ROOT)
    parse_config(shlex.split(command))


def test_named_options_exist():
    fields = dataclasses.fields(TrainingConfig)
    values = {value for field in fields for value in typing.get_args(field.type) if isinstance(value, str)}
    named = set(re.findall(r"`(?:--)?([a-z0-9]+(?:_[a-z0-9]+)+)`", README))
    others = {"train_continual", "from_pretrained", "state_dict", "load_state_dict", "save_pretrained"}
    others |= {"fd_classifier", "signal_ratio", "penalty_share"}
    known = {field.name for field in fields} | values | others
    assert named <= known, named - known


def tables() -> list[str]:
    return re.findall(r"<!-- compare_runs.py (.*?) -->", README)


@pytest.mark.parametrize("patterns", tables())
def test_a_table_is_that_of_the_committed_results(patterns):
    files = sorted(str(path) for pattern in patterns.split() for path in ROOT.glob(pattern))
    assert files
    command = [sys.executable, str(ROOT / "scripts" / "compare_runs.py"), *files]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"<!-- compare_runs.py {patterns} -->\n\n{table[: table.index(chr(10) * 2)]}" in README


def test_every_set_of_results_has_its_table():
    shown = {str(Path(pattern).parent) for patterns in tables() for pattern in patterns.split()}
    assert {"results/digits", "results/experiments/weak_replay"} <= shown


def test_recognised_digits_are_those_of_the_committed_results():
    recognised = json.loads((ROOT / "results" / "digits" / "recognised.json").read_text())
    assert all(run["judge"]["test_accuracy"] >= 0.97 for run in recognised)
    default = [run for run in recognised if run["penalty"][0] == "none"]
    default = [run for run in default if run["replay"] == "generative_distillation"]
    assert sorted(run["seed"] for run in default) == [0, 1, 2]
    lowest = sorted(run["lowest"] for run in default)
    assert lowest[0] >= 90
    assert f"{lowest[0]} to {lowest[-1]} of 100" in README


def test_the_time_of_the_demo_is_that_of_the_committed_run():
    seconds = json.loads((ROOT / "results" / "digits" / "demo.json").read_text())["run"]["seconds"]["total"]
    assert f"took {seconds / 60:.1f} minutes" in README
