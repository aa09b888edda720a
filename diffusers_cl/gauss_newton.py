"""The Gauss-Newton matrix of the denoising loss, by products with it alone: what the empirical Fisher is compared with."""

from collections.abc import Callable, Iterable

import torch
from torch.func import jvp

from .passes import estimating, finite, trainable_parameters, with_parameters


# Vectors that are iterated together, and times. On digits the second eigenvalue is an eighth of the first (E1), so that the
# first vector's error shrinks by that in every iteration.
BLOCK = 3
NUM_ITERATIONS = 6


def _by_name(vector: torch.Tensor, parameters: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A vector of D numbers by parameter name, float32."""
    parts = vector.float().split([parameter.numel() for parameter in parameters.values()])
    return {name: part.view_as(p) for (name, p), part in zip(parameters.items(), parts, strict=True)}


def gauss_newton_products(
    model: torch.nn.Module, predict: Callable, batches: Iterable, vectors: torch.Tensor
) -> torch.Tensor:
    """
    Returns the Gauss-Newton matrix of a mean squared error times some vectors, float64 of their shape.

    The loss is the squared error averaged over pixels and rows, so that `GN = 2 / (rows * pixels) sum J^T J`, with J the
    derivative of a row's prediction; it leaves out what the curvature of the network itself adds to the Hessian (compare
    arXiv 2410.13850). A product is one forward-mode derivative and one backward pass.

    Args:
        model (`torch.nn.Module`): the unwrapped network.
        predict: `predict(model, batch) -> (rows, ...)`, calling nothing but `model(...)`.
        batches: tuples of tensors.
        vectors (`torch.Tensor` of shape `(K, D)`): float64.
    """
    parameters = trainable_parameters(model)
    fixed = {name: parameter.detach() for name, parameter in parameters.items()}
    total, count = torch.zeros_like(vectors), 0
    with estimating(model):
        for batch in batches:
            prediction = predict(model, batch)
            for k, vector in enumerate(vectors):
                tangent = _by_name(vector, fixed)
                _, moved = jvp(
                    lambda values, b=batch: predict(with_parameters(model, values), b), (fixed,), (tangent,)
                )
                found = torch.autograd.grad(
                    prediction, list(parameters.values()), moved.detach(), retain_graph=k < len(vectors) - 1
                )
                total[k] += torch.cat([tensor.flatten() for tensor in found]).double()
            count += prediction.numel()
    return 2 * total / count


def top_gauss_newton(
    model: torch.nn.Module,
    predict: Callable,
    batches: Iterable,
    start: torch.Tensor,
    block: int = BLOCK,
    num_iterations: int = NUM_ITERATIONS,
    on_iteration: Callable[[], None] = lambda: None,
) -> tuple[torch.Tensor, list[float], float]:
    """
    Returns leading eigenvectors of the Gauss-Newton matrix, by block power iteration with a Rayleigh-Ritz step at its end.

    Args:
        model, predict, batches: as for [`gauss_newton_products`]; the batches are re-iterable.
        start (`torch.Tensor` of shape `(D,)`): a guess; the rest of the block starts at random.
        block (`int`), num_iterations (`int`): vectors, and times that they are multiplied.
        on_iteration: called after each of `num_iterations + 1` products.

    Returns:
        `torch.Tensor` of shape `(block, D)`, float64, orthonormal; their Rayleigh quotients, largest first; and the norm
        of `GN x - value x` of the first one, as a share of its value.
    """
    noise = torch.randn(block - 1, len(start), generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    basis = torch.linalg.qr(torch.cat([start.double()[None], noise.to(start.device)]).T)[0].T
    for iteration in range(num_iterations + 1):
        image = finite(gauss_newton_products(model, predict, batches, basis), "a Gauss-Newton product")
        on_iteration()
        if iteration < num_iterations:
            basis = torch.linalg.qr(image.T)[0].T
    values, rotation = torch.linalg.eigh((basis @ image.T + image @ basis.T) / 2)
    vectors, image = rotation.flip(1).T @ basis, rotation.flip(1).T @ image
    values = values.flip(0).tolist()
    residual = (image[0] - values[0] * vectors[0]).norm().item() / max(values[0], 1e-300)
    return vectors, values, residual
