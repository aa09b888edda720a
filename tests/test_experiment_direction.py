"""scripts/experiments/direction.py: its eigenvectors against a dense Hessian, and a tiny run from end to end."""

import importlib.util
import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import UNet2DModel
from estimate_helpers import relative
from PIL import Image
from safetensors.torch import load_file
from script_helpers import ROOT, finished_run
from torch.func import functional_call, hessian

from diffusers_cl.config import TrainingConfig
from diffusers_cl.fisher import rank1_fisher
from diffusers_cl.models import create_unet


SPEC = importlib.util.spec_from_file_location("direction", ROOT / "scripts" / "experiments" / "direction.py")
direction = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(direction)


def dense_hessian(model, batch) -> torch.Tensor:
    """The second derivative of the mean loss, float64 of shape `(parameters, parameters)`."""
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def mean_loss(vector: torch.Tensor) -> torch.Tensor:
        parts = vector.split([shape.numel() for shape in shapes.values()])
        parameters = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        return direction.losses(lambda *args, **kwargs: functional_call(model, parameters, args, kwargs), batch).mean()

    return hessian(mean_loss)(direction.flat(model).float()).double()


# Eigenvectors


def test_eigenvectors_are_those_of_the_dense_hessian(small_denoiser, make_batches):
    batches, size = make_batches([3, 1]), direction.flat(small_denoiser).numel()
    dense = dense_hessian(small_denoiser, make_batches([4])[0])
    x = torch.randn(size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    # Batches of unequal sizes: a mean over rows, not over batches. Float32 by two orders of the same operations.
    assert relative(direction.hessian_product(small_denoiser, batches, x), dense @ x) < 1e-4

    vectors, found = direction.top_eigenvectors(
        lambda x: direction.hessian_product(small_denoiser, batches, x), size, 3
    )
    values, expected = torch.linalg.eigh(dense)
    # A residual r moves a value by less than r, and in practice by r^2 over the gap.
    assert found["settled"] and found["products"] < direction.MAX_PRODUCTS
    assert torch.tensor(found["values"]).tolist() == pytest.approx(values.flip(0)[:3].tolist(), rel=0.02)
    assert direction.cosine(vectors[0], expected[:, -1]) > 0.999
    assert torch.allclose(vectors @ vectors.T, torch.eye(3, dtype=torch.float64), atol=1e-9)
    for vector, value, residual in zip(vectors, found["values"], found["residuals"], strict=True):
        assert (dense @ vector - value * vector).norm().item() == pytest.approx(residual, rel=1e-2, abs=1e-4)

    # Power iteration, the plain way to the same vector.
    for _ in range(100):
        x = dense @ x / x.norm()
    assert direction.cosine(vectors[0], x) > 0.999


def test_the_largest_eigenvalue_is_not_the_largest_in_magnitude():
    values = torch.tensor([-90.0, -1.0, 0.1, 0.2, 5.0, 20.0], dtype=torch.float64)
    basis, _ = torch.linalg.qr(torch.randn(6, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64))
    matrix = basis @ torch.diag(values) @ basis.T
    vectors, found = direction.top_eigenvectors(lambda x: matrix @ x, 6, 2)
    assert found["values"] == pytest.approx([20, 5], rel=0.02) and found["lowest eigenvalue"] == pytest.approx(-90)
    assert direction.cosine(vectors[0], basis[:, 5]) > 0.99


# Agreement


def test_agreement_of_a_known_direction_in_noise():
    size, rounds, signal = 20_000, 16, 0.5
    noise = torch.randn(2, rounds, size, generator=torch.Generator().manual_seed(0), dtype=torch.float64) / size**0.5
    known = torch.zeros(size, dtype=torch.float64)
    known[7] = signal
    for number in (1, 4, 16):
        # Two means of n rounds share the signal s^2 and nothing of their noise, 1 / n each.
        expected = signal**2 / (signal**2 + 1 / number)
        assert direction.agreement(*(known + noise), number) == pytest.approx(expected, abs=0.03)
    assert direction.agreement(known + noise[0], -known - noise[0], 4) == pytest.approx(1.0)


# From end to end


@pytest.fixture
def tiny_run(tmp_path_factory, monkeypatch) -> Path:
    """A finished run of one task of five steps, with EMA, and the script's constants to fit it."""
    constants = {"STEPS_BEFORE_END": (4, 1), "ROUNDS": (1, 2), "HESSIAN_DRAWS": 12, "HELD_OUT_DRAWS": 24}
    for name, value in {**constants, "EIGENVECTORS": 2, "MAX_PRODUCTS": 5, "BATCH_SIZE": 8}.items():
        monkeypatch.setattr(direction, name, value)
    settings = {"tasks": "[[0, 1]]", "replay": "none", "penalty": "none", "lr_scheduler": "constant"}
    settings |= {"max_train_samples": 240, "lr_warmup_steps": 0, "use_ema": "true", "eval_images_per_class": 2}
    return finished_run(tmp_path_factory, "direction", **settings)


def altered(run: Path, copy: Path, **settings) -> Path:
    shutil.copytree(run, copy)
    config = yaml.safe_load((copy / "config.yaml").read_text())
    (copy / "config.yaml").write_text(yaml.safe_dump({**config, **settings}))
    return copy


def test_the_script_on_a_tiny_run(tiny_run, tmp_path, capsys):
    output, picture = tmp_path / "out" / "direction.json", tmp_path / "direction.png"
    assert direction.main([str(tiny_run), "--output", str(output), "--plot", str(picture)]) == 0
    printed, content = capsys.readouterr().out, json.loads(output.read_text())
    assert [row["variant"] for row in content["rows"]] == ["raw", "ema"]
    assert content["constants"]["ROUNDS"] == [1, 2] and content["threads"] == 1 and content["versions"]["torch"]
    assert "| | raw (n=1) | ema (n=1) |" in printed and Image.open(picture).width > 600
    for row in content["rows"]:
        numbers = row["numbers"]
        assert row["step"] == 5 and row["seed"] == 0 and row["config"]["tasks"] == [[0, 1]]
        for name in [name for name in numbers if name.startswith("cos") or "share" in name or "m /" in name]:
            assert 0 <= numbers[name] <= 1 + 1e-9, name
            assert f"| {name} |" in printed
        for loss in ("old", "unseen"):
            by_hessian = numbers[f"curvature along v, Hessian product, {loss} loss"]
            assert numbers[f"curvature along v, {loss} loss"] == pytest.approx(by_hessian, rel=0.05)
        # The network is untrained: v is stiff, random directions are not, and the weights move on.
        assert numbers["curvature along v, old loss"] > 5 * numbers["curvature along random, old loss"]
        distances = [numbers[f"distance of the weights, {back} steps before"] for back in (4, 1)]
        assert distances[0] > distances[1] > 0
        assert numbers["cos, 1 steps before"] > numbers["cos, 4 steps before"]


def test_v_is_that_of_the_product_at_the_right_weights(tiny_run):
    task = direction.Task(tiny_run)
    raw, ema = task.network("raw", 5), task.network("ema", 5)
    # A published folder holds the EMA; a network of ten classes has the other rows as a longer stream starts with them.
    published = UNet2DModel.from_pretrained(tiny_run / "task-00" / "unet")
    checkpoint = load_file(tiny_run / "checkpoint-5" / "model.safetensors")
    config = TrainingConfig(**yaml.safe_load((tiny_run / "config.yaml").read_text()))
    untrained = create_unet(dict(published.config), 1, {str(digit): digit for digit in range(10)}, config).state_dict()
    for unet, expected in ((ema, published.state_dict()), (raw, checkpoint)):
        for name, tensor in unet.state_dict().items():
            assert torch.equal(tensor[:2] if name == "class_embedding.weight" else tensor, expected[name]), name
        assert torch.equal(unet.class_embedding.weight[2:], untrained["class_embedding.weight"][2:])

    v, _ = direction.stability(task, "ema", ema)
    fisher = rank1_fisher(ema, direction.losses, task.rounds("old", "v"), diagnostics=False, curvature=False)
    assert direction.cosine(v, direction.flat(fisher.direction)) == pytest.approx(1.0, abs=1e-6)
    images, unseen = task.draws("old", "v", 9).images, task.draws("unseen", "v", 9).images
    assert set(images.class_ids.tolist()) == {0, 1} and set(unseen.class_ids.tolist()) == set(range(2, 10))
    noise = [next(iter(task.draws("old", purpose, 8)))[3] for purpose in ("v", "v again")]
    assert not torch.isclose(*noise).any()


def test_variants_and_refusals(tiny_run, tmp_path, capsys):
    decayed = altered(tiny_run, tmp_path / "decayed", lr_scheduler="cosine", use_ema=False)
    assert direction.Task(decayed).variants == {"decayed": "model.safetensors"}

    def refusal(run: Path, code: int) -> str:
        assert direction.main([str(run), "--output", str(tmp_path / "out.json")]) == code
        return capsys.readouterr().err

    assert "2 entries; allowed: one" in refusal(altered(tiny_run, tmp_path / "two", tasks=[[0, 1], [2]]), 3)
    shutil.rmtree(decayed / "checkpoint-4")
    assert "checkpoints [5, 3, 2, 1]; needed: the last and (4, 1) before" in refusal(decayed, 4)
