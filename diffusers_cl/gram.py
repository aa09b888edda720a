"""
The second moment `F = E[g g^T]` of per-sample gradients by its N x N Gram matrix: exact, and without any D x D matrix.

The gradients of N draws are the rows of X, `(N, D)`, so that `F = X^T X / N`. Its eigenvalues are those of `X X^T / N`, and
norms and products of F with the mean gradient are sums over that matrix. X itself is formed a block of columns at a time (a
block may split one tensor), so that memory does not grow with N x D; every block costs one pass over the draws.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch.func import grad, vmap

from .passes import Losses, estimating, finite, trainable_parameters, with_parameters


# The share of the memory that the float64 copy of some columns takes.
PANEL_SHARE = 1 / 8
# Rows of X that are multiplied at a time: the upper half of a symmetric product is not computed.
ROW_BLOCK = 128
# Rows that an accelerator differentiates at a time.
MAX_ROWS = 32


@dataclass(frozen=True)
class Plan:
    """
    How the Gram matrix is taken within a memory bound.

    Attributes:
        num_samples, num_parameters (`int`): N and D.
        columns (`int`): of X at a time.
        rows (`int`): gradients at a time.
        panel (`int`): columns in float64 at a time.
        passes (`int`): over the draws, `ceil(D / columns)`.
        bytes_at_a_time (`int`): what all of that takes, beside the network and the activations of `rows` rows.
    """

    num_samples: int
    num_parameters: int
    columns: int
    rows: int
    panel: int
    passes: int
    bytes_at_a_time: int


def plan_passes(model: torch.nn.Module, num_samples: int, memory_bytes: float) -> Plan:
    """
    Returns how many columns fit, `usable / (4 N)`, and so how many passes it takes, `ceil(4 N D / usable)`.

    Usable is what is left of the memory after the float64 panel, the N x N sums, and the gradients of the tensors that a
    block cuts at its two ends.

    Raises:
        ValueError: when no column fits, with the bytes that are needed at least.
    """
    parameters = trainable_parameters(model)
    sizes = [parameter.numel() for parameter in parameters.values()]
    total, largest = sum(sizes), max(sizes)
    panel_bytes, sums_bytes = PANEL_SHARE * memory_bytes, 3 * 8 * num_samples**2
    on_cpu = next(iter(parameters.values())).device.type == "cpu"
    # On a CPU one image's convolutions are faster than the grouped ones that vmap makes of many (2 to 1 on digits).
    rows = 1 if on_cpu else int(max(1, min(MAX_ROWS, num_samples, panel_bytes // (8 * largest))))
    left = memory_bytes - panel_bytes - sums_bytes - 8 * largest * rows
    columns = min(total, int(left // (4 * num_samples + 4 * rows)))
    panel = min(columns, int(panel_bytes // (8 * num_samples)))
    if columns < 1 or panel < 1:
        needed = (sums_bytes + 8 * largest + 4 * num_samples + 4) / (1 - PANEL_SHARE)
        raise ValueError(f"{int(max(needed, 8 * num_samples / PANEL_SHARE)) + 1:,} bytes are needed at least")
    used = 4 * (num_samples + rows) * columns + 8 * largest * rows + 8 * num_samples * panel + sums_bytes
    return Plan(num_samples, total, columns, rows, panel, -(-total // columns), used)


def _blocks(parameters: dict[str, torch.Tensor], columns: int):
    """Yields lists of `(name, start, stop)`, parts of flat tensors with so many numbers together."""
    block, room = [], columns
    for name, parameter in parameters.items():
        start = 0
        while start < parameter.numel():
            stop = min(parameter.numel(), start + room)
            block.append((name, start, stop))
            room, start = room - (stop - start), stop
            if room == 0:
                yield block
                block, room = [], columns
    if block:
        yield block


def _gradients(model, losses: Losses, rows: tuple[torch.Tensor, ...], parameters: dict, names: list[str]) -> list:
    """Of some parameters and every row, `(rows, parameter.numel())` each."""
    if len(rows[0]) == 1:
        found = torch.autograd.grad(losses(model, rows).squeeze(0), [parameters[name] for name in names])
        return [gradient.reshape(1, -1) for gradient in found]
    others = {name: parameter.detach() for name, parameter in parameters.items() if name not in names}

    def loss_of_row(values, row):
        return losses(with_parameters(model, values | others), tuple(tensor[None] for tensor in row)).squeeze(0)

    values = {name: parameters[name].detach() for name in names}
    found = vmap(grad(loss_of_row), in_dims=(None, 0))(values, rows)
    return [found[name].reshape(len(rows[0]), -1) for name in names]


def _add_products(gram: torch.Tensor, panel: torch.Tensor) -> None:
    """Adds `panel panel^T` to the blocks of the lower triangle."""
    for start in range(0, len(gram), ROW_BLOCK):
        stop = min(start + ROW_BLOCK, len(gram))
        gram[start:stop, :stop].addmm_(panel[start:stop], panel[:stop].T)


@dataclass
class GradientGram:
    """
    What N per-sample gradients say about their second moment F.

    Attributes:
        gram (`torch.Tensor` of shape `(N, N)`): `g_i . g_j`, float64.
        diagonal_square (`float`): `|diag F|^2`, the sum of squares of F's diagonal.
        mean (`dict[str, torch.Tensor]`): mu = E[g] by parameter name, float32 (summed in float64).
    """

    gram: torch.Tensor
    diagonal_square: float
    mean: dict[str, torch.Tensor] = field(repr=False)


def gradient_gram(
    model: torch.nn.Module,
    losses: Losses,
    draws: tuple[torch.Tensor, ...],
    plan: Plan,
    on_row: Callable[[int], None] = lambda rows: None,
) -> GradientGram:
    """
    Returns the Gram matrix of the per-sample gradients of some draws, summed in float64 over blocks of parameters.

    Gradients are taken in eval mode and in float32 with TF32 off, as all estimates of the Fisher.

    Args:
        model (`torch.nn.Module`): the unwrapped network.
        losses: `losses(model, batch) -> (batch,)`, calling nothing but `model(...)`.
        draws (tuple of `torch.Tensor`): all N rows.
        plan ([`Plan`]): from [`plan_passes`], for as many rows.
        on_row: called with the number of gradients that were taken, of `plan.passes * N` in all.

    Raises:
        FloatingPointError: when a gradient is not finite.
    """
    parameters = trainable_parameters(model)
    device = next(iter(parameters.values())).device
    num_samples = plan.num_samples
    assert len(draws[0]) == num_samples, "the plan is for another number of draws"
    gram = torch.zeros(num_samples, num_samples, dtype=torch.float64, device=device)
    diagonal_square = torch.zeros((), dtype=torch.float64, device=device)
    columns = torch.empty(num_samples, plan.columns, device=device)
    panel = torch.empty(num_samples, plan.panel, dtype=torch.float64, device=device)
    means = []
    with estimating(model):
        for block in _blocks(parameters, plan.columns):
            width = sum(stop - start for _, start, stop in block)
            for first in range(0, num_samples, plan.rows):
                rows = tuple(tensor[first : first + plan.rows] for tensor in draws)
                found = _gradients(model, losses, rows, parameters, [name for name, _, _ in block])
                place = 0
                for (_, start, stop), gradient in zip(block, found, strict=True):
                    columns[first : first + len(rows[0]), place : place + stop - start] = gradient[:, start:stop]
                    place += stop - start
                on_row(len(rows[0]))
            for start in range(0, width, plan.panel):
                part = panel[:, : min(plan.panel, width - start)]
                part.copy_(columns[:, start : start + part.shape[1]])
                _add_products(gram, part)
                means.append(part.mean(dim=0).float())
                diagonal_square += part.square_().mean(dim=0).square().sum()
    gram = finite(gram.tril() + gram.tril(-1).T, "the Gram matrix of the gradients")
    parts = torch.cat(means).split([parameter.numel() for parameter in parameters.values()])
    mean = {name: part.view_as(p) for (name, p), part in zip(parameters.items(), parts, strict=True)}
    return GradientGram(gram, diagonal_square.item(), mean)


def eigenvalues(gram: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns F's eigenvalues, largest first, `(N,)`, and the Gram matrix's eigenvectors as columns, `(N, N)`."""
    values, vectors = torch.linalg.eigh(gram / len(gram))
    return values.flip(0).clamp(min=0), vectors.flip(1)


def residual_norm(gram: torch.Tensor, second_moment: float, mean_square: float) -> float:
    """
    Returns the operator norm of `R = F - m v v^T`, with `v = mu / |mu|`: what the rank-1 form leaves out.

    `R = X^T A X` with `A = I / N - m 11^T / (N^2 |mu|^2)`, so that its eigenvalues other than 0 are those of `A X X^T`, and
    of the symmetric `S A S` with `S = (X X^T)^(1/2)`.
    """
    n = len(gram)
    values, vectors = torch.linalg.eigh(gram)
    root = (vectors * values.clamp(min=0).sqrt()) @ vectors.T
    ones = root.sum(dim=1)
    inner = values.new_tensor(second_moment / (n**2 * mean_square))
    symmetric = gram / n - inner * torch.outer(ones, ones)
    return torch.linalg.eigvalsh(symmetric).abs().max().item()


def geometry_of(found: GradientGram) -> dict:
    """
    Returns everything that the Gram matrix says of F, mu and v, as JSON.

    Source: arXiv 2509.23593, Sec. 3.2 (Figures 2 and 3) and Theorem 1; the conditions are those that a critique of it asks for.
    With `c* = m / |mu|^2` the rank-1 form is `m v v^T`, and `|F - m v v^T|_F^2 = |F|_F^2 - m^2`.

    Returns:
        `dict`: `eigenvalues` (the first 5), `ratio` (lambda_2 / lambda_1), `cosines` (|cos| of every g_i to mu),
        `frobenius` (`|F|_F`), `trace`, `mean_square` (`|mu|^2`) and its
        unbiased estimate `unbiased_mean_square`, `second_moment` (m), the relative Frobenius errors
        `rank1_error`, `diagonal_error` and `best_rank1_error` (the top eigenvector's), `top_cosine` (|cos| of v to that),
        `residual` (the operator norm of R), `residual_share` (R over m), `signal_ratio` (`n |mu|^2 / trace`) and `half_cosine`
        (of the means of two halves of the draws).
    """
    gram, n = found.gram, len(found.gram)
    values, vectors = eigenvalues(gram)
    projections = gram.mean(dim=0)  # mu . g_i
    mean_square = projections.mean().item()
    if not mean_square > 0:
        raise FloatingPointError("the mean gradient is zero, there is no direction")
    second_moment = projections.square().mean().item() / mean_square
    frobenius_square = (gram.square().sum() / n**2).item()
    trace = gram.diagonal().mean().item()
    half = n // 2
    first, second, between = gram[:half, :half].sum(), gram[half:, half:].sum(), gram[:half, half:].sum()
    # A gradient of 0 has no direction, and counts as one that does not point along the mean.
    lengths = gram.diagonal().clamp(min=torch.finfo(torch.float64).tiny).sqrt()
    residual = residual_norm(gram, second_moment, mean_square)

    def error(explained: float) -> float:
        return max(0.0, 1 - explained / frobenius_square) ** 0.5

    return {
        "num_samples": n,
        "eigenvalues": values[:5].tolist(),
        "ratio": (values[1] / values[0]).item(),
        "cosines": (projections.abs() / (lengths * mean_square**0.5)).tolist(),
        "frobenius": frobenius_square**0.5,
        "trace": trace,
        "mean_square": mean_square,
        # The products of different draws alone: no draw's noise meets itself.
        "unbiased_mean_square": ((gram.sum() - gram.diagonal().sum()) / (n * (n - 1))).item(),
        "second_moment": second_moment,
        "rank1_error": error(second_moment**2),
        "best_rank1_error": error(values[0].item() ** 2),
        "diagonal_error": error(found.diagonal_square),
        "top_cosine": abs(vectors[:, 0].sum().item()) * (values[0].item() * n) ** 0.5 / (n * mean_square**0.5),
        "residual": residual,
        "residual_share": residual / second_moment,
        "signal_ratio": n * mean_square / trace,
        "half_cosine": (between / (first * second).sqrt()).item(),
    }
