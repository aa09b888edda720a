"""What README says: its commands, the options it names, and its tables, which come from committed results."""

import dataclasses
import json
import re
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from diffusers_cl.arguments import parse_config
from diffusers_cl.comparison import compare
from diffusers_cl.config import TrainingConfig
from diffusers_cl.plots import format_number
from diffusers_cl.report import read_json
from diffusers_cl.results import load_run
from diffusers_cl.tables import format_count, render_latex, render_markdown, to_markdown


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


def test_the_table_of_costs_is_that_of_the_results():
    (files,) = re.findall(r"<!-- benchmark.py (.*?) -->", README)
    command = [sys.executable, str(ROOT / "scripts" / "benchmark.py"), "--table", *files.split()]
    table = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    assert len(table.splitlines()) > 20
    assert f"<!-- benchmark.py {files} -->\n\n{table}\n" in README


def tables() -> list[str]:
    return re.findall(r"<!-- compare_runs.py (.*?) -->", README)


@pytest.mark.parametrize("patterns", tables())
def test_a_table_is_that_of_the_committed_results(patterns):
    files = sorted(str(path) for pattern in patterns.split() for path in ROOT.glob(pattern))
    assert files
    command = [sys.executable, str(ROOT / "scripts" / "compare_runs.py"), *files]
    table = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert f"<!-- compare_runs.py {patterns} -->\n\n{table[: table.index(chr(10) * 2)]}" in README


def test_the_published_table_is_that_of_the_file():
    published = read_json(ROOT / "results" / "published.json")
    found = published["classification"]
    rows = [["published", *found["columns"]]]
    for name, (la, hours, millions, per_class) in found["methods"].items():
        rows.append([name, f"{la:.2f}", f"{hours:.1f}", f"{millions:g}", format_count(per_class)])
    table = to_markdown(rows)
    assert f"<!-- published.json classification -->\n\n{table}\n" in README
    assert "| FunLoRA | 84.02 | 5.1 | 35.84 | 10.0K |" in table and "| JDCL | 83.69 | 26.9 | 52.4 | n/a |" in table


FOLDERS = sorted({path.parent for path in (ROOT / "results").rglob("*-seed*.json") if path.parent.name != "sweep"})


@pytest.mark.parametrize("folder", FOLDERS, ids=[folder.name for folder in FOLDERS])
def test_every_set_of_results_has_its_table(folder):
    runs = [load_run(path) for path in sorted(folder.glob("*-seed*.json"))]
    table = compare(runs, published=read_json(ROOT / "results" / "published.json"))
    assert (folder / "table.md").read_text() == render_markdown(table, per_task=True)
    assert (folder / "table.tex").read_text() == render_latex(table)
    assert str(folder.relative_to(ROOT)) in README


def means(folder: str, metric: str) -> dict[str, tuple]:
    runs = [load_run(path) for path in sorted((ROOT / "results" / folder).glob("*-seed*.json"))]
    return {row["method"]: row for row in compare(runs, metric)["rows"]}


def test_recall_of_memory_is_that_of_the_committed_results():
    digits, ten = means("digits", "recall"), means("experiments/weak_replay", "recall")
    for rows, place in ((digits, "on digits"), (ten, "over ten tasks")):
        values = [rows[name]["average"][0] for name in ("memory (10 a class)", "distillation")]
        assert f"{values[0]:.2f} against {values[1]:.2f} {place}" in README


def test_paired_differences_in_the_text_are_those_of_the_committed_results():
    lwf = means("digits", "fd_classifier")["LwF"]["paired"]
    assert f"as good on digits ({lwf[0]:+.2f} \u00b1 {lwf[1]:.2f})" in README
    strong = means("experiments/strong_replay", "fd_classifier")
    distillation = strong["distillation"]["average"]
    rank1 = strong["rank-1 EWC + distillation (decoupled, auto)"]["paired"]
    text = f"distillation {distillation[0]:.2f} \u00b1 {distillation[1]:.2f}, rank-1 EWC {rank1[0]:+.2f} \u00b1 {rank1[1]:.2f}"
    assert text in README


def differences(*patterns: str) -> list[float]:
    """How far single runs' averages lie above distillation's on the same seed."""
    runs = [load_run(path) for pattern in patterns for path in sorted((ROOT / "results" / "digits").glob(pattern))]
    assert runs
    averages = {
        run.seed: run.metrics["metrics"]["fd_classifier"]["average"][-1]
        for run in map(load_run, (ROOT / "results" / "digits").glob("distillation-seed*.json"))
    }
    return [run.metrics["metrics"]["fd_classifier"]["average"][-1] - averages[run.seed] for run in runs]


def test_what_the_sweeps_say_is_in_their_results():
    mild = ("decoupled_*", "loss_auto-*", "loss_auto_tenth-*")
    strengths = differences(*(f"strength/{name}seed*.json" for name in mild), "rank1_ewc_distillation-seed*.json")
    text = " ".join(README.split())
    assert f"lies within {max(map(abs, strengths)):.2f} of no penalty on every seed" in text
    replay = differences("replay/*-seed*.json")
    assert f"lie within {max(map(abs, replay)):.2f} of the preset on every seed" in text

    def spread(values: list[float]) -> str:
        return f"{min(values):+.2f} to {max(values):+.2f}"

    tenfold, paper = (
        differences("strength/loss_auto_tenfold-*.json"),
        differences("paper_rank1_ewc_distillation-*.json"),
    )
    assert f"in the loss costs {spread(tenfold)}, and the paper's 15000 there {spread(paper)}." in text


def test_recognised_digits_are_those_of_the_committed_results():
    recognised = json.loads((ROOT / "results" / "digits" / "recognised.json").read_text())
    assert all(run["judge"]["test_accuracy"] >= 0.97 for run in recognised)

    def lowest(replay: str) -> list[int]:
        found = [run for run in recognised if run["penalty"][0] == "none" and run["replay"] == replay]
        assert sorted(run["seed"] for run in found) == [0, 1, 2]
        return sorted(run["lowest"] for run in found)

    default, memory, lwf = lowest("generative_distillation"), lowest("memory"), lowest("lwf")
    assert default[0] >= 90
    assert f"{default[0]} to {default[-1]} of 100" in README
    assert f"{memory[0]} to {memory[-1]}\nwith `memory`, {lwf[0]} to {lwf[-1]} with `lwf`" in README


def test_the_time_of_the_demo_is_that_of_the_committed_run():
    seconds = json.loads((ROOT / "results" / "digits" / "demo.json").read_text())["run"]["seconds"]["total"]
    assert f"took {seconds / 60:.1f} minutes" in README


def test_the_story_is_that_of_the_committed_run():
    story = json.loads((ROOT / "results" / "story.json").read_text())
    old, new = story["before"]["recognised"], [name for task in story["after"]["tasks"][3:] for name in task]
    assert len(old) == 6 and len(new) == 4

    def cells(name: str, run: str, row: int) -> str:
        recognised = story[name]["recognised"]
        spans = [[recognised[c] for c in classes if c in recognised] for classes in (old, new)]
        distances = story[run]["matrix"][row][:3]
        parts = [f"{min(span)} to {max(span)}" if span else "" for span in spans]
        return f"| {parts[0]} | {parts[1]} | {format_number(sum(distances) / 3)} |"

    for arguments in (("before", "after", 2), ("after", "after", 3), ("finetune", "finetune", 3)):
        assert cells(*arguments) in README


def test_what_survives_is_what_torture_found():
    found = json.loads((ROOT / "results" / "torture.json").read_text())
    kills, cost = found["parts"]["kills"], found["parts"]["cost"]
    assert found["passed"] and kills["lost"] == kills["failed"] == kills["different"] == []
    assert f"{kills['kills']} kills with -9, {kills['in_a_save']} of them within a save" in README
    assert f"Surviving costs {cost['percent']:.1f} % of the time" in README
