"""The experiment harness: what it runs, skips, goes on with and reports; with a stand-in trainer, and once with the real one."""

import importlib.util
import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from PIL import Image
from script_helpers import environment, shared_folder, tiny_files
from test_report import FINETUNE_0, ROOT, make_run

from diffusers_cl.plots import crop_class
from diffusers_cl.results import load_run, same_versions


SPEC = importlib.util.spec_from_file_location("reproduce", ROOT / "scripts" / "reproduce.py")
reproduce = importlib.util.module_from_spec(SPEC)
sys.modules["reproduce"] = reproduce  # its dataclass looks for it
SPEC.loader.exec_module(reproduce)

OVERLAY = "tasks: [[a, b], [c, d], [e, f]]\nclasses_per_task: null\nmax_train_steps: 5\nnum_threads: null\n"
# Leaves the files of a run at once. An ewc_lambda of 13 fails; with 14, the first start waits to be interrupted.
STAND_IN = """
import dataclasses, json, shutil, sys, time
from pathlib import Path
from diffusers_cl.arguments import parse_config, to_yaml
from diffusers_cl.config import OPERATIONAL_KEYS
config = parse_config()
folder, template = Path(config.output_dir), Path(__file__).parent / "template"
folder.mkdir(exist_ok=True)
first = not (folder / "config.yaml").exists()
(folder / "config.yaml").write_text(to_yaml(config))
with (folder / "starts").open("a") as starts:
    print(json.dumps(sys.argv), file=starts)
if config.ewc_lambda == 13:
    print("train_continual.py: error: ewc_lambda is unlucky", file=sys.stderr)
    sys.exit(5)
if config.ewc_lambda == 14 and first:
    try:
        time.sleep(60)
    except KeyboardInterrupt:
        (folder / "interrupted").touch()
        sys.exit(130)
metrics = json.loads((template / "metrics.json").read_text())
metrics["stream"] = config.stream
metrics["config"] = {k: v for k, v in dataclasses.asdict(config).items() if k not in OPERATIONAL_KEYS}
(folder / "metrics.json").write_text(json.dumps(metrics))
shutil.copy(template / "run.json", folder)
shutil.copytree(template / "samples", folder / "samples", dirs_exist_ok=True)
"""


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A stand-in for train_continual.py, and the arguments that every call shares."""
    template = make_run(tmp_path / "template", FINETUNE_0)
    machine = json.loads((template / "run.json").read_text())
    machine["versions"] = installed_versions()
    (template / "run.json").write_text(json.dumps(machine))
    for picture in (template / "samples").glob("*.png"):
        Image.new("L", (10 * 68 + 4, 6 * 68 + 4), 128).save(picture)
    (tmp_path / "trainer.py").write_text(STAND_IN)
    (tmp_path / "overlay.yaml").write_text(OVERLAY)
    monkeypatch.setattr(reproduce, "TRAINER", tmp_path / "trainer.py")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    return ["--preset", "digits", "--config", str(tmp_path / "overlay.yaml")] + (
        ["--runs_dir", str(tmp_path / "runs"), "--results_dir", str(tmp_path / "results")]
    )


def installed_versions() -> dict[str, str]:
    import importlib.metadata
    import platform

    versions = {name: importlib.metadata.version(name) for name in ("torch", "diffusers", "accelerate", "datasets")}
    return versions | {
        "python": platform.python_version(),
        "diffusers_cl": reproduce.load_run.__globals__["__version__"],
    }


def lines_of(capsys, *arguments, code: int = 0) -> list[str]:
    """The progress lines of a call, after its exit code was checked."""
    assert reproduce.main([str(argument) for argument in arguments]) == code
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith("[")]


def test_a_second_call_skips_and_a_changed_option_runs(tmp_path, capsys, stand_in):
    call = [*stand_in, "--methods", "finetune", "rank1_ewc", "--seeds", "0", "1", "--jobs", "2"]
    lines = lines_of(capsys, *call)
    assert len(lines) == 4 and all(line.endswith("average 4.00, forgetting +2.00, 2.0 minutes") for line in lines)
    assert {line.split()[1] for line in lines} == {"done"} and lines[3].startswith("[4/4]")
    assert [line.split()[1] for line in lines_of(capsys, *call)] == ["skipped"] * 4
    # Fine-tuning reads no penalty: nothing to do again.
    words = [line.split()[1] for line in lines_of(capsys, *call, "--", "--penalty_mode=loss")]
    assert sorted(words) == ["done", "done", "skipped", "skipped"]
    # The folders of the first settings stay.
    assert len((tmp_path / "runs" / "digits" / "rank1_ewc-seed0" / "starts").read_text().splitlines()) == 1
    assert (tmp_path / "runs" / "digits" / "rank1_ewc-seed0-2" / "metrics.json").exists()
    result = tmp_path / "results" / "rank1_ewc-seed1.json"
    assert load_run(result).config["penalty_mode"] == "loss"
    assert "--penalty_mode loss" in json.loads(result.read_text())["made_by"]
    # Another version makes another result.
    content = json.loads(result.read_text())
    content["run"]["versions"]["diffusers"] = "0.1"
    result.write_text(json.dumps(content))
    lines = lines_of(capsys, *stand_in, "--methods", "rank1_ewc", "--seeds", "1", "--", "--penalty_mode=loss")
    assert "done" in lines[0] and same_versions(load_run(result).machine)


def test_tables_and_pictures(tmp_path, capsys, stand_in):
    lines_of(capsys, *stand_in, "--methods", "finetune", "distillation", "--jobs", "2")
    table = (tmp_path / "results" / "table.md").read_text()
    assert "| fine-tuning | 0 (n=1) | 4.00 |" in table and "of every task at the end" in table
    assert r"\toprule" in (tmp_path / "results" / "table.tex").read_text()
    runs = tmp_path / "runs" / "digits"
    assert Image.open(runs / "curves.png").width > 600
    # Two rows of strips of 4 images of 64 pixels, with 4 between them, for each of 3 tasks.
    assert np.any(np.asarray(Image.open(runs / "one_class.png").convert("L")) == 128)
    assert Image.open(runs / "one_class.png").width > 3 * (4 * 68 - 4)


def test_committed_files_have_no_paths_of_this_machine(tmp_path, capsys, stand_in):
    (tmp_path / "data" / "blobs").mkdir(parents=True)
    extra = ["--", "--feature_extractor", tmp_path / "resnet", f"--cache_dir={tmp_path / 'cache'}"]
    data = ["--data", tmp_path / "data" / "blobs"]
    lines_of(capsys, *stand_in, "--methods", ROOT / "configs/methods/finetune.yaml", *data, *extra)
    text = (tmp_path / "results" / "finetune-seed0.json").read_text()
    assert str(tmp_path) not in text and str(ROOT) not in text
    result = json.loads(text)
    assert result["metrics"]["config"]["dataset_name"] == "blobs" and result["scale"] is None
    assert result["made_by"] == (
        "accelerate launch train_continual.py --config configs/digits.yaml --config overlay.yaml --config "
        "configs/methods/finetune.yaml --dataset_name blobs --report_to none --seed 0 --feature_extractor resnet "
        "--cache_dir cache"
    )
    # The trainer itself was given the folder.
    started = json.loads((tmp_path / "runs" / "digits" / "finetune-seed0" / "starts").read_text())
    assert str(tmp_path / "data" / "blobs") in started
    lines = lines_of(capsys, *stand_in, "--methods", "finetune", *data, *extra)
    assert "skipped" in lines[0]


def test_a_failed_job_is_named_and_the_others_go_on(tmp_path, capsys, stand_in):
    (tmp_path / "bad.yaml").write_text("penalty: ewc\newc_lambda: 13\n")
    call = [*stand_in, "--methods", tmp_path / "bad.yaml", "finetune"]
    assert reproduce.main([str(part) for part in call]) == 1
    printed = capsys.readouterr()
    log = tmp_path / "runs" / "digits" / "bad-seed0.log"
    fault = f"exit code 5: train_continual.py: error: ewc_lambda is unlucky; see {log}"
    assert f"[1/2] failed bad-seed0: {fault}" in printed.out and "[2/2] done finetune-seed0" in printed.out
    assert f"failed: bad-seed0: {fault}" in printed.err and "unlucky" in log.read_text()
    assert not (tmp_path / "results" / "bad-seed0.json").exists()
    # Trying again uses the same folder.
    lines = lines_of(capsys, *call, code=1)
    assert "skipped finetune" in lines[0] and "failed bad" in lines[1]
    assert not (tmp_path / "runs" / "digits" / "bad-seed0-2").exists()


def test_ctrl_c_ends_the_runs_and_the_same_command_goes_on(tmp_path, capsys, stand_in):
    (tmp_path / "slow.yaml").write_text("penalty: ewc\newc_lambda: 14\n")
    call = [*stand_in, "--methods", str(tmp_path / "slow.yaml"), "--seeds", "0", "1", "--jobs", "2"]
    script = f"import reproduce, sys; reproduce.TRAINER = {str(tmp_path / 'trainer.py')!r}; sys.exit(reproduce.main())"
    process = subprocess.Popen(
        [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT / 'scripts')!r}); {script}", *call],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    folders = [tmp_path / "runs" / "digits" / f"slow-seed{seed}" for seed in (0, 1)]
    deadline = time.monotonic() + 60
    while not all((folder / "starts").exists() for folder in folders) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "the same command goes on" in errors
    assert all((folder / "interrupted").exists() for folder in folders)
    # More jobs or fewer change the threads of a run, which keeps those that it started with.
    lines = lines_of(capsys, *call[:-2], "--jobs", "1")
    assert [line.split()[1] for line in lines] == ["done", "done"]
    starts = [json.loads(line) for line in (folders[0] / "starts").read_text().splitlines()]
    threads = [start[start.index("--num_threads") + 1] for start in starts]
    assert len(starts) == 2 and threads[0] == threads[1]


def test_class_orders_are_runs_of_their_own(tmp_path, capsys, stand_in):
    # Classes per task, not listed tasks, can be shuffled.
    (tmp_path / "overlay.yaml").write_text("max_train_steps: 5\n")
    call = [*stand_in, "--methods", "finetune", "--class_orders", "2", "--jobs", "2"]
    names = {line.split()[2].rstrip(":") for line in lines_of(capsys, *call)}
    assert names == {"finetune-order0-seed0", "finetune-order1-seed0"}
    orders = [load_run(tmp_path / "results" / f"{name}.json").config["class_order"] for name in sorted(names)]
    assert orders == [0, 1]
    assert "| fine-tuning | 0 x 2 orders (n=2) |" in (tmp_path / "results" / "table.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--preset", "cifar"], "--preset cifar: there is no"),
        (["--methods", "gd"], "known: distillation, ewc"),
        (["--methods", "finetune", "finetune"], "two have the same name"),
        (["--jobs", "0"], "--jobs is 0"),
        (["--scale", "2"], "--scale is 2.0"),
        (["--", "--seed", "3"], "--seed after -- is not for every run"),
        (["--", "--ewc_lamda=3"], "did you mean 'ewc_lambda'"),
    ],
)
def test_faults_are_one_sentence_before_anything_starts(tmp_path, capsys, stand_in, arguments, named):
    call = [*stand_in, *([] if "--methods" in arguments else ["--methods", "finetune"]), *arguments]
    assert reproduce.main(call) == 2
    error = capsys.readouterr().err
    assert error.startswith("reproduce.py: error: ") and named in error and error.count("\n") == 1
    assert not (tmp_path / "runs").exists()


def test_a_scaled_run_is_marked(tmp_path, capsys, stand_in):
    call = [*stand_in, "--methods", "finetune", "--scale", "0.1"]
    lines_of(capsys, *call, "--", "--learning_rate", "0.1")
    result = json.loads((tmp_path / "results" / "finetune-seed0.json").read_text())
    assert result["scale"] == 0.1 and result["model_config"]["block_out_channels"] == [16, 24]
    assert result["metrics"]["config"]["max_train_steps"] == 1 and "**Scaled by 0.1**" in (
        (tmp_path / "results" / "table.md").read_text()
    )
    assert (tmp_path / "runs" / "digits-scale0.1" / "finetune-seed0").exists()
    # The network's file in another place is the same network; a key that was given is not scaled.
    call[call.index("--runs_dir") + 1] = str(tmp_path / "elsewhere")
    assert "skipped" in lines_of(capsys, *call, "--", "--learning_rate", "0.1")[0]
    lines_of(capsys, *call, "--", "--learning_rate", "0.1", "--max_train_steps", "4")
    assert load_run(tmp_path / "results" / "finetune-seed0.json").config["max_train_steps"] == 4


def test_cropped_class(tmp_path):
    import torch

    from diffusers_cl.sampling import image_grid

    # Three classes of four 8x8 images, each of one grey level.
    levels = torch.arange(12, dtype=torch.uint8) * 20
    image_grid(levels[:, None, None, None].expand(12, 1, 8, 8), 4).save(tmp_path / "grid.png")
    strip = crop_class(tmp_path / "grid.png", 1, 8, 3)
    assert strip.shape == (64, 3 * 68 - 4, 3)
    assert [int(strip[:, 68 * i : 68 * i + 64].min()) for i in range(3)] == [80, 100, 120]
    assert [int(strip[:, 68 * i : 68 * i + 64].max()) for i in range(3)] == [80, 100, 120]
    assert crop_class(tmp_path / "grid.png", 2, 8, 10).shape == (64, 4 * 68 - 4, 3)


def test_the_real_trainer(tmp_path, tmp_path_factory, capsys, monkeypatch):
    files = tiny_files(shared_folder(tmp_path_factory) / "tiny")
    for key, value in environment(files).items():
        monkeypatch.setenv(key, value)
    call = ["--preset", "digits", "--config", files / "settings.yaml", "--methods", "finetune", "distillation"]
    call += ["--runs_dir", tmp_path / "runs", "--results_dir", tmp_path / "results", "--jobs", "2"]
    extra = ["--", "--model_config_name_or_path", files / "unet.json", "--feature_extractor", files / "extractor"]
    extra += ["--cache_dir", files / "cache", "--checkpointing_steps", "1000", "--max_train_steps", "2"]
    lines = lines_of(capsys, *call, "--seeds", "0", "1", *extra)
    assert len(lines) == 4 and all(re.search(r"done .*: average [\d.]+, forgetting [-+]", line) for line in lines)
    assert [line.split()[1] for line in lines_of(capsys, *call, "--seeds", "0", "1", *extra)] == ["skipped"] * 4
    before = load_run(tmp_path / "results" / "finetune-seed0.json").metrics["metrics"]
    call.remove("distillation")
    assert "done" in lines_of(capsys, *call, *extra, "--learning_rate", "0.002")[0]
    assert load_run(tmp_path / "results" / "finetune-seed0.json").metrics["metrics"] != before
    results = sorted((tmp_path / "results").glob("*.json"))
    assert len(results) == 4 and not any(str(tmp_path.parent) in path.read_text() for path in results)
    assert (tmp_path / "runs" / "digits" / "one_class.png").exists()
