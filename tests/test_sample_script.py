"""scripts/sample.py: its images, their names and the grid, and what it refuses."""

import re
import runpy
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pipeline_helpers import saved_files, tiny_pipeline
from safetensors.torch import load_file, save_file

import diffusers_cl
from diffusers_cl.errors import CheckpointError, ConfigError
from diffusers_cl.randomness import generator


SAMPLE_SCRIPT = Path(diffusers_cl.__file__).parents[1] / "scripts" / "sample.py"


@pytest.fixture(scope="module")
def sample_script() -> dict:
    return runpy.run_path(str(SAMPLE_SCRIPT))


def run_sample(sample_script: dict, *options: str) -> Path:
    return sample_script["sample"](sample_script["parse_args"]([*options, "--num_inference_steps", "3"])).parent


def test_sample_script(saved, tmp_path, sample_script):
    options = ["--model", str(saved), "--num_images", "3", "--device", "cpu", "--batch_size", "4"]
    everything = run_sample(sample_script, *options, "--output_dir", str(tmp_path / "all"))
    files = {path.name for path in everything.iterdir()}
    assert files == {f"{name}-{index:03d}.png" for name in ("cat", "7", "dog") for index in range(3)} | {"grid.png"}

    with Image.open(everything / "grid.png") as grid:
        pixels = np.asarray(grid)
    # Images of 64 pixels with 4 pixels around each.
    assert pixels.shape == (3 * 68 + 4, 3 * 68 + 4, 3)
    for row, name in enumerate(["cat", "7", "dog"]):
        for index in range(3):
            with Image.open(everything / f"{name}-{index:03d}.png") as image:
                assert image.size == (8, 8) and image.mode == "L"
                image = np.asarray(image)
            top, left = 4 + row * 68, 4 + index * 68
            cell = pixels[top : top + 64, left : left + 64]
            assert np.array_equal(cell, image.repeat(8, axis=0).repeat(8, axis=1)[..., None].repeat(3, axis=2))
            class_id = [0, 1, 3][row]
            expected = tiny_pipeline()(class_id, 3, generator=generator(0, "eval", name, index)).images[0]
            # One level of 255 where another batch size rounds the other way.
            assert np.abs(image.astype(int) - np.asarray(expected)).max() <= 1

    again = run_sample(sample_script, *options, "--output_dir", str(tmp_path / "again"))
    assert saved_files(again) == saved_files(everything)
    other_seed = run_sample(sample_script, *options, "--output_dir", str(tmp_path / "other"), "--seed", "1")
    assert all(saved_files(other_seed)[name] != image for name, image in saved_files(everything).items())


def test_sample_script_takes_names_before_ids(saved, tmp_path, sample_script, capsys):
    options = ["--model", str(saved), "--num_images", "1", "--device", "cpu", "--output_dir", str(tmp_path)]
    run_sample(sample_script, *options, "--classes", "3", "7", "dog")
    assert capsys.readouterr().out.endswith("grid.png: rows are dog, 7\n")
    assert {path.name for path in tmp_path.iterdir()} == {"7-000.png", "dog-000.png", "grid.png"}


def test_sample_script_wants_a_task_folder(saved, tmp_path, sample_script):
    (tmp_path / "task-00").symlink_to(saved, target_is_directory=True)
    with pytest.raises(ConfigError, match=r"is the folder of a run, pass one of its tasks: .*task-00$"):
        run_sample(sample_script, "--model", str(tmp_path), "--output_dir", str(tmp_path / "samples"))


def test_sample_script_file_names(sample_script):
    assert sample_script["file_name"]("n01440764 tench", 12) == "n01440764 tench-012.png"
    assert sample_script["file_name"]("a/b%", 0) == "a%2Fb%25-000.png"


@pytest.mark.parametrize(
    ("options", "exit_code", "message"),
    [
        (["--classes", "cat", "bird"], 2, r"--classes: .*'bird'.* Known \(id: name\): 0: 'cat', 1: '7', 3: 'dog'$"),
        (["--classes", "2"], 2, "--classes: .*2: not known"),
        (["--num_inference_steps", "1001"], 2, "--num_inference_steps 1001: the model has 1000"),
        (["--device", "warp"], 2, "--device warp cannot be used"),
        (["--num_images", "0"], 2, "argument --num_images: invalid"),
        (["--model", "no/such/folder"], 4, "--model no/such/folder cannot be loaded"),
    ],
)
def test_sample_script_errors(saved, tmp_path, monkeypatch, capsys, options, exit_code, message):
    monkeypatch.setattr(
        sys, "argv", ["sample.py", "--model", str(saved), "--device", "cpu", "--output_dir", str(tmp_path), *options]
    )
    with pytest.raises(SystemExit) as exit_info:
        runpy.run_path(str(SAMPLE_SCRIPT), run_name="__main__")
    assert exit_info.value.code == exit_code
    error = capsys.readouterr().err.strip()
    assert re.search(message, error.splitlines()[-1]), error
    assert not list(tmp_path.iterdir())


def test_sample_script_refuses_a_model_without_all_weights(saved, tmp_path, sample_script):
    shutil.copytree(saved, tmp_path / "model")
    weights_file = tmp_path / "model" / "unet" / "diffusion_pytorch_model.safetensors"
    weights = load_file(weights_file)
    del weights["conv_out.weight"]
    save_file(weights, weights_file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="lacks weights: conv_out.weight"):
        run_sample(sample_script, "--model", str(tmp_path / "model"), "--output_dir", str(tmp_path / "samples"))
