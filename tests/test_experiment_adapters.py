"""scripts/experiments/adapters.py: the adapters that FunLoRA is compared with, and that README says what the results do."""

import importlib.util
import json
import re
import sys

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from funlora_helpers import ADAPTED
from script_helpers import ROOT, finished_run

from diffusers_cl.errors import ConfigError


FOLDER = ROOT / "scripts" / "experiments"
README = (ROOT / "README.md").read_text()
RESULTS = sorted((ROOT / "results" / "funlora" / "adapters").glob("*.json"))


def load(name: str, as_name: str):
    """A script by name; what it imports from its folder stays."""
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location(as_name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


experiment = load("adapters", "experiment_adapters")
COMPARED = {
    **ADAPTED,
    "max_grad_norm": 1.0,
    "gradient_accumulation_steps": 2,
    "random_flip": "true",
    "generated_classifier_images": 2,
    "checkpointing_steps": 100,
    "max_train_steps": 3,
}


@pytest.fixture(scope="module")
def adapted_run(tmp_path_factory):
    return finished_run(tmp_path_factory, "compared", tasks="[[0, 1], [2, 3], [4]]", **COMPARED)


@pytest.fixture(autouse=True)
def process():
    """Threads and Accelerate's state are put back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def test_a_run_and_its_table(adapted_run, tmp_path, capsys):
    compared = ("scale_shift", "lora_attention")
    output = tmp_path / "file.json"
    command = [str(adapted_run), "--output", str(output), "--kinds"]
    assert experiment.main([*command, "funlora", *compared]) == 0
    content = json.loads(output.read_text())
    run, rows = content["run"], {row["kind"]: row for row in content["rows"]}
    # The loop is that of the run: its own adapters come out bit by bit, and are measured the same.
    again = rows["funlora"]
    assert again["that_of_the_run"] and again["per_task"] == run["per_task"]
    assert again["classification"] == run["classification"]
    assert again["parameters_per_class"] == run["parameters"]["per_class"]
    for kind in compared:
        assert rows[kind]["first_task_unchanged"] and rows[kind]["steps"] == [3, 3]
        assert rows[kind]["per_task"] != run["per_task"] and rows[kind]["learning_rate"] == 0.01
        assert len(rows[kind]["classification"]["matrix"]) == 3
        assert rows[kind]["classification"]["matrix"][0] == run["classification"]["matrix"][0]
        assert ("peft" in rows[kind]["versions"]) == (kind in ("lora_attention", "lora_conv_v2"))
    assert str(tmp_path) not in output.read_text() and str(adapted_run) not in output.read_text()
    # What is there stays; another learning rate is another row.
    text = output.read_text()
    assert experiment.main([*command, "scale_shift"]) == 0 and output.read_text() == text
    assert experiment.main([*command, "scale_shift", "--learning_rate", "0.1"]) == 0
    capsys.readouterr()
    assert experiment.main(["--table", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = "method | learning rate | seeds | PPC | fd_classifier | recall"
    assert len(lines) == 2 + 1 + len(compared) + 1 and lines[0].startswith(f"| {heads.split(' | fd')[0]} |")
    assert lines[2].startswith("| FunLoRA (cosine) | 0.01 | 0 |") and lines[-1].startswith(
        "| scale and shift | 0.1 | 0 |"
    )
    assert any(line.startswith("| LoRA, attention (r = 2) | 0.01 |") for line in lines)


def test_what_cannot_be_compared(adapted_run, tmp_path, capsys):
    output = tmp_path / "file.json"
    assert experiment.main([str(tmp_path), "--output", str(output)]) == 2
    metrics = json.loads((adapted_run / "metrics.json").read_text())
    metrics["config"]["adapter"] = "none"
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    assert experiment.main([str(tmp_path), "--output", str(output)]) == 2
    assert "a run of --adapter funlora" in capsys.readouterr().err and not output.exists()
    output.write_text(json.dumps({"run": {"name": "another"}, "rows": []}))
    assert experiment.main([str(adapted_run), "--output", str(output)]) == 2
    assert "is of another run" in capsys.readouterr().err


def content(seed: int, distance: float, la: float, seconds: float) -> dict:
    classification = {"la": la, "aia": la}
    measured = {"per_task": {"fd": [distance, 2.0]}, "classification": classification, "learning_rate": 0.1}
    run = {"name": f"run{seed}", "method": "FunLoRA (cosine)", "seed": seed, "tasks": [["0"]], "metric": "fd"}
    run |= {"config": {"seed": seed, "steps": 5}, "parameters": {"per_class": 3254}, "device": "cpu", **measured}
    row = {"kind": "lora_conv_v1", "rank": 1, "parameters_per_class": 900, **measured}
    row |= {"seconds": seconds, "cpu_seconds": seconds}
    return {"run": run, "rows": [row, {**row, "kind": "funlora", "cpu_seconds": 2 * seconds}]}


def test_means_over_seeds():
    contents = [content(0, 1.0, 0.5, 10.0), content(1, 3.0, 0.7, 12.0)]
    own, lora = experiment.summarize(contents)
    assert own["fd"] == [2.0, 0.5] and own["la"] == pytest.approx([0.6, 0.1]) and own["cpu_seconds"] == [22.0, 2.0]
    assert lora["seeds"] == [0, 1] and lora["recall"] is None
    assert experiment.table([own, lora]).splitlines() == [
        "| method | learning rate | seeds | PPC | fd | recall | accuracy | LA | AIA | CPU seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| FunLoRA (cosine) | 0.1 | 0, 1 | 3.25K | 2.00 \u00b1 0.50 | n/a | n/a | 0.600 \u00b1 0.100 | 0.600 \u00b1 0.100 | 22.0 \u00b1 2.0 |",
        "| LoRA, convolutions, v1 (r = 1) | 0.1 | 0, 1 | 900 | 2.00 \u00b1 0.50 | n/a | n/a | 0.600 \u00b1 0.100 | 0.600 \u00b1 0.100 | 11.0 \u00b1 1.0 |",
    ]
    with pytest.raises(ConfigError, match="each once"):
        experiment.summarize([contents[0]] * 2)
    contents[1]["run"]["config"]["steps"] = 6
    with pytest.raises(ConfigError, match="run1 and run0 cannot stand in one table: .'steps'"):
        experiment.summarize(contents)


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_results_are_of_the_runs_network(file):
    content = json.loads(file.read_text())
    (again,) = (row for row in content["rows"] if experiment.is_again(row, content["run"]))
    # Of another machine, it may end in other digits.
    assert again["that_of_the_run"] and again["classification"] == content["run"]["classification"]
    assert all(row["first_task_unchanged"] for row in content["rows"])
    assert {row["commit"].split("-")[0] for row in content["rows"]}


def test_the_table_in_readme_is_that_of_the_results():
    ((pattern, table),) = re.findall(r"<!-- adapters.py (.*?) -->\n\n(.*?)\n\n", README, re.DOTALL)
    contents = [json.loads(path.read_text()) for path in sorted(ROOT.glob(pattern))]
    assert table == experiment.table(experiment.summarize(contents))
    assert (RESULTS[0].parent / "table.md").read_text() == f"{table}\n" and len(contents) == len(RESULTS)


def test_what_readme_says_of_the_table_is_in_the_results():
    own, *others = experiment.summarize([json.loads(path.read_text()) for path in RESULTS])
    rows = {row["method"].removesuffix(" (r = 1)"): row for row in others}
    names = ("LoRA, convolutions, v1", "LoRA, convolutions, v2", "scale and shift")
    metric = next(key for key in own if key.startswith("fd_"))
    v1, v2, scale = (rows[name] for name in names)
    distances = [f"{row[metric][0]:.2f}" for row in (own, v1, v2, scale)]
    times = [f"{row['parameters_per_class'] / own['parameters_per_class']:.1f}" for row in (v1, v2)]
    text = " ".join(README.split())
    said = f"nearer than FunLoRA ({distances[1]} for v1 and {distances[2]} for v2, against {distances[0]})"
    assert f"{said} with {times[0]} and {times[1]} times the parameters" in text
    assert f"with fewer is farther ({distances[3]})" in text
    la = [row["la"][0] for row in (own, v1, v2, scale)]
    assert f"lies between {min(la):.3f} and {max(la):.3f}" in text
    embedding = rows["class embedding alone"]
    assert f"alone {embedding[metric][0]:.1f} and LA {embedding['la'][0]:.2f}" in text
