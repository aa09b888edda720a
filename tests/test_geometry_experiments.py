"""The experiments around the geometry: the VAE control, the comparison of sizes, and v along a run, each tiny."""

import importlib.util
import json
import sys

import pytest
import torch
from script_helpers import ROOT, finished_run

from diffusers_cl.config import TrainingConfig
from diffusers_cl.models import create_unet, load_unet_config


def load(name: str):
    folder = ROOT / "scripts" / "experiments"
    sys.path.insert(0, str(folder))
    try:
        spec = importlib.util.spec_from_file_location(name, folder / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(folder))
    return module


vae_control, geometry_sizes, trajectory = load("vae_control"), load("geometry_sizes"), load("trajectory")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def content(ratio: float, t=(100, 700)) -> dict:
    row = {"ratio": ratio, "eigenvalues": [1.0, ratio, 0.1, 0.01, 0.001], "trace": 2.0, "frobenius": 1.25}
    row |= {"second_moment": 0.5, "loss": 0.1, "rank1_error": 0.2, "diagonal_error": 1.0, "signal_ratio": 9.0}
    rows = [{"t": at, "num_samples": 8, "cosines": [0.5, 0.7], **row} for at in t]
    return {"timesteps": {"rows": rows}, "num_parameters": 1234, "data": "digits"}


# VAE


def test_the_vae_loss_is_its_formula():
    model, images, noise = vae_control.VAE(), torch.rand(3, 64) * 2 - 1, torch.randn(3, 8)
    mean, log_variance = model.encoder(images).chunk(2, dim=1)
    deviation = (log_variance / 2).exp()
    output = model.decoder(mean + deviation * noise)
    code = torch.distributions.Normal(mean, deviation)
    divergence = torch.distributions.kl_divergence(code, torch.distributions.Normal(0.0, 1.0)).sum(dim=1)
    expected = (output - images).square().sum(dim=1) + 0.3 * divergence
    assert torch.allclose(vae_control.vae_losses(0.3)(model, (images, noise)), expected, rtol=1e-5)


def test_shares_of_a_known_spectrum():
    found = vae_control.shares(content(0.5)["timesteps"]["rows"][0])
    expected = {"share_of_trace": 0.5, "share_of_square": 0.64, "mean_direction": 0.25, "ratio": 0.5}
    assert found == pytest.approx(expected)


def test_the_vae_control(tmp_path, monkeypatch, capsys):
    for name, value in {"NUM_STEPS": 3, "NUM_SAMPLES": 12, "NUM_SEEDS": 1}.items():
        monkeypatch.setattr(vae_control, name, value)
    (tmp_path / "geometry.json").write_text(json.dumps(content(0.5)))
    output = tmp_path / "vae.json"
    assert vae_control.main(["--output", str(output), "--geometry", str(tmp_path / "geometry.json")]) == 0
    found, printed = json.loads(output.read_text()), capsys.readouterr().out
    assert [row["kl_weight"] for row in found["rows"]] == [1.0, 1e-3, 0.0]
    assert all(0 < row["mean_direction"] <= row["share_of_trace"] <= 1 for row in found["rows"])
    assert "| MSE + 0.001 KL |" in printed and "about 85%" in printed and "diffusion, t = 100 to 900" in printed
    (tmp_path / "geometry.json").write_text("{}")
    assert vae_control.main(["--output", str(output), "--geometry", str(tmp_path / "geometry.json")]) == 2
    assert "has no timesteps" in capsys.readouterr().err


# Sizes


def test_sizes_side_by_side(tmp_path, capsys):
    for name, ratio in (("small", 0.5), ("base", 0.125)):
        (tmp_path / f"{name}.json").write_text(json.dumps(content(ratio)))
    models = [f"{name}={tmp_path / name}.json" for name in ("small", "base")]
    output, picture = tmp_path / "sizes.json", tmp_path / "figure_6.png"
    assert geometry_sizes.main([*models, "--output", str(output), "--plot", str(picture)]) == 0
    assert "| base | 1,234 | 0.125 | 0.125 | 100 | 0.100 |" in capsys.readouterr().out
    assert [model["name"] for model in json.loads(output.read_text())["models"]] == ["small", "base"]
    assert picture.stat().st_size > 3000

    (tmp_path / "base.json").write_text(json.dumps(content(0.1, t=(100,))))
    assert geometry_sizes.main([*models, "--output", str(output)]) == 2
    assert "different timesteps" in capsys.readouterr().err
    assert geometry_sizes.main(["base", "--output", str(output)]) == 2 and "NAME=FILE" in capsys.readouterr().err


# Along a run


def test_v_along_a_tiny_run(tmp_path_factory, tmp_path, monkeypatch, capsys):
    import direction

    monkeypatch.setattr(direction, "STEPS_BEFORE_END", (4, 1))
    monkeypatch.setattr(direction, "BATCH_SIZE", 8)
    for name, value in {"STEPS": (1, 5), "BACK": 2, "ROUNDS": 1, "DRAWS": 8, "NUM_ITERATIONS": 1}.items():
        monkeypatch.setattr(trajectory, name, value)
    # As test_experiment_direction.py has it.
    settings = {"tasks": "[[0, 1]]", "replay": "none", "penalty": "none", "lr_scheduler": "constant"}
    settings |= {"max_train_samples": 240, "lr_warmup_steps": 0, "use_ema": "true", "eval_images_per_class": 2}
    run = finished_run(tmp_path_factory, "direction", **settings)
    output = tmp_path / "trajectory.json"
    assert trajectory.main([str(run), "--output", str(output), "--plot", str(tmp_path / "plot.png")]) == 0
    rows = json.loads(output.read_text())["rows"]
    assert [(row["variant"], row["step"]) for row in rows] == [("raw", 1), ("raw", 5), ("ema", 1), ("ema", 5)]
    assert rows[0]["cosine_back"] is None and 0 < rows[1]["cosine_back"] <= 1
    for row in rows:
        # v lies in no direction that is stiffer than the stiffest.
        assert 0 <= row["gauss_newton_cosine"] <= 1 and 0 < row["second_moment"] and row["gauss_newton"] > 0
        assert row["direction_share"] > 0
    assert "| 5 | ema |" in capsys.readouterr().out and (tmp_path / "plot.png").stat().st_size > 3000


# The paper's networks


@pytest.mark.parametrize(
    ("name", "stages", "layers"),
    [("base", 3, 2), ("small_1", 1, 1), ("small_3", 3, 1)],
    ids=["base", "small_1", "small_3"],
)
def test_the_papers_networks(name, stages, layers):
    # arXiv 2509.23593, App. C and C.1: so many ResNet blocks of 16 channels, and layers in each.
    config = TrainingConfig(
        resolution=8, model_config_name_or_path=str(ROOT / "configs" / "models" / f"paper_{name}.json")
    )
    unet = create_unet(load_unet_config(config), 1, {"a": 0, "b": 1}, config)
    assert tuple(unet.config.block_out_channels) == (16,) * stages and unet.config.layers_per_block == layers
    with torch.no_grad():
        output = unet(torch.zeros(2, 1, 8, 8), torch.tensor([1, 999]), class_labels=torch.tensor([0, 1])).sample
    assert output.shape == (2, 1, 8, 8) and output.isfinite().all()
