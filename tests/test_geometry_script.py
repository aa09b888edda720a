"""scripts/analyze_fisher.py: a tiny run from end to end, what resumes, what is refused, and what the words say."""

import importlib.util
import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from PIL import Image
from pipeline_helpers import tiny_pipeline
from script_helpers import ROOT, finished_run, shared_folder, write_images

from diffusers_cl import analysis, directions, geometry_words, timesteps
from diffusers_cl.draws import FisherBatches
from diffusers_cl.fisher import mean_gradient
from diffusers_cl.geometry_plots import write_plots
from diffusers_cl.parts import losses
from diffusers_cl.subject import open_subject


SPEC = importlib.util.spec_from_file_location("analyze_fisher", ROOT / "scripts" / "analyze_fisher.py")
script = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(script)
TIMESTEPS = ["200", "700"]
# As few draws, directions and steps as there can be.
FEW = {"BAND_DRAWS": 8, "LOSS_DRAWS": 8, "CURVATURE_DRAWS": 8, "NUM_RANDOM": 2, "NUM_ITERATIONS": 1}


@pytest.fixture(autouse=True)
def small(monkeypatch):
    for name, value in FEW.items():
        monkeypatch.setattr(directions, name, value)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    """A finished run of two tasks with rank-1 EWC."""
    return finished_run(tmp_path_factory, "plain")


def arguments(model, output_dir, data="digits", **options) -> list[str]:
    values = {"num_samples": 8, "timesteps": TIMESTEPS, "num_threads": 1, **options}
    command = ["--model", str(model), "--data", str(data), "--output_dir", str(output_dir)]
    for key, value in values.items():
        command += [f"--{key}", *(value if isinstance(value, list) else [str(value)])]
    return command


def geometry(output_dir: Path) -> dict:
    return json.loads((output_dir / "geometry.json").read_text())


@pytest.fixture(scope="module")
def whole(run_folder, tmp_path_factory) -> Path:
    """The output folder of a whole analysis, which the first worker that asks for it makes."""
    output_dir = shared_folder(tmp_path_factory) / "geometry"
    with FileLock(f"{output_dir}.lock"), pytest.MonkeyPatch.context() as patch:
        for name, value in FEW.items():
            patch.setattr(directions, name, value)
        if not (output_dir / "geometry.json").exists():
            script.main(arguments(run_folder / "task-01", output_dir))
    return output_dir


def test_what_comes_out(whole):
    content = geometry(whole)
    assert content["tasks"] == [["0", "1"], ["2", "3"]] and content["model"] == "task-01"
    rows = content["timesteps"]["rows"]
    assert [row["t"] for row in rows] == [200, 700] and all(len(row["cosines"]) == 8 for row in rows)
    assert all(0 <= cosine <= 1 for row in rows for cosine in row["cosines"])
    assert [row["t"] for row in content["surrogate"]] == [200, 700]
    # 64 dimensions, four samples each.
    assert content["surrogate"][0]["samples"] == 256 and content["surrogate"][0]["held_out_samples"] == 64
    assert len(content["bands"]["between_tasks"]["low_snr"]["cosine"]) == 2
    assert content["movement"]["task"] == 1 and content["movement"]["others"] == [0]
    assert len(content["gauss_newton"]["eigenvalues"]) == 3 and len(content["stored_cosines"]) == 2
    assert not (whole / "shards").exists()

    markdown, page = (whole / "report.md").read_text(), (whole / "report.html").read_text()
    pictures = sorted(path.name for path in (whole / "plots").glob("*.png"))
    assert sorted(set(re.findall(r"\(plots/(\S+\.png)\)", markdown))) == pictures
    assert page.count("data:image/png;base64,") == len(pictures) and "http" not in re.sub(r'base64,[^"]*', "", page)
    for text in ("0.0220", "near 1.0", "Figure 2", "Critique (e)"):
        assert text in markdown and text in page
    table = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(table) == 4 and len({line.count("|") for line in table}) == 1
    assert page.count("<th>") == page.count("<td>") // 2 == table[0].count("|") - 1
    # Nothing of this machine.
    for content in (markdown, page, (whole / "geometry.json").read_text()):
        assert str(whole.parent) not in content and str(Path.home()) not in content


def test_a_timestep_is_that_of_its_draws(whole, run_folder):
    subject = open_subject(str(run_folder / "task-01"), "digits", torch.device("cpu"))
    draws = subject.draws(("timestep", 700), 8, (700, 701), 128)
    mean, _, count, _ = mean_gradient(subject.unet, losses, draws)
    square = sum(tensor.square().sum().item() for tensor in mean.values())
    row = geometry(whole)["timesteps"]["rows"][1]
    assert count == 8 and row["mean_square"] == pytest.approx(square, rel=1e-4)
    # Of images that the model has learned, each once.
    (batch,) = draws
    assert (
        set(batch[2].tolist()) <= {0, 1, 2, 3} and isinstance(draws, FisherBatches) and set(batch[1].tolist()) == {700}
    )


def test_it_goes_on_after_the_timesteps_that_are_done(whole, run_folder, tmp_path, monkeypatch, capsys):
    output_dir, taken = tmp_path / "out", []
    real = timesteps.gradient_gram

    def counting(model, losses, draws, plan, on_row=lambda rows: None):
        # Not the few gradients that the estimate of the time is made of.
        if plan.num_samples == 8:
            taken.append(int(draws[1][0]))
            if len(taken) == 2:
                raise KeyboardInterrupt
        return real(model, losses, draws, plan, on_row)

    monkeypatch.setattr(timesteps, "gradient_gram", counting)
    command = arguments(run_folder / "task-01", output_dir, parts=["timesteps"])
    with pytest.raises(SystemExit) as stopped:
        script.main(command)
    assert stopped.value.code == 130 and "the same command goes on" in capsys.readouterr().err
    assert taken == [200, 700] and not (output_dir / "geometry.json").exists()
    script.main(command)
    assert taken == [200, 700, 700]
    again, expected = geometry(output_dir), geometry(whole)
    for one, other in zip(again["timesteps"]["rows"], expected["timesteps"]["rows"], strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}

    # All is done: the report is written again, nothing is measured.
    (output_dir / "report.html").unlink()
    monkeypatch.setattr(script, "analyze", None)
    script.main(command)
    assert (output_dir / "report.html").exists()


def test_less_memory_takes_more_passes_and_gives_the_same(whole, run_folder, tmp_path, capsys):
    command = arguments(run_folder / "task-01", tmp_path, memory_gib=0.001, parts=["timesteps"])
    script.main(command)
    content, expected = geometry(tmp_path), geometry(whole)
    assert content["plan"]["passes"] > 1 and expected["plan"]["passes"] == 1
    assert f"{content['plan']['passes']} pass(es) a timestep within 0.001 GiB" in capsys.readouterr().out
    for one, other in zip(content["timesteps"]["rows"], expected["timesteps"]["rows"], strict=True):
        for name in ("ratio", "rank1_error", "diagonal_error", "residual", "trace"):
            assert one[name] == pytest.approx(other[name], rel=1e-3), name


def test_a_pipeline_without_tasks(tmp_path):
    tiny_pipeline().save_pretrained(tmp_path / "model")
    images = write_images(tmp_path / "images", {"cat": 10, "7": 10, "dog": 10})
    command = arguments(tmp_path / "model", tmp_path / "out", images, parts=["bands", "movement"])
    script.main(command)
    content = geometry(tmp_path / "out")
    assert content["tasks"] == [["cat", "7", "dog"]] and "stored_cosines" not in content
    assert "no other" in (tmp_path / "out" / "report.md").read_text()


# Bad input


def refusal(command: list[str], code: int, monkeypatch, capsys) -> str:
    monkeypatch.setattr(analysis, "measure_timesteps", None)
    with pytest.raises(SystemExit) as exit_:
        script.main(command)
    error = capsys.readouterr().err
    # Before it, the bars of `datasets`.
    last = error.strip().splitlines()[-1]
    assert exit_.value.code == code and last.startswith("analyze_fisher.py: error: ") and "Traceback" not in error, (
        error
    )
    return last


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        ({"num_samples": 5000}, 2, "--num_samples is 5000; allowed: 8 to 576"),
        ({"num_samples": 3}, 2, "--num_samples is 3; allowed: 8 to"),
        ({"memory_gib": 1e-6}, 2, "--memory_gib is 1e-06, which holds no chunk of gradients: "),
        ({"timesteps": ["1000"]}, 2, "--timesteps has 1000; allowed: 0 to 999"),
        ({"timesteps": ["5", "5"]}, 2, "allowed: every timestep once"),
        ({"parts": ["movement"]}, 2, "allowed: movement and gauss_newton with bands"),
    ],
)
def test_options_that_cannot_be(options, code, said, run_folder, tmp_path, monkeypatch, capsys):
    command = arguments(run_folder / "task-01", tmp_path / "out", **options)
    assert said in refusal(command, code, monkeypatch, capsys)
    assert not (tmp_path / "out").exists()


def test_models_and_data_that_do_not_fit(run_folder, tmp_path, monkeypatch, capsys):
    def said(model, data, code: int, **options) -> str:
        return refusal(arguments(model, tmp_path / "out", data, **options), code, monkeypatch, capsys)

    shutil.copytree(run_folder / "task-01", tmp_path / "unlabelled")
    config = json.loads((tmp_path / "unlabelled" / "unet" / "config.json").read_text())
    (tmp_path / "unlabelled" / "unet" / "config.json").write_text(json.dumps({**config, "num_class_embeds": None}))
    assert "no class embedding" in said(tmp_path / "unlabelled", "digits", 2)
    assert "is the folder of a run" in said(run_folder, "digits", 2)

    model, names = run_folder / "task-01", {str(digit): 10 for digit in range(4)}
    large = write_images(tmp_path / "large", names, size=20)
    assert "images are 20x20, the network takes 8x8; allowed: images of that size, or --resize_mode" in said(
        model, large, 3
    )
    assert "--num_samples is 500; allowed: 8 to" in said(model, large, 2, num_samples=500, resize_mode="resize")
    lacking = write_images(tmp_path / "lacking", {"0": 10, "1": 10, "2": 10})
    assert "no class '3'" in said(model, lacking, 3)
    colour = write_images(tmp_path / "colour", names)
    for path in colour.rglob("*.png"):
        Image.open(path).convert("RGB").save(path)
    assert "in colour, the network takes 1 channel(s)" in said(model, colour, 3)
    assert not (tmp_path / "out").exists()


# Words and pictures


def made(ratio: float, cosine: float, rank1: float, t=(100, 700)) -> dict:
    row = {"loss": 0.1, "scaled_prediction_error": 0.5, "ratio": ratio, "rank1_error": rank1, "diagonal_error": 0.99}
    row |= {
        "best_rank1_error": rank1 / 2,
        "signal_ratio": 20.0,
        "half_cosine": 0.9,
        "top_cosine": 0.9,
        "num_samples": 16,
    }
    row |= {
        "trace": 2.0,
        "second_moment": 0.5,
        "residual_share": ratio,
        "cosines": [cosine] * 16,
        "eigenvalues": [1.0, ratio, 0.01, 0.001, 1e-4],
    }
    return {"rows": [{"t": at, **row} for at in t]}


def test_words_follow_the_numbers():
    rank1, not_rank1 = made(0.02, 0.97, 0.1), made(0.6, 0.3, 0.9)
    for words in (geometry_words.cosines, geometry_words.spectrum, geometry_words.stability):
        assert "**Holds here.**" in words(rank1["rows"]) and "**Does not hold here.**" in words(not_rank1["rows"])
        mixed = [rank1["rows"][0], not_rank1["rows"][1]]
        assert "**Holds here only in part.**" in words(mixed)
    assert "Rank-1 close: **Holds here.** Diagonal far: **Holds here.**" in geometry_words.errors(rank1["rows"])
    assert "27 times the paper's" in geometry_words.spectrum(not_rank1["rows"])
    low = made(0.02, 0.97, 0.1)["rows"]
    low[1]["scaled_prediction_error"] = 0.01
    assert "**Holds here.**" in geometry_words.scaled_prediction(low)
    assert "does not fall" in geometry_words.scaled_prediction(rank1["rows"])


@pytest.mark.parametrize(
    ("others", "said"),
    [(0.1, "protects something of the task"), (1.01, "of the network, not of the task"), (0.6, "little")],
)
def test_what_moving_along_v_says(others, said):
    steps = [0.003, 0.01, 0.03, 0.1, 0.3]

    def curve(height: float) -> list[float]:
        rise = [height * (step / 0.1) ** 2 for step in steps]
        return [*(1 + value for value in reversed(rise)), 1.0, *(1 + value for value in rise)]

    band = {"own": curve(1.0), "others": [curve(others)]}
    curves = dict.fromkeys(("all", "high_snr", "mid_snr", "low_snr"), band)
    curves |= {"random": [curve(1e-4)], "top_coordinates": [curve(1e-2)]}
    words = geometry_words.movement({"task": 1, "others": [0], "steps": steps, "curves": curves})
    assert said in words and "by 1 along its own v" in words and "0.01 along the diagonal's" in words


def test_pictures_of_one_timestep(tmp_path):
    content = made(0.02, 0.97, 0.1, t=(700,))
    content |= {"mean_cosines": [[1.0]], "corrected_mean_cosines": [[1.0]]}
    names = write_plots(tmp_path, {"timesteps": content, "tasks": [["a"]]})
    assert names and all(Image.open(tmp_path / name).width > 200 for name in names)
    assert "nothing to be compared" in geometry_words.mean_cosines(content)
