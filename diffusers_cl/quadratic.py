"""The value of a rank-1 penalty, with its gradient in closed form: no graph, no copy of the weights."""

import torch


def residuals(directions: list[torch.Tensor], parameters, offsets: torch.Tensor) -> torch.Tensor:
    """Returns v_k . theta - b_k for all k: float32 products within a parameter, summed over parameters in float64."""
    pairs = [(v.reshape(len(v), -1), p.detach().flatten()) for v, p in zip(directions, parameters, strict=True)]
    with torch.autocast(offsets.device.type, enabled=False):
        return torch.stack([v @ p.to(v.dtype) for v, p in pairs]).double().sum(dim=0) - offsets


class Rank1Quadratic(torch.autograd.Function):
    """
    `1/2 sum_k strength_k (v_k . theta - b_k)^2`.

    `apply` takes strengths and offsets, `(terms,)` in float64, the directions as a list of `(terms, *parameter.shape)`, and
    the parameters.
    """

    @staticmethod
    def forward(ctx, strengths, offsets, directions, *parameters):
        distances = residuals(directions, parameters, offsets)
        ctx.directions, ctx.coefficients = directions, strengths * distances
        return (0.5 * ctx.coefficients * distances).sum().float()

    @staticmethod
    def backward(ctx, grad_output):
        coefficients = (ctx.coefficients * grad_output).float()
        with torch.autocast(coefficients.device.type, enabled=False):
            return None, None, None, *[torch.tensordot(coefficients, v, dims=1) for v in ctx.directions]
