"""Quadratic penalties and their gradients in closed form: no graph, and no copy of the weights."""

from collections.abc import Iterable, Iterator

import torch
from torch.autograd.function import once_differentiable


# Numbers that the parameters of one block have, at the most, unless a single one has more: so that small parameters share a
# product, and no buffer is as large as the network.
BLOCK_SIZE = 2**20


class Rank1Terms:
    """
    `1/2 sum_k strength_k (v_k . theta - b_k)^2` as few matrices `(terms, numbers)`, each of several parameters.

    Args:
        directions (`dict[str, torch.Tensor]`): the v_k, `(terms, *parameter.shape)` by parameter name, float32. Its tensors
            become views of the matrices, so that nothing is held twice.
        strengths, offsets (`list[float]`): by term.
    """

    def __init__(self, directions: dict[str, torch.Tensor], strengths: list[float], offsets: list[float]):
        self.values = strengths, offsets
        device = next(iter(directions.values())).device
        self.strengths, self.offsets = torch.tensor([strengths, offsets], dtype=torch.float64, device=device)
        self.matrices: list[torch.Tensor] = []
        self.shapes: list[list[torch.Size]] = []
        self.views: dict[str, torch.Tensor] = {}
        for names in self._blocks(directions):
            rows = [directions[name].reshape(len(strengths), -1) for name in names]
            matrix, shapes = torch.cat(rows, dim=1), [directions[name].shape for name in names]
            parts = matrix.split([part.shape[1] for part in rows], dim=1)
            for name, part, shape in zip(names, parts, shapes, strict=True):
                directions[name] = self.views[name] = part.view(shape)
            self.matrices.append(matrix)
            self.shapes.append([shape[1:] for shape in shapes])
        self._gram: torch.Tensor | None = None

    @staticmethod
    def _blocks(directions: dict[str, torch.Tensor]) -> Iterator[list[str]]:
        """Names of neighbours that fit into one block."""
        names, size = [], 0
        for name, rows in directions.items():
            if names and size + rows[0].numel() > BLOCK_SIZE:
                yield names
                names, size = [], 0
            names.append(name)
            size += rows[0].numel()
        yield names

    def are_of(self, directions: dict[str, torch.Tensor], strengths: list[float], offsets: list[float]) -> bool:
        """Returns whether nothing has changed since these were joined."""
        same = all(view is directions.get(name) for name, view in self.views.items())
        return same and len(directions) == len(self.views) and (strengths, offsets) == self.values

    def residuals(self, parameters: Iterable[torch.Tensor]) -> torch.Tensor:
        """Returns v_k . theta - b_k, `(terms,)`: float32 products within a block, summed over blocks in float64."""
        rest, total = iter(parameters), -self.offsets
        with torch.autocast(total.device.type, enabled=False):
            for matrix, shapes in zip(self.matrices, self.shapes, strict=True):
                block = torch.cat([next(rest).detach().flatten() for _ in shapes])
                total = total + (matrix @ block.to(matrix.dtype)).double()
        return total

    def combined(self, coefficients: torch.Tensor) -> list[torch.Tensor]:
        """Returns sum_k coefficient_k v_k in the parameters' order, float32; `coefficients` are `(terms,)`."""
        found = []
        with torch.autocast(coefficients.device.type, enabled=False):
            for matrix, shapes in zip(self.matrices, self.shapes, strict=True):
                parts = (coefficients.to(matrix.dtype) @ matrix).split([shape.numel() for shape in shapes])
                found += [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
        return found

    def gram(self) -> torch.Tensor:
        """Returns the products of the v_k with one another, `(terms, terms)` in float64; computed once."""
        if self._gram is None:
            # A block at a time: a copy of all in float64 would be twice what is held.
            self._gram = sum(block @ block.T for block in (matrix.double() for matrix in self.matrices))
        return self._gram


class Rank1Quadratic(torch.autograd.Function):
    """The value of [`Rank1Terms`], which `apply` takes with the parameters."""

    @staticmethod
    def forward(ctx, terms: Rank1Terms, *parameters):
        distances = terms.residuals(parameters)
        ctx.terms, ctx.coefficients = terms, terms.strengths * distances
        return (0.5 * ctx.coefficients * distances).sum().float()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        return None, *ctx.terms.combined(ctx.coefficients * grad_output)


class DiagonalQuadratic(torch.autograd.Function):
    """
    `1/2 sum_j weight_j (theta_j - anchor_j)^2`; `apply` takes the weights and the anchors, a list of tensors each in the
    parameters' order, and the parameters.
    """

    @staticmethod
    def forward(ctx, weights: list[torch.Tensor], anchors: list[torch.Tensor], *parameters):
        ctx.weights, ctx.anchors = weights, anchors
        ctx.save_for_backward(*parameters)
        total = torch.zeros((), dtype=torch.float64, device=parameters[0].device)
        for weight, anchor, parameter in zip(weights, anchors, parameters, strict=True):
            distance = parameter - anchor
            total += (weight * distance).mul_(distance).sum()
        return (0.5 * total).float()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output):
        rows = zip(ctx.weights, ctx.anchors, ctx.saved_tensors, strict=True)
        return None, None, *[(p - anchor).mul_(weight).mul_(grad_output) for weight, anchor, p in rows]
