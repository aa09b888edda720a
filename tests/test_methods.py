"""Every file of configs/methods through `accelerate launch`."""

import json

import pytest
import yaml
from script_helpers import ROOT, arguments, shared_folder, start, tiny_files


METHODS = sorted((ROOT / "configs" / "methods").glob("*.yaml"))


@pytest.mark.parametrize("method", METHODS, ids=[path.stem for path in METHODS])
def test_accelerate_launch(tmp_path_factory, tmp_path, method):
    files = tiny_files(shared_folder(tmp_path_factory) / "tiny")
    settings = {"tasks": "[[0], [1]]", "max_train_steps": 2, "checkpointing_steps": 100}
    launcher = ("-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1")
    launcher += ("--mixed_precision", "no", "--dynamo_backend", "no")
    process = start(files, arguments(files, tmp_path / "run", "--config", str(method), **settings), launcher)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    expected = yaml.safe_load(method.read_text())
    config = yaml.safe_load((tmp_path / "run" / "config.yaml").read_text())
    assert {key: config[key] for key in expected} == expected
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    joint = expected["stream"] == "joint"
    assert [len(row) for row in metrics["metrics"]["accuracy"]["matrix"]] == ([2] if joint else [1, 2])
    # The files of a method are there where it is used.
    last = tmp_path / "run" / ("task-00" if joint else "task-01")
    assert (last / "consolidation" / "ewc.safetensors").exists() == (expected["penalty"] != "none")
    assert (tmp_path / "run" / "replay").exists() == expected["replay"].startswith("generative")
    assert (last / "consolidation" / "memory.safetensors").exists() == (expected["replay"] == "memory")
    assert len((tmp_path / "run" / "logs" / "train_log.jsonl").read_text().splitlines()) == 4
