"""The geometry of F by its Gram matrix, every quantity against the dense D x D matrix of a tiny network."""

import math
import weakref
from dataclasses import replace

import pytest
import torch
from estimate_helpers import GRADIENT_RTOL, flat, num_parameters, relative

from diffusers_cl.gram import eigenvalues, geometry_of, gradient_gram, plan_passes, residual_norm


NUM_ROWS = 9
# Squares of float32 gradients, taken one by one on either side.
RTOL = 1e-4


@pytest.fixture
def draws(make_batches):
    return make_batches([NUM_ROWS])[0]


@pytest.fixture
def rows(small_denoiser, losses, draws, gradient_loop) -> torch.Tensor:
    """The per-sample gradients, `(N, D)` float64, by one backward pass a row."""
    return gradient_loop(small_denoiser, losses, [draws])


def taken(model, losses, draws, memory_bytes=2**24, **kwargs):
    return gradient_gram(model, losses, draws, plan_passes(model, len(draws[0]), memory_bytes), **kwargs)


def test_every_quantity_is_that_of_the_dense_matrix(small_denoiser, losses, draws, rows):
    found = geometry_of(taken(small_denoiser, losses, draws))
    dense = rows.T @ rows / NUM_ROWS
    mu = rows.mean(dim=0)
    v = mu / mu.norm()
    values, vectors = torch.linalg.eigh(dense)
    m = v @ dense @ v
    # arXiv 2509.23593, Theorem 1 and Sec. 3.2: c* mu mu^T with c* = mu^T F mu / |mu|^4.
    rank1 = (mu @ dense @ mu) / mu.norm() ** 4 * torch.outer(mu, mu)
    best = values[-1] * torch.outer(vectors[:, -1], vectors[:, -1])
    residual = torch.linalg.eigvalsh(dense - m * torch.outer(v, v)).abs().max()
    half = NUM_ROWS // 2
    halves = rows[:half].mean(dim=0), rows[half:].mean(dim=0)
    pairs = [rows[i] @ rows[j] for i in range(NUM_ROWS) for j in range(NUM_ROWS) if i != j]
    expected = {
        "num_samples": NUM_ROWS,
        "eigenvalues": values.flip(0)[:5].tolist(),
        "ratio": values[-2] / values[-1],
        "cosines": torch.nn.functional.cosine_similarity(rows, mu[None]).abs().tolist(),
        "frobenius": dense.norm(),
        "trace": dense.trace(),
        "mean_square": mu.square().sum(),
        "unbiased_mean_square": sum(pairs) / len(pairs),
        "second_moment": m,
        "rank1_error": (dense - rank1).norm() / dense.norm(),
        "best_rank1_error": (dense - best).norm() / dense.norm(),
        "diagonal_error": (dense - torch.diag(dense.diagonal())).norm() / dense.norm(),
        "top_cosine": (v @ vectors[:, -1]).abs(),
        "residual": residual,
        "residual_share": residual / m,
        "signal_ratio": NUM_ROWS * mu.square().sum() / dense.trace(),
        "half_cosine": halves[0] @ halves[1] / (halves[0].norm() * halves[1].norm()),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        value = value.item() if isinstance(value, torch.Tensor) else value
        assert found[name] == pytest.approx(value, rel=RTOL), name
    # The two errors the paper compares, on a network whose gradients are neither collinear nor independent.
    assert 0 < found["best_rank1_error"] <= found["rank1_error"] < 1 and 0 < found["diagonal_error"] < 1


def test_gram_and_mean_are_those_of_a_loop(small_denoiser, losses, draws, rows):
    found = taken(small_denoiser, losses, draws)
    gram = rows @ rows.T
    assert relative(found.gram.flatten(), gram.flatten()) < GRADIENT_RTOL
    assert torch.equal(found.gram, found.gram.T)
    assert relative(flat(found.mean), rows.mean(dim=0)) < GRADIENT_RTOL
    assert found.mean.keys() == dict(small_denoiser.named_parameters()).keys()


def test_residual_norm_has_the_sign_of_neither_end(rows):
    # With m too large by far R is negative definite along v: its largest absolute eigenvalue is the lowest one.
    mu = rows.mean(dim=0)
    v, dense = mu / mu.norm(), rows.T @ rows / NUM_ROWS
    for m in (0.0, 0.5, 50.0):
        expected = torch.linalg.eigvalsh(dense - m * torch.outer(v, v)).abs().max().item()
        assert residual_norm(rows @ rows.T, m, mu.square().sum().item()) == pytest.approx(expected, rel=1e-9)


def test_collinear_gradients_are_rank_1():
    direction = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    rows = torch.tensor([1.0, 2.0, 3.0, 1.5], dtype=torch.float64)[:, None] * direction
    values, _ = eigenvalues(rows @ rows.T)
    assert values[0].item() == pytest.approx(rows.square().sum().item() / 4) and values[1] < 1e-12 * values[0]


# The memory bound


@pytest.mark.parametrize("rows_at_a_time", [1, 4])
@pytest.mark.parametrize("columns", [1273, 700, 97])
def test_blocks_change_nothing(small_denoiser, losses, draws, columns, rows_at_a_time):
    whole = taken(small_denoiser, losses, draws)
    plan = plan_passes(small_denoiser, NUM_ROWS, 2**24)
    # 97 columns cut every larger tensor; a panel of 10 does not divide them.
    passes = -(-plan.num_parameters // columns)
    plan = replace(plan, columns=columns, panel=10, rows=rows_at_a_time, passes=passes)
    counted = []
    found = gradient_gram(small_denoiser, losses, draws, plan, counted.append)
    assert sum(counted) == passes * NUM_ROWS
    assert relative(found.gram.flatten(), whole.gram.flatten()) < GRADIENT_RTOL
    assert found.diagonal_square == pytest.approx(whole.diagonal_square, rel=RTOL)
    assert relative(flat(found.mean), flat(whole.mean)) < GRADIENT_RTOL


class Allocations(torch.utils._python_dispatch.TorchDispatchMode):
    """The most bytes that tensors made inside have held at a time, by their storages."""

    def __init__(self):
        super().__init__()
        self.live, self.peak, self.known = 0, 0, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (list, tuple)) else [result]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self._watch(storage)
        self.peak = max(self.peak, self.live)
        return result

    def _watch(self, storage):
        key, size = storage._cdata, storage.nbytes()
        self.known.add(key)
        self.live += size

        def freed():
            self.known.discard(key)
            self.live -= size

        weakref.finalize(storage, freed)


def test_the_bound_is_kept(tiny_unet, losses, make_batches):
    num_samples = 16
    draws = make_batches([num_samples])[0]
    size = num_parameters(tiny_unet)
    unbounded = 4 * num_samples * size
    memory = unbounded // 2
    plan = plan_passes(tiny_unet, num_samples, memory)
    usable = 4 * num_samples * plan.columns
    assert plan.passes == math.ceil(4 * num_samples * size / usable) >= 3
    assert plan.bytes_at_a_time <= memory
    peaks = {}
    for name, chosen in (("bounded", plan), ("whole", plan_passes(tiny_unet, num_samples, 8 * unbounded))):
        with Allocations() as allocations:
            gradient_gram(tiny_unet, losses, draws, chosen)
        peaks[name] = allocations.peak
    # Beside it, the activations of one row and the mean, which are small here.
    with Allocations() as allocations:
        torch.autograd.grad(
            losses(tiny_unet, tuple(tensor[:1] for tensor in draws)).sum(), list(tiny_unet.parameters())
        )
    assert peaks["whole"] > unbounded
    assert peaks["bounded"] < memory + allocations.peak + 8 * size


def test_a_bound_that_holds_no_chunk_is_refused(small_denoiser):
    with pytest.raises(ValueError, match=r"[\d,]+ bytes are needed at least") as error:
        plan_passes(small_denoiser, 1000, 2**16)
    needed = int(str(error.value).split()[0].replace(",", ""))
    plan = plan_passes(small_denoiser, 1000, needed * 1.01)
    assert plan.columns >= 1 and plan.panel >= 1
    assert plan_passes(small_denoiser, 1000, 2**40).passes == 1


def test_a_gradient_that_is_not_finite_is_an_error(small_denoiser, losses, draws):
    broken = (draws[0].clone(), *draws[1:])
    broken[0][3] = float("nan")
    with pytest.raises(FloatingPointError, match="Gram matrix"):
        taken(small_denoiser, losses, broken)
