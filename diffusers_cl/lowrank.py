"""EWC with several directions a task: the leading eigenvectors of the empirical Fisher, without forming it."""

from collections.abc import Iterable

import torch

from .along import CURVATURE_STEPS, curvature_along, projections
from .ewc import Rank1EWC
from .fisher import mean_gradient
from .passes import Losses, Reduce, alone, batches_to_do, estimating, finite, trainable_parameters


# Block power iterations: with the mean gradient to start from the leading values settle to a few percent.
NUM_ITERATIONS = 4


def _split(vectors: torch.Tensor, parameters: dict[str, torch.nn.Parameter]) -> dict[str, torch.Tensor]:
    """Rows of D numbers as tensors `(rows, *parameter.shape)` by parameter name, float32."""
    parts = vectors.split([parameter.numel() for parameter in parameters.values()], dim=1)
    return {
        name: part.reshape(len(vectors), *p.shape).float()
        for (name, p), part in zip(parameters.items(), parts, strict=True)
    }


def top_fisher_directions(
    model: torch.nn.Module,
    losses: Losses,
    batches: Iterable,
    rank: int,
    num_iterations: int = NUM_ITERATIONS,
    reduce: Reduce = alone,
    progress=None,
) -> tuple[dict[str, torch.Tensor], list[float], int]:
    """
    Returns orthonormal directions that span the leading eigenvectors of F = E[g g^T], and `v^T F v` of each.

    Block power iteration with a Rayleigh-Ritz step at its end. F v is never formed: `g . v` of every row is a forward-mode
    product, and the sum of `(g . v) g` over rows one backward pass. The start is the mean gradient and random vectors.

    Args:
        model, losses, batches, reduce, progress: as for [`rank1_fisher`].
        rank (`int`): how many directions.
        num_iterations (`int`): times `2 * rank` passes over the draws.

    Returns:
        `dict[str, torch.Tensor]` by parameter name, `(rank, *parameter.shape)`, float32; their second moments, largest
        first; and the number of draws, over all processes.

    Raises:
        ValueError: when there are no draws.
        FloatingPointError: when an estimate is not finite.
    """
    parameters = trainable_parameters(model)
    device = next(iter(parameters.values())).device
    mean = mean_gradient(model, losses, batches, reduce, progress)
    start = torch.cat([tensor.flatten() for tensor in mean.mu.values()])
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(rank - 1, len(start), generator=generator, dtype=torch.float64).to(device)
    basis = torch.linalg.qr(torch.cat([start[None], noise]).T)[0].T
    for iteration in range(num_iterations + 1):
        directions = _split(basis, parameters)
        moments = torch.zeros(rank, rank, dtype=torch.float64, device=device)
        count = torch.zeros((), dtype=torch.float64, device=device)
        sums = {"moments": moments, "count": count}
        last = iteration == num_iterations
        if not last:
            sums["product"] = torch.zeros_like(basis)
        for batch in batches_to_do(progress, batches, f"power-{iteration}", sums):
            with estimating(model):
                projected = torch.stack(
                    [projections(model, losses, batch, {n: v[k] for n, v in directions.items()}) for k in range(rank)]
                ).detach()
                moments += projected.double() @ projected.double().T
                count += projected.shape[1]
                if last:
                    continue
                values = losses(model, batch)
                for k in range(rank):
                    keep = k < rank - 1
                    gradients = torch.autograd.grad(
                        values @ projected[k], list(parameters.values()), retain_graph=keep
                    )
                    sums["product"][k] += torch.cat([gradient.flatten() for gradient in gradients]).double()
        if not last:
            basis = torch.linalg.qr(finite(reduce(sums["product"]), "a Fisher direction").T)[0].T
    num_samples = int(reduce(count).item())
    moments = finite(reduce(moments) / num_samples, "the Fisher's second moments")
    eigenvalues, rotation = torch.linalg.eigh(moments)
    order = eigenvalues.argsort(descending=True)
    return _split(rotation[:, order].T @ basis, parameters), eigenvalues[order].tolist(), num_samples


class LowRankEWC(Rank1EWC):
    """
    [`Rank1EWC`] with the `rank` leading directions of every task's empirical Fisher in place of its mean gradient:
    `1/2 sum_k sum_r strength_kr (v_kr . theta - b_kr)^2`. Not the paper's method, which has one direction a task.

    Args:
        ewc_lambda (`float` or `str`): times the eigenvalue; `"auto"` takes the measured curvature along each direction.
        rank (`int`): directions a task; a task costs so many parameter vectors.
    """

    kind = "lowrank_ewc"

    def __init__(self, ewc_lambda: float | str = 15_000.0, rank: int = 8):
        super().__init__(ewc_lambda)
        self.rank = rank

    def summary(self) -> list[dict[str, float | list[float]]]:
        """Returns what was measured for every consolidated task, by name; lists have a value a direction."""
        tasks = []
        for k in range(self.num_tasks):
            rows = slice(k * self.rank, (k + 1) * self.rank)
            per_direction = {name: values[rows] for name, values in self.statistics.items() if name != "num_samples"}
            tasks.append({**per_direction, "num_samples": self.statistics["num_samples"][k]})
        return tasks

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Replaces the state by one from [`state_dict`], and the rank by the state's."""
        super().load_state_dict(state_dict)
        if self.num_tasks:
            self.rank = len(self.statistics["offset"]) // self.num_tasks

    def consolidate(
        self, model: torch.nn.Module, losses: Losses, batches, reduce: Reduce = alone, diagnostics=True, progress=None
    ) -> dict[str, torch.Tensor]:
        """Adds the finished task's term; arguments as [`Rank1EWC.consolidate`]. Returns the directions."""
        parameters = self._parameters(model)
        directions, moments, num_samples = top_fisher_directions(
            model, losses, batches, self.rank, reduce=reduce, progress=progress
        )
        offsets = torch.zeros(self.rank, dtype=torch.float64, device=next(iter(parameters.values())).device)
        for name, parameter in parameters.items():
            offsets += directions[name].reshape(self.rank, -1).double() @ parameter.detach().flatten().double()
        finite(offsets, "the penalty's offset")
        curvatures = [None] * self.rank
        if diagnostics or self.automatic:
            for k in range(self.rank):
                along, step = {name: tensor[k] for name, tensor in directions.items()}, CURVATURE_STEPS[:1]
                (curvatures[k],) = curvature_along(model, losses, batches, along, step, reduce, progress, f"loss-{k}")
        self._add_directions(directions)
        self.statistics.setdefault("num_samples", []).append(float(num_samples))
        for k in range(self.rank):
            self._record(offset=offsets[k].item(), second_moment=moments[k], curvature=curvatures[k])
        return directions
