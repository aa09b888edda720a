"""The comparison of runs, on numbers small enough to check by hand."""

import importlib.util
import json
import re
import subprocess

import pytest
from PIL import Image
from test_report import FINETUNE_0, FINETUNE_1, JOINT, RANK1, RANK1_CONFIG, ROOT, make_run, row_of

import diffusers_cl.results


SPEC = importlib.util.spec_from_file_location("compare_runs", ROOT / "scripts" / "compare_runs.py")
compare_runs = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(compare_runs)


def compare(capsys, *arguments) -> str:
    compare_runs.main([str(argument) for argument in arguments])
    return capsys.readouterr().out


def refusal(capsys, *arguments) -> str:
    with pytest.raises(SystemExit) as stopped:
        compare_runs.main([str(argument) for argument in arguments])
    assert stopped.value.code == 2
    return capsys.readouterr().err


def test_table_of_several_methods_and_seeds(tmp_path, capsys):
    runs = [
        make_run(tmp_path / "finetune-1", FINETUNE_1, seed=1),
        make_run(tmp_path / "finetune-0", FINETUNE_0, seed=0),
        make_run(tmp_path / "rank1", RANK1, **RANK1_CONFIG),
        make_run(tmp_path / "joint", JOINT, stream="joint"),
    ]
    # 432 of the generated images were measured, and 100 trained on.
    for run in runs:
        (run / "run.json").write_text((run / "run.json").read_text().replace('"generated": 216', '"generated": 532'))
    table = compare(capsys, *runs, "--plot", tmp_path / "curve.png")
    # mean (4 + 6) / 2; standard error sqrt(2) / sqrt(2); gap closed (5 - 2.2) / (5 - 1.5)
    columns = ["seeds", "average", "learning", "forgetting", "worst task", "accuracy", "gap closed"]
    assert row_of(table, "method")[1:] == [*columns, "stored", "images generated", "minutes"]
    assert row_of(table, "fine-tuning")[1:] == (
        ["0, 1 (n=2)", "5.00 \u00b1 1.00", "2.17 \u00b1 0.17", "+2.83 \u00b1 0.83", "6.50 \u00b1 1.50"]
        + ["0.50 \u00b1 0.10", "0%", "0 B", "100", "2.0"]
    )
    assert row_of(table, "rank-1 EWC + distillation (loss, 15000)")[1:] == (
        ["0 (n=1)", "2.20", "1.83", "+0.37", "2.50", "0.78", "80%", "n/a", "100", "2.0"]
    )
    assert row_of(table, "joint")[2:6] == ["1.50", "n/a", "n/a", "2.00"] and "100%" in row_of(table, "joint")
    assert row_of(table, "floor (real against real)")[2] == "0.500 \u00b1 0.250"
    order = [line.split("|")[1].strip() for line in table.splitlines()[2:6]]
    assert order == ["joint", "rank-1 EWC + distillation (loss, 15000)", "fine-tuning", "floor (real against real)"]
    assert "A difference below that spread (0.250 in fd_classifier) is noise" in table and "72 generated" in table
    assert Image.open(tmp_path / "curve.png").width > 600

    table = compare(capsys, *runs[1:], "--metric", "accuracy")
    assert [line.split("|")[1].strip() for line in table.splitlines()[2:5]][-1] == "fine-tuning"
    assert row_of(table, "fine-tuning")[2:5] == ["0.600", "0.800", "-0.200"] and "floor" not in table
    assert "gap closed" not in compare(capsys, *runs[:3])
    latex = tmp_path / "tables" / "table.tex"
    per_task = compare(capsys, *runs, "--per_task", "--latex", latex)
    per_task = per_task[per_task.index("of every task at the end") :]
    assert row_of(per_task, "fine-tuning")[1:] == ["6.50", "5.00", "3.50"]
    assert row_of(per_task, "floor (real against real)")[1:] == ["0.400", "0.500", "0.600"]
    assert r"fine-tuning & 0, 1 (n=2) & 5.00 $\pm$ 1.00" in latex.read_text()


def test_a_gap_within_the_floor_is_called_meaningless(tmp_path, capsys):
    runs = [make_run(tmp_path / "rank1", RANK1, floor_std=1.0), make_run(tmp_path / "joint", JOINT, stream="joint")]
    assert "shares of it mean nothing" not in compare(capsys, runs[1], make_run(tmp_path / "a", FINETUNE_0))
    (tmp_path / "joint" / "metrics.json").write_text(
        (tmp_path / "joint" / "metrics.json").read_text().replace('"std": 0.25', '"std": 1.0')
    )
    assert "shares of it mean nothing" in compare(capsys, *runs)


def test_one_name_for_two_methods_is_told_apart(tmp_path, capsys):
    runs = [make_run(tmp_path / "a", FINETUNE_0), make_run(tmp_path / "b", FINETUNE_1, learning_rate=0.001)]
    runs.append(make_run(tmp_path / "joint", JOINT, stream="joint"))
    table = compare(capsys, *runs)
    assert row_of(table, "fine-tuning [learning_rate 0.0002]")[2] == "4.00"
    assert row_of(table, "fine-tuning [learning_rate 0.001]")[2] == "6.00"
    assert "No gap closed: there is more than one" in table


def test_saved_results_stand_beside_folders(tmp_path, capsys, monkeypatch):
    folder, saved = make_run(tmp_path / "run", RANK1, **RANK1_CONFIG), tmp_path / "results" / "digits" / "a-seed0.json"
    monkeypatch.setattr(diffusers_cl.results, "ROOT", tmp_path)
    git = ["git", "-C", str(tmp_path), "-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    subprocess.run([*git, "init", "--quiet"], check=True)
    compare(capsys, folder, "--save", saved)
    assert json.loads(saved.read_text())["commit"] is None
    subprocess.run([*git, "commit", "--quiet", "--allow-empty", "--message", "first"], check=True)
    compare(capsys, folder, "--save", saved)
    result = json.loads(saved.read_text())
    assert set(result) == {"metrics", "run", "model_config", "scale", "made_by", "commit"}
    assert re.fullmatch("[0-9a-f]{40}", result["commit"])
    assert result["made_by"] is None and result["metrics"]["config"]["penalty"] == "rank1_ewc"
    compare(capsys, folder, "--save", saved, "--made_by", "make results")
    assert json.loads(saved.read_text())["made_by"] == "make results"

    other = make_run(tmp_path / "other", FINETUNE_0)
    assert compare(capsys, saved, other) == compare(capsys, folder, other)
    assert "the same seed 0" in refusal(capsys, saved, folder)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"tasks": [["0", "1"], ["2", "3"], ["4", "6"]]}, "tasks"),
        ({"dataset_name": "ylecun/mnist"}, "dataset_name"),
        ({"eval_images_per_class": 10}, "eval_images_per_class"),
    ],
)
def test_runs_that_measured_something_else_are_refused(tmp_path, capsys, changes, named):
    runs = [make_run(tmp_path / "a", FINETUNE_0), make_run(tmp_path / "b", FINETUNE_1, **changes)]
    message = refusal(capsys, *runs)
    assert str(runs[0]) in message and str(runs[1]) in message and f": {named} is " in message


def test_other_extractors_and_image_counts_are_refused(tmp_path, capsys):
    first = make_run(tmp_path / "a", FINETUNE_0)
    second = make_run(tmp_path / "b", FINETUNE_1, extractor="inception")
    assert "b: has no metric 'fd_classifier'" in refusal(capsys, first, second)
    assert "feature_extractor is 'classifier' and 'inception'" in refusal(
        capsys, first, second, "--metric", "accuracy"
    )
    third = make_run(tmp_path / "c", FINETUNE_1, seed=1)
    (third / "metrics.json").write_text((third / "metrics.json").read_text().replace("72", "71"))
    assert "images a task is [72, 72, 72] and [71, 71, 71]" in refusal(capsys, first, third)


def test_faults_name_the_file(tmp_path, capsys):
    assert f"{tmp_path}: has no metrics.json" in refusal(capsys, tmp_path)
    (tmp_path / "broken.json").write_text("{")
    assert "broken.json: cannot be read" in refusal(capsys, tmp_path / "broken.json")
    (tmp_path / "other.json").write_text("{}")
    assert "other.json: has no metrics of a run in schema 1" in refusal(capsys, tmp_path / "other.json")
    folder = make_run(tmp_path / "run", FINETUNE_0)
    (folder / "metrics.json").write_text((folder / "metrics.json").read_text().replace('"schema": 1', '"schema": 2'))
    assert "run: has no metrics of a run in schema 1" in refusal(capsys, folder)


def test_unfinished_runs_are_left_out(tmp_path, capsys):
    half = make_run(tmp_path / "half", {**FINETUNE_0, "matrix": FINETUNE_0["matrix"][:2]})
    assert "no finished run" in refusal(capsys, half)
    compare_runs.main([str(half), str(make_run(tmp_path / "whole", RANK1, **RANK1_CONFIG))])
    printed = capsys.readouterr()
    assert "half is left out" in printed.err and "fine-tuning" not in printed.out
    assert "half: not all of its 3 tasks are finished" in refusal(capsys, half, "--save", tmp_path / "half.json")
