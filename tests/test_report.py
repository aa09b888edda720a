"""The report of a run and its pictures, on numbers small enough to check by hand."""

import dataclasses
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusers_cl.config import OPERATIONAL_KEYS, TrainingConfig
from diffusers_cl.names import method_name
from diffusers_cl.plots import format_number, plot_curves, plot_heat_map, plot_losses, read_train_log
from diffusers_cl.report import format_spread, headline_metric, write_report


ROOT = Path(__file__).resolve().parent.parent
TASKS = [["0", "1"], ["2", "3"], ["4", "5"]]
# average 4, learning 2, forgetting ((5 - 1) + (4 - 2) + 0) / 3 = 2
FINETUNE_0 = {"matrix": [[1.0], [3.0, 2.0], [5.0, 4.0, 3.0]], "average": [1.0, 2.5, 4.0], "learning": 2.0}
FINETUNE_0 |= {"forgetting": 2.0, "worst": 5.0}
# average 6, learning 7 / 3, forgetting (7 + 4 + 0) / 3
FINETUNE_1 = {"matrix": [[1.0], [3.0, 2.0], [8.0, 6.0, 4.0]], "average": [1.0, 2.5, 6.0], "learning": 7 / 3}
FINETUNE_1 |= {"forgetting": 11 / 3, "worst": 8.0}
# average 2.2, learning 5.5 / 3, forgetting (1.2 - 0.1 + 0) / 3
RANK1 = {"matrix": [[1.0], [1.5, 2.0], [2.2, 1.9, 2.5]], "average": [1.0, 1.75, 2.2], "learning": 5.5 / 3}
RANK1 |= {"forgetting": 1.1 / 3, "worst": 2.5}
JOINT = {"matrix": [[1.0, 2.0, 1.5]], "average": [1.5], "learning": None, "forgetting": None, "worst": 2.0}
RANK1_CONFIG = {"penalty": "rank1_ewc", "replay": "generative_distillation"}


def make_run(folder: Path, distance: dict, tasks=TASKS, extractor="classifier", floor_std=0.25, **config) -> Path:
    """A run's folder as train_continual.py leaves it; the accuracy is 1 - distance / 10, entry by entry."""
    config = {"dataset_name": "digits", "tasks": tasks, "feature_extractor": extractor, **config}
    config = dataclasses.asdict(TrainingConfig(**config))
    config = {key: value for key, value in config.items() if key not in OPERATIONAL_KEYS}
    matrix = distance["matrix"]
    accuracy = {key: value and 1 - value / 10 for key, value in distance.items() if key in ("learning", "worst")}
    accuracy["matrix"] = [[1 - value / 10 for value in row] for row in matrix]
    accuracy["average"] = [1 - value / 10 for value in distance["average"]]
    accuracy["forgetting"] = distance["forgetting"] and -distance["forgetting"] / 10
    floor = {"mean": 0.5, "std": floor_std, "num_images": [36] * len(tasks), "per_task": [0.4, 0.5, 0.6][: len(tasks)]}
    fisher = {"second_moment": 0.5, "curvature": 50.0, "mean_gradient_norm": 0.1, "num_samples": 144.0, "trace": 4.0}
    fisher |= {"direction_share": 0.125, "signal_ratio": 10.0}
    fisher = fisher if config["penalty"] == "rank1_ewc" else None
    names = {"fd_classifier": distance} if extractor == "classifier" else {"fid": distance}
    metrics = {
        "schema": 1,
        "version": "0.1.0",
        "tasks": tasks,
        "stream": config["stream"],
        "feature_extractor": extractor,
        "num_images": [[72] * len(row) for row in matrix],
        "floor": dict.fromkeys(names, floor),
        "metrics": {"accuracy": accuracy, "recall": accuracy, **names},
        "class_accuracy": [
            {name: 1 - value / 10 for value, classes in zip(row, tasks, strict=False) for name in classes}
            for row in matrix
        ],
        "fisher": [fisher] * len(matrix),
        "config": config,
    }
    run = {
        "seconds": {"train": 90.0, "evaluate": 30.0, "total": 120.0},
        "images": {"trained": 1000, "replayed": 0, "generated": 216},
        "peak_memory_gib": 1.5,
        "device": "cpu",
        "threads": 2,
        "host": "here",
        "restarts": 0,
        "versions": {"torch": "2.15.0"},
    }
    (folder / "samples").mkdir(parents=True)
    (folder / "logs").mkdir()
    (folder / "metrics.json").write_text(json.dumps(metrics))
    (folder / "run.json").write_text(json.dumps(run))
    for task in range(len(matrix)):
        Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(folder / "samples" / f"task-{task:02d}.png")
    with (folder / "logs" / "train_log.jsonl").open("w") as log:
        for step in range(10 * len(matrix)):
            parts = {"loss": 1.5, "loss_new": 1.0, "loss_replay": 0.5 if step >= 10 else None, "penalty": None}
            log.write(json.dumps({"step": step, "task": step // 10, **parts, "grad_norm": 1.0, "lr": 1e-3}) + "\n")
    return folder


def row_of(table: str, name: str) -> list[str]:
    """The cells of the one row of a Markdown table that starts with a name."""
    (line,) = [line for line in table.splitlines() if line.startswith(f"| {name} |")]
    return [cell.strip() for cell in line.split("|")[1:-1]]


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({}, "fine-tuning"),
        ({"stream": "joint"}, "joint"),
        ({"stream": "cumulative"}, "cumulative"),
        ({"replay": "generative_replay"}, "generative replay"),
        ({"replay": "generative_distillation"}, "distillation"),
        ({"penalty": "ewc"}, "diagonal EWC (loss, 15000)"),
        ({"penalty": "rank1_ewc"}, "rank-1 EWC (loss, 15000)"),
        ({"penalty": "rank1_ewc", "ewc_lambda": 100.0}, "rank-1 EWC (loss, 100)"),
        ({"penalty": "ewc", "ewc_lambda": "auto"}, "diagonal EWC (loss, auto)"),
        ({"penalty": "ewc", "penalty_mode": "decoupled"}, "diagonal EWC (decoupled, 15000)"),
        (
            {**RANK1_CONFIG, "penalty_mode": "decoupled", "ewc_lambda": "auto"},
            "rank-1 EWC + distillation (decoupled, auto)",
        ),
    ],
)
def test_method_name(changes, name):
    assert method_name(dataclasses.asdict(TrainingConfig(**changes))) == name


def test_numbers_have_three_digits_or_those_of_their_scale():
    assert [format_number(value) for value in (128.64, 7.56, 0.5, 0.00123, 0.0, None)] == (
        ["128.6", "7.56", "0.500", "0.00123", "0.00", "n/a"]
    )
    assert format_number(0.000238, sign=True, scale=0.773) == "+0.000"
    assert format_spread(2.714, 0.0512) == "2.71 \u00b1 0.05"


def test_headline_is_fid_or_the_first_other_frechet_distance():
    assert headline_metric({"metrics": {"recall": {}, "kid": {}, "fid": {}}}) == "fid"
    assert headline_metric({"metrics": {"kd_features": {}, "fd_features": {}}}) == "fd_features"


def test_train_log_survives_kills_and_resumes(tmp_path):
    def record(step, loss):
        return json.dumps({"step": step, "task": step // 3, "loss": loss, "loss_new": loss, "penalty": None})

    log = tmp_path / "train_log.jsonl"
    # Killed in the record of step 4, resumed from step 3 on the same line, killed again in step 5.
    log.write_text("\n".join([record(step, 1.0) for step in range(4)] + [record(4, 1.0)[:20] + record(3, 2.0)]))
    with log.open("a") as file:
        file.write("\n" + record(4, 2.0) + "\n" + record(5, 2.0)[:-1])
    columns = read_train_log(log)
    assert columns["step"].tolist() == [0, 1, 2, 3, 4]
    assert columns["task"].tolist() == [0, 0, 0, 1, 1]
    assert columns["loss"].tolist() == [1, 1, 1, 2, 2]
    assert np.isnan(columns["penalty"]).all() and np.isnan(columns["loss_replay"]).all()


def test_empty_train_log_gives_no_picture(tmp_path):
    (tmp_path / "train_log.jsonl").write_text('{"step": 0, "ta')
    plot_losses(tmp_path / "losses.png", read_train_log(tmp_path / "train_log.jsonl"))
    assert not (tmp_path / "losses.png").exists()


def test_heat_map_is_red_for_forgetting_and_pale_within_the_noise(tmp_path):
    def colours(matrix, noise):
        plot_heat_map(tmp_path / "map.png", matrix, TASKS, "title", noise, diverging=True)
        pixels = np.asarray(Image.open(tmp_path / "map.png").convert("RGB")).astype(int)
        red, blue = pixels[..., 0] - pixels[..., 2], pixels[..., 2] - pixels[..., 0]
        return (red > 60).any(), (blue > 60).any()

    assert colours([[0.0], [1.0, 0.0], [2.0, 1.0, 0.0]], noise=0.1) == (True, False)
    assert colours([[0.0], [-1.0, 0.0], [-2.0, -1.0, 0.0]], noise=0.1) == (False, True)
    assert colours([[0.0], [0.1, 0.0], [-0.1, 0.1, 0.0]], noise=0.1) == (False, False)


def test_plots_need_no_pyplot(tmp_path):
    code = (
        "import sys, pathlib; from diffusers_cl.plots import plot_curves;"
        f"plot_curves(pathlib.Path({str(tmp_path / 'curve.png')!r}), {{'a': [[1.0]]}}, [['0']], 'x', None);"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_plots_take_any_class_name(tmp_path):
    tasks = [["a$b$", "x_{"], ["|", "$"]]
    plot_heat_map(tmp_path / "map.png", [[1.0], [2.0, float("nan")]], tasks, "title", noise=0.0)
    plot_curves(tmp_path / "curve.png", {"a [key $\\x$]": [[1.0, 2.0], [2.0, 3.0]]}, tasks, "title", None)


def test_report_reads_as_a_page_with_its_pictures(tmp_path):
    folder = make_run(tmp_path / "run", RANK1, **RANK1_CONFIG)
    (folder / "plots").mkdir()
    Image.fromarray(np.zeros((8, 8), dtype=np.uint8)).save(folder / "plots" / "nearest.png")
    text = write_report(folder).read_text()

    links = re.findall(r"\]\(([^)]+)\)", text)
    assert all((folder / link).is_file() for link in links)
    plots = {path.stem for path in (folder / "plots").iterdir()}
    assert plots == {"task_matrix", "forgetting", "average", "losses", "nearest"}
    assert links[0] == "samples/task-02.png" and {f"plots/{name}.png" for name in plots} < set(links)

    summary = text.splitlines()[2]
    assert summary.startswith(
        "**rank-1 EWC + distillation (loss, 15000)**, 3 tasks: the generated images lie 1.83 from real ones"
    )
    assert "2.20 now" in summary and "so 0.37 was forgotten, more than the floor's spread" in summary
    assert "real against real images: 0.500 \u00b1 0.250" in summary and "recognises 78% of them" in summary
    assert row_of(text, "fd_classifier (lower is better)")[1:6] == [
        "2.20",
        "1.83",
        "+0.37",
        "2.50",
        "0.500 \u00b1 0.250",
    ]
    assert row_of(text, "accuracy (higher is better)")[1:4] == ["0.780", "0.817", "-0.037"]
    assert "72 generated" in text and "(36 each" in text
    assert row_of(text, "0") == ["0", "task-00", "90%", "78%", "-12"]
    assert row_of(text, "task-01") == ["task-01", "144", "10.0", "0.500", "0.125", "50.0"]
    assert "Recall (0.780) is about variety" in text
    assert row_of(text, "train") == ["train", "90", "75%"]
    assert text.index("<details><summary>Configuration") > text.index("## Time")


def test_forgetting_within_the_spread_is_called_noise(tmp_path):
    text = write_report(make_run(tmp_path / "run", RANK1, floor_std=0.4, **RANK1_CONFIG)).read_text()
    assert "the change, +0.37, is within the floor's spread, so no forgetting is shown" in text


def test_report_of_a_joint_run(tmp_path):
    folder = make_run(tmp_path / "run", JOINT, stream="joint")
    text = write_report(folder).read_text()
    assert {path.stem for path in (folder / "plots").iterdir()} == {"task_matrix", "losses"}
    assert "lie 1.50 from real ones" in text and "forgotten" not in text.splitlines()[2]
    assert row_of(text, "fd_classifier (lower is better)")[1:5] == ["1.50", "n/a", "n/a", "2.00"]
    assert row_of(text, "3") == ["3", "task-01", "80%", "80%", "+0"]


def test_report_of_a_run_in_progress(tmp_path):
    first = {"matrix": [[1.0]], "average": [1.0], "learning": 1.0, "forgetting": 0.0, "worst": 1.0}
    text = write_report(make_run(tmp_path / "first", first)).read_text()
    assert "1 of 3 tasks so far" in text and "nothing to forget yet" in text
    second = {"matrix": RANK1["matrix"][:2], "average": [1.0, 1.75], "learning": 1.5, "forgetting": 0.25, "worst": 2.0}
    folder = make_run(tmp_path / "second", second)
    for left_out in ("run.json", "logs", "samples"):
        shutil.rmtree(folder / left_out) if (folder / left_out).is_dir() else (folder / left_out).unlink()
    text = write_report(folder).read_text()
    assert "2 of 3 tasks so far" in text and "## Time" not in text
    assert all((folder / link).is_file() for link in re.findall(r"\]\(([^)]+)\)", text))


def test_many_classes_are_folded(tmp_path):
    tasks = [[f"class {i}|{j}" for j in range(30)] for i in range(2)]
    values = {"matrix": [[1.0], [2.0, 1.0]], "average": [1.0, 1.5], "learning": 1.0, "forgetting": 0.5, "worst": 2.0}
    text = write_report(make_run(tmp_path / "run", values, tasks=tasks)).read_text()
    assert "<details><summary>60 classes</summary>\n\n| class |" in text
    assert "| class 1-29 | task-01 | 90% | 90% | +0 |" in text


def test_report_names_the_file_it_cannot_read(tmp_path):
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "metrics.json"))):
        write_report(tmp_path)
