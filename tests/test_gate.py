"""scripts/gate.py: what passes, what fails on which classes, what it writes, and what it refuses."""

import json
import re
import runpy
import shutil
import sys

import numpy as np
import pytest
import torch
from adopt_helpers import NAMES, adopted, edited, names_file, plain_model, write_real_images
from PIL import Image
from script_helpers import ROOT

from diffusers_cl import classifier
from diffusers_cl.config import TrainingConfig
from diffusers_cl.features import load_extractor
from diffusers_cl.gate import PICTURE_COLUMNS, plot_side_by_side
from diffusers_cl.metrics import frechet_distance
from diffusers_cl.pipeline import ClassConditionalPipeline, to_uint8
from diffusers_cl.randomness import generator
from diffusers_cl.references import References


EMBEDDING = "class_embedding.weight"
SCRIPT = ROOT / "scripts" / "gate.py"
# Of twenty images in three steps.
FAST = ["--num_images", "20", "--resamplings", "100", "--device", "cpu"]


@pytest.fixture(scope="module")
def old(files, tmp_path_factory):
    """A trained model that real images of its classes were kept of, and a small classifier that knows them."""
    folder = tmp_path_factory.mktemp("old")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "CLASSIFIER_STEPS", 30)
        return adopted(
            plain_model(tmp_path_factory),
            files,
            folder / "old",
            names_file(folder),
            train_data_dir=str(write_real_images(folder / "real", 30)),
            feature_extractor="classifier",
            cache_dir=str(folder / "cache"),
            eval_images_per_class=None,
        )


@pytest.fixture
def gate(monkeypatch, tmp_path):
    """Returns a function of the command line that runs the script, and gives its exit code and what is in gate.json."""

    def run(*arguments):
        # Of an option that is there twice the last one counts.
        command = ["gate.py", *FAST, "--output_dir", str(tmp_path / "out"), *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", command)
        with pytest.raises(SystemExit) as exit_info:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        file = tmp_path / "out" / "gate.json"
        return exit_info.value.code, json.loads(file.read_text()) if file.exists() else None

    return run


def verdicts(result: dict, measure: str) -> dict[str, str]:
    return {row["name"]: row[measure]["verdict"] for row in [*result["classes"], *result["tasks"]]}


def test_a_model_is_as_good_as_itself(old, gate, tmp_path, capsys):
    code, result = gate(old, old)
    assert code == 0 and result["passed"] and result["worse"] == []
    assert [row["name"] for row in result["classes"]] == NAMES and result["num_comparisons"] == 8
    for row in [*result["classes"], *result["tasks"]]:
        for measure in ("distance", "accuracy"):
            assert row[measure]["change"] == 0.0 and row[measure]["interval"] == [0.0, 0.0]
            assert row[measure]["old"] == row[measure]["new"]
        assert row["accuracy"]["old"] >= 0.9

    # What is said is what is written, a row a class.
    printed, text = capsys.readouterr().out, (tmp_path / "out" / "gate.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert [line.split(" | ")[0] for line in table] == [
        "| class",
        "| ---",
        *(f"| {n}" for n in NAMES),
        *("| task", "| ---", "| task-00"),
    ]
    assert all(line.endswith("| same |") for line in table if "---" not in line and "verdict" not in line)
    assert all(line in printed for line in table) and "PASSED: no class and no task is worse" in printed
    assert "8 comparisons" in printed and "Bonferroni" in printed


def test_distances_are_to_the_references_that_travel_with_the_old_model(old, gate):
    _, result = gate(old, old, "--seed", "3")
    references, pipeline = References.load(old / "consolidation"), ClassConditionalPipeline.from_pretrained(old)
    pipeline.set_progress_bar_config(disable=True)
    state = json.loads((old / "consolidation" / "state.json").read_text())
    extractor = load_extractor(
        old / "consolidation", state["feature_extractor_info"], TrainingConfig(), torch.device("cpu")
    )
    features = []
    for row, name in zip(result["classes"], NAMES, strict=True):
        noise = torch.stack([torch.randn(1, 8, 8, generator=generator(3, "gate", name, i)) for i in range(20)])
        steps = state["config"]["eval_num_inference_steps"]
        images = pipeline([name] * 20, num_inference_steps=steps, latents=noise, output_type="latent").images
        found, predictions = extractor(to_uint8(images))
        expected = (found.mean(dim=0) - references.class_mean[name]).square().sum()
        expected += (found.std(dim=0) - references.class_variance[name].sqrt()).square().sum()
        # One level of 255 where another batch rounds the other way.
        assert row["distance"]["old"] == pytest.approx(expected.item(), rel=1e-2)
        assert row["accuracy"]["old"] == predictions.count(name) / 20
        features.append(found)
    expected = frechet_distance(torch.cat(features), references.of_task(0))
    assert result["tasks"][0]["distance"]["old"] == pytest.approx(expected, rel=1e-2)


def test_classes_are_matched_by_name(old, gate, tmp_path):
    def reorder(tensors):
        # Also a row for a class that came later.
        rows = tensors[EMBEDDING]
        tensors[EMBEDDING] = torch.cat([rows[[2, 0]], torch.zeros_like(rows[:1]), rows[[1]]])

    new = edited(
        old,
        tmp_path / "new",
        reorder,
        {
            "model_index.json": lambda index: index.update(id2label={"0": "bird", "1": "cat", "2": "fox", "3": "dog"}),
            "unet/config.json": lambda config: config.update(num_class_embeds=4),
        },
    )
    code, result = gate(old, new)
    assert code == 0 and all(row["distance"]["change"] == 0.0 for row in result["classes"])


def test_swapped_classes_fail_and_no_others(old, gate, tmp_path, capsys):
    def swap(tensors):
        tensors[EMBEDDING][[0, 1]] = tensors[EMBEDDING][[1, 0]].clone()

    new = edited(old, tmp_path / "new", swap)
    code, result = gate(old, new)
    assert code == 1 and not result["passed"]
    assert verdicts(result, "distance") | {"task-00": None} == {
        "cat": "worse",
        "dog": "worse",
        "bird": "same",
        "task-00": None,
    }
    assert verdicts(result, "accuracy") == {"cat": "worse", "dog": "worse", "bird": "same", "task-00": "worse"}
    assert result["classes"][2]["distance"]["change"] == 0.0
    assert {"cat (distance)", "cat (accuracy)", "dog (distance)", "task-00 (accuracy)"} <= set(result["worse"])
    assert "FAILED: 3 of 4 classes and tasks are worse" in capsys.readouterr().out

    # Old images left, new ones right: the swapped classes' rows are each other's.
    with Image.open(tmp_path / "out" / "gate.png") as picture:
        pixels = np.asarray(picture.convert("RGB")).astype(int)
    assert pixels.shape[0] >= 3 * 50 and pixels.shape[1] >= 2 * PICTURE_COLUMNS * 40
    # Names of what is worse are red.
    assert ((pixels[..., 0] > 180) & (pixels[..., 1] < 80) & (pixels[..., 2] < 80)).any()


def test_noise_in_the_weights_fails_and_a_tolerance_lets_it_pass(old, gate, tmp_path, capsys):
    def damage(tensors):
        draws = torch.Generator().manual_seed(0)
        for name in tensors:
            tensors[name] += 0.2 * tensors[name].abs().mean() * torch.randn(tensors[name].shape, generator=draws)

    new = edited(old, tmp_path / "new", damage)
    code, result = gate(old, new)
    assert code == 1
    assert set(verdicts(result, "distance").values()) == {"worse"}
    code, again = gate(old, new, "--max_regression", "1000")
    assert code == 0 and set(verdicts(again, "distance").values()) == {"tolerated"}
    assert "no class and no task is worse by more than 100000.0%" in capsys.readouterr().out
    assert again["worse"] == [] and again["max_regression"] == 1000.0
    assert again["classes"][0]["distance"] | {"verdict": 0} == result["classes"][0]["distance"] | {"verdict": 0}
    # From the worse to the better.
    code, back = gate(new, old)
    assert code == 0 and set(verdicts(back, "distance").values()) == {"better"}


def test_one_class_can_fail_alone(old, gate, tmp_path):
    def forget(tensors):
        # What a new class leaves of an old one.
        tensors[EMBEDDING][2] += (
            torch.randn(tensors[EMBEDDING][2].shape, generator=torch.Generator().manual_seed(0)) * 2
        )

    code, result = gate(old, edited(old, tmp_path / "new", forget))
    assert code == 1 and {entry.split(" (")[0] for entry in result["worse"]} <= {"bird", "task-00"}
    assert "bird (distance)" in result["worse"]


def test_accuracy_is_left_out_where_the_extractor_knows_no_class(files, tmp_path_factory, gate, capsys):
    folder = tmp_path_factory.mktemp("unknown")
    model = adopted(plain_model(tmp_path_factory), files, folder / "model", names_file(folder))
    code, result = gate(model, model)
    assert code == 0 and result["num_comparisons"] == 4
    assert [row["accuracy"] for row in [*result["classes"], *result["tasks"]]] == [None] * 4
    printed = capsys.readouterr().out
    assert "| class | distance, old | new | change [interval] | verdict |" in printed
    assert result["references"] == "own samples" and "to the statistics of its own samples" in printed


@pytest.mark.parametrize(
    ("change", "exit_code", "message"),
    [
        (
            {"model_index.json": lambda c: c.update(id2label={"0": "cat"})},
            2,
            "does not know 'dog', 'bird', which .* knows",
        ),
        (
            {"unet/config.json": lambda c: c.update(sample_size=16)},
            2,
            r"draws images of 8x8 with 1 channel\(s\), .* of 16x16",
        ),
    ],
    ids=["a class is missing", "another size"],
)
def test_models_that_cannot_be_compared(old, gate, tmp_path, capsys, change, exit_code, message):
    code, result = gate(old, edited(old, tmp_path / "new", files=change))
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert (code, result) == (exit_code, None) and error.startswith("gate.py: error: ") and re.search(message, error)


def test_models_that_are_not_whole_or_not_there(old, gate, tmp_path, capsys):
    def fault(*arguments) -> tuple[int, str]:
        code, result = gate(*arguments)
        assert result is None
        return code, capsys.readouterr().err.strip().splitlines()[-1]

    shutil.copytree(old, tmp_path / "cut")
    weights = tmp_path / "cut" / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    code, error = fault(old, tmp_path / "cut")
    assert code == 4 and "diffusion_pytorch_model.safetensors is damaged" in error

    def lose(tensors):
        del tensors["conv_out.weight"]

    code, error = fault(old, edited(old, tmp_path / "less", lose))
    assert code == 4 and "less lacks weights: conv_out.weight" in error
    other = {"consolidation/state.json": lambda state: state["feature_extractor_info"].update(sha256="0" * 64)}
    code, error = fault(edited(old, tmp_path / "other", files=other), old)
    assert code == 3 and "000000000000: distances would not compare" in error
    code, error = fault(old, old / "unet")
    assert code == 2 and "has no consolidation/state.json" in error
    for option, message in (
        (["--num_images", "19"], "argument --num_images: invalid number from 20 value: '19'"),
        (["--max_regression", "-1"], "argument --max_regression: invalid number from 0"),
        (["--confidence", "1"], "argument --confidence: invalid number from 0 to below 1"),
        (["--num_inference_steps", "1001"], "--num_inference_steps is 1001; allowed: at most 1000"),
        (["--device", "warp"], "--device warp cannot be used"),
    ):
        code, error = fault(old, old, *option)
        assert code == 2 and message in error


def test_a_picture_of_many_classes_shows_what_is_worse_first(tmp_path, monkeypatch):
    monkeypatch.setattr("diffusers_cl.gate.MAX_PICTURE_ROWS", 4)
    names = [f"class $x_{{{number}$ \n|" for number in range(6)]
    images = {name: (torch.zeros(20, 1, 8, 8, dtype=torch.uint8),) * 2 for name in names}
    # White, and in the last place.
    images[names[-1]] = (torch.full((20, 1, 8, 8), 255, dtype=torch.uint8),) * 2
    rows = [{"name": name, "distance": {"verdict": "same"}, "accuracy": None} for name in names]
    rows[-1]["distance"]["verdict"] = "worse"
    sides = {"old": {"model": "a" * 100}, "new": {"model": "b"}}
    plot_side_by_side(tmp_path / "gate.png", images, {**sides, "classes": rows})
    with Image.open(tmp_path / "gate.png") as picture:
        pixels = np.asarray(picture.convert("L"))
    # Down the middle of the left half, white is the page and the first class; the other three are black.
    dark = np.flatnonzero(np.diff(np.concatenate([[0], pixels[:, pixels.shape[1] // 3] < 10, [0]]).astype(int)))
    assert len(dark) == 2 * 3 and dark[0] > pixels.shape[0] / 4
