"""Bands, the linear surrogate, moves and the Gauss-Newton matrix, each against an explicit computation on a tiny network."""

import math

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler
from estimate_helpers import by_name, flat, moved_along, num_parameters, relative
from safetensors.torch import save_file
from torch.func import functional_call, jacrev

from diffusers_cl.bands import ALL, BANDS, band_statistics, compare_bands, gram_of_files, with_all_timesteps
from diffusers_cl.gauss_newton import gauss_newton_products, top_gauss_newton
from diffusers_cl.losses import denoising_losses
from diffusers_cl.movement import coordinate_direction, loss_curve, rises
from diffusers_cl.subject import stored_cosines
from diffusers_cl.surrogate import linear_residuals, predicted_noise, scaled_prediction_error


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Draws(list):
    """Batches of one timestep, as `FisherBatches` gives them."""

    def __init__(self, timestep: int, num_rows: int, seed: int):
        scheduler = DDIMScheduler()
        images = torch.randn(num_rows, 1, 4, 4, generator=generator(seed)).clamp(-1, 1)
        noise = torch.randn(num_rows, 1, 4, 4, generator=generator(seed + 1000))
        timesteps = torch.full((num_rows,), timestep)
        noisy = scheduler.add_noise(images, noise, timesteps)
        labels = torch.randint(0, 4, (num_rows,), generator=generator(seed))
        columns = [tensor.split(50) for tensor in (noisy, timesteps, labels, noise)]
        super().__init__(zip(*columns, strict=True))
        self.timesteps = (timestep, timestep + 1)


# Bands


def test_statistics_of_a_band_are_those_of_its_gradients(small_denoiser, losses, make_batches, gradient_loop):
    halves = [make_batches([3, 2], seed=seed) for seed in (0, 1)]
    found = band_statistics(small_denoiser, losses, halves)
    rows = [gradient_loop(small_denoiser, losses, half) for half in halves]
    for number in (0, 1):
        assert relative(found[f"half.{number}"].double(), rows[number].mean(dim=0)) < 1e-5
    assert found["trace"].item() == pytest.approx(rows[0].square().sum(dim=1).mean().item(), rel=1e-5)


def test_products_of_vectors_in_files(tmp_path):
    vectors = torch.randn(6, 1000, generator=generator())
    for k in range(3):
        save_file({"a": vectors[2 * k].clone(), "b": vectors[2 * k + 1].clone()}, tmp_path / f"{k}.safetensors")
    files = [tmp_path / f"{k}.safetensors" for k in range(3)]
    expected = vectors.double() @ vectors.double().T
    assert torch.allclose(gram_of_files(files, ["a", "b"], chunk=300), expected)


def test_all_timesteps_are_the_bands_by_their_lengths():
    vectors = torch.randn(12, 40, generator=generator(), dtype=torch.float64)  # two tasks, three bands, two halves
    full = with_all_timesteps(vectors @ vectors.T, 2).view(2, 4, 2, 2, 4, 2)
    tasks = vectors.view(2, 3, 2, 40)
    weights = torch.tensor([333.0, 334.0, 333.0], dtype=torch.float64) / 1000
    every = torch.einsum("b,kbhd->khd", weights, tasks)
    for k in (0, 1):
        for h in (0, 1):
            assert full[k, 3, h, 1 - k, 3, 1].item() == pytest.approx((every[k, h] @ every[1 - k, 1]).item())
            assert full[k, 3, h, 0, 1, 0].item() == pytest.approx((every[k, h] @ tasks[0, 1, 0]).item())


def test_cosines_without_noise_are_those_of_the_true_directions():
    # Two tasks whose directions in a band have a known cosine, under noise as long as they are.
    size, cosine = 200_000, 0.6
    a, b = torch.randn(2, size, generator=generator(), dtype=torch.float64)
    a, b = a / a.norm(), b - (b @ a) / (a @ a) * a
    other = cosine * a + math.sqrt(1 - cosine**2) * b / b.norm()
    noise = torch.randn(2, 3, 2, size, generator=generator(1), dtype=torch.float64) / size**0.5
    vectors = (torch.stack([a, other])[:, None, None] + noise).reshape(12, size)
    traces = torch.tensor([[1.0, 2.0, 3.0], [1.0, 1.0, 1.0]], dtype=torch.float64)
    found = compare_bands(vectors @ vectors.T, traces, 2, 10)
    for name in BANDS:
        between = found["between_tasks"][name]
        # The mean of two halves has |mu|^2 + 1/2.
        assert between["cosine"][0][1] == pytest.approx(cosine / 1.5, abs=0.02)
        assert between["corrected"][0][1] == pytest.approx(cosine, abs=0.02) and between["corrected"][1][1] == 1.0
        assert found["agreement"][name] == pytest.approx([0.5, 0.5], abs=0.02)
    assert found["between_bands"][0]["corrected"][0][2] == pytest.approx(1.0, abs=0.02)
    # A band is a part of all timesteps, draws included.
    assert found["between_bands"][0]["corrected"][0][3] == pytest.approx(1.0, abs=0.02)
    # Three bands' noise is averaged for all timesteps: 1/3 for a half.
    assert found["agreement"][ALL][0] == pytest.approx(1 / (1 + 1 / 3), abs=0.02)
    assert found["trace_share"][0]["low_snr"] == pytest.approx(999 / (333 + 668 + 999))

    nothing = noise.reshape(12, size) + 0.0
    nothing[1::2] = -nothing[::2]
    found = compare_bands(nothing @ nothing.T, traces, 2, 10)
    assert found["between_tasks"]["low_snr"]["corrected"][0][1] is None


def test_cosines_of_stored_directions(small_denoiser):
    vectors = torch.randn(3, num_parameters(small_denoiser), generator=generator())
    each = [by_name(vector, small_denoiser) for vector in vectors]
    stacked = {name: torch.stack([tensors[name] for tensors in each]) for name in each[0]}
    expected = torch.nn.functional.cosine_similarity(vectors[:, None], vectors[None], dim=2)
    assert np.allclose(stored_cosines(stacked), expected.numpy(), atol=1e-5)


# The linear surrogate


class Linear(torch.nn.Module):
    """A network that is a matrix times its input, plus a nonlinear part of a known size."""

    def __init__(self, matrix: torch.Tensor, bend: float = 0.0):
        super().__init__()
        self.matrix, self.bend = torch.nn.Parameter(matrix), bend

    def forward(self, sample, timesteps, class_labels):
        flat = sample.flatten(1)
        output = flat @ self.matrix.T + self.bend * (flat.square() - 1)
        return type("Output", (), {"sample": output.view_as(sample)})


def test_residuals_of_a_scalar_a_linear_and_a_bent_map():
    train, held_out = Draws(700, 400, seed=0), Draws(700, 100, seed=1)
    scheduler = DDIMScheduler()
    scalar = linear_residuals(Linear(0.8 * torch.eye(16)), scheduler, train, held_out)
    assert scalar["scale"] == pytest.approx(0.8, rel=1e-5)
    assert scalar["scalar"] < 1e-10 and scalar["linear"] < 1e-6
    assert (scalar["samples"], scalar["held_out_samples"]) == (400, 100)
    mixed = Linear(0.8 * torch.eye(16) + 0.3 * torch.randn(16, 16, generator=generator()))
    found = linear_residuals(mixed, scheduler, train, held_out)
    assert found["linear"] < 1e-6 and 0.3 < found["scalar"] < 1
    bent = linear_residuals(Linear(0.8 * torch.eye(16), bend=0.5), scheduler, train, held_out)
    # The variance of 0.5 (x^2 - 1) is 0.5 beside 0.64, a linear map sees none of it, and fits noise to it.
    assert 0.35 < bent["linear"] < 0.6 and 0.35 < bent["scalar"] < 0.6


def test_error_of_the_scaled_prediction():
    draws, scheduler = Draws(300, 120, seed=3), DDIMScheduler()
    network = Linear(0.5 * torch.eye(16))
    x = torch.cat([batch[0] for batch in draws])
    expected = (x - (1 - scheduler.alphas_cumprod[300]).sqrt() * 0.5 * x).square().mean().item()
    assert scaled_prediction_error(network, scheduler, draws) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("prediction_type", ["epsilon", "sample", "v_prediction"])
def test_predicted_noise_of_every_kind_of_network(prediction_type):
    scheduler = DDIMScheduler(prediction_type=prediction_type)
    images, noise = torch.randn(2, 5, 1, 4, 4, generator=generator())
    timesteps = torch.tensor([0, 100, 500, 900, 999])
    noisy = scheduler.add_noise(images, noise, timesteps)
    target = {
        "epsilon": noise,
        "sample": images,
        "v_prediction": scheduler.get_velocity(images, noise, timesteps),
    }[prediction_type]

    def perfect(*args, **kwargs):
        return type("Output", (), {"sample": target})

    # At t = 0 the noise is a hundredth of the input.
    assert torch.allclose(predicted_noise(perfect, scheduler, noisy, timesteps, None), noise, atol=1e-4)


# Moves


def test_a_loss_curve_is_the_loss_of_moved_copies(small_denoiser, losses, make_batches):
    batches, before = make_batches([5, 4]), flat(small_denoiser.parameters())
    direction = torch.randn(num_parameters(small_denoiser), generator=generator())
    direction = direction / direction.norm()
    counted = []
    curve = loss_curve(small_denoiser, losses, batches, direction, (0.1, 1.0), lambda: counted.append(1))
    assert len(curve) == len(counted) == 5 and torch.equal(flat(small_denoiser.parameters()), before)
    for step, value in zip((-1.0, -0.1, 0.0, 0.1, 1.0), curve, strict=True):
        model = moved_along(small_denoiser, by_name(direction, small_denoiser), step)
        expected = torch.cat([losses(model, batch) for batch in batches]).mean().item()
        assert value == pytest.approx(expected, rel=1e-5)
    assert rises(curve) == pytest.approx([(curve[1] + curve[3]) / 2 - curve[2], (curve[0] + curve[4]) / 2 - curve[2]])


def test_the_diagonals_top_coordinates():
    diagonal = torch.rand(1000, generator=generator())
    vector = coordinate_direction(diagonal, generator(), count=30)
    moved = vector.nonzero().flatten()
    assert set(moved.tolist()) == set(diagonal.topk(30).indices.tolist())
    assert vector.norm().item() == pytest.approx(1.0) and vector[moved].unique().numel() == 2
    assert not torch.equal(vector, coordinate_direction(diagonal, generator(1), count=30))


# Gauss-Newton


def predict(model, batch):
    return model(batch[0], batch[1], class_labels=batch[2]).sample


@pytest.fixture
def dense(small_denoiser, make_batches) -> torch.Tensor:
    """The Gauss-Newton matrix of the mean loss, float64 of shape `(D, D)`, from the whole Jacobian."""
    batch = make_batches([3])[0]
    parameters = {name: parameter.detach() for name, parameter in small_denoiser.named_parameters()}

    def outputs(values):
        return predict(lambda *args, **kwargs: functional_call(small_denoiser, values, args, kwargs), batch).flatten()

    jacobian = torch.cat([part.flatten(1) for part in jacrev(outputs)(parameters).values()], dim=1).double()
    return 2 * jacobian.T @ jacobian / len(jacobian)


def test_products_and_top_eigenvectors_of_the_gauss_newton_matrix(small_denoiser, make_batches, dense):
    batches, size = make_batches([2, 1]), num_parameters(small_denoiser)
    vectors = torch.randn(2, size, generator=generator(), dtype=torch.float64)
    products = gauss_newton_products(small_denoiser, predict, batches, vectors)
    assert relative(products.flatten(), (vectors @ dense).flatten()) < 1e-4

    values, expected = torch.linalg.eigh(dense)
    counted = []
    found, quotients, residual = top_gauss_newton(
        small_denoiser, predict, batches, vectors[0], num_iterations=8, on_iteration=lambda: counted.append(1)
    )
    assert len(counted) == 9
    assert quotients[0] == pytest.approx(values[-1].item(), rel=1e-3)
    assert quotients[1] == pytest.approx(values[-2].item(), rel=0.05)
    assert (found[0] @ expected[:, -1]).abs().item() > 0.999
    assert torch.allclose(found @ found.T, torch.eye(3, dtype=torch.float64), atol=1e-9)
    distance = (dense @ found[0] - quotients[0] * found[0]).norm().item() / quotients[0]
    assert residual == pytest.approx(distance, abs=1e-4)


def test_at_a_perfect_fit_it_is_the_hessian(small_denoiser, make_batches, dense):
    # Targets are the predictions: no residual, so that the Hessian has no other part.
    batch = make_batches([3])[0]
    with torch.no_grad():
        fitted = (*batch[:3], predict(small_denoiser, batch))
    names, inputs = zip(*small_denoiser.named_parameters(), strict=True)
    vector = torch.randn(num_parameters(small_denoiser), generator=generator(2), dtype=torch.float64)
    tangent = by_name(vector, small_denoiser)
    gradients = torch.autograd.grad(denoising_losses(small_denoiser, *fitted).mean(), inputs, create_graph=True)
    along = sum((gradient * tangent[name]).sum() for gradient, name in zip(gradients, names, strict=True))
    assert relative(flat(torch.autograd.grad(along, inputs)), dense @ vector) < 1e-3
