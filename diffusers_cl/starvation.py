"""Does the penalty starve the new task? Its share of the update, measured every few steps of a task."""

from collections.abc import Callable, Iterable

import torch

from .fisher import trainable_parameters


MEASURE_EVERY = 20
# The mean over so many measurements, above this share, gives one warning a task. Settings that starve nothing were seen at 0.00
# to 0.25, the paper's 15000 in the loss at 0.5 to 0.9 (results/experiments/weak_replay/sweep.md).
# Decoupled, a penalty that takes every step back whole has one half: it starves from a third on, half of each step.
NUM_MEASUREMENTS = 5
LIMITS = {"loss": 0.5, "decoupled": 1 / 3}


def _share(penalty: Iterable[torch.Tensor], data: Iterable[torch.Tensor]) -> float:
    """|penalty| / (|penalty| + |data|), 0 where nothing moves."""
    norms = [torch.stack([tensor.square().sum() for tensor in tensors]).sum().sqrt() for tensors in (penalty, data)]
    return (norms[0] / (norms[0] + norms[1]).clamp_min(torch.finfo(torch.float32).tiny)).item()


class PenaltyShare:
    """
    The penalty's share of what moves the weights, from 0 to 1; at 0.5 it moves them as much as the data do.

    In the loss it is the share of the gradient, `|g_penalty| / (|g_penalty| + |g_data|)`: Adam divides the steps of every
    parameter by its root mean squared gradient, so that a share near 1 shrinks those that the data ask for. Decoupled,
    it is the share of a step's displacement; there Adam sees the data alone.

    ```python
    share = PenaltyShare(penalty, "loss", warn=logger.warning)    # for every task
    share.before_update(unet, step)                               # the gradient is complete and unscaled
    optimizer.step()
    share.after_update(unet)                                      # and then penalty.step(unet, lr), if decoupled
    value = share.finish(unet)                                    # None where it was not measured
    ```

    Args:
        penalty: with `num_tasks`, called with the model; nothing is measured for `None` and in the first task.
        mode (`str`): `loss` or `decoupled`.
        warn: called with a sentence, once.
    """

    def __init__(self, penalty, mode: str, warn: Callable[[str], None]):
        self.penalty, self.mode, self.warn = penalty, mode, warn
        self.shares: list[float] = []
        self.warned = False
        self.share: float | None = None
        self.positions: list[list[torch.Tensor]] = []

    def before_update(self, model: torch.nn.Module, step: int, clipped: float = 1.0) -> None:
        """Starts a measurement in every `MEASURE_EVERY`th step; `clipped` is what the gradient was multiplied by."""
        self.share, self.positions = None, []
        if self.penalty is None or self.penalty.num_tasks == 0 or step % MEASURE_EVERY != 0:
            return
        parameters = list(trainable_parameters(model).values())
        if self.mode == "decoupled":
            self.positions = [[parameter.detach().clone() for parameter in parameters]]
            return
        gradients = torch.autograd.grad(clipped * self.penalty(model), parameters)
        self.share = _share(gradients, [p.grad - g for p, g in zip(parameters, gradients, strict=True)])

    def after_update(self, model: torch.nn.Module) -> None:
        """Notes where the optimizer has moved the weights."""
        if self.positions:
            self.positions.append([parameter.detach().clone() for parameter in trainable_parameters(model).values()])

    def finish(self, model: torch.nn.Module) -> float | None:
        """Returns the share in this step, `None` where it was not measured."""
        if self.positions:
            start, middle = self.positions
            end = [parameter.detach() for parameter in trainable_parameters(model).values()]
            moves = [[b - a for a, b in zip(*pair, strict=True)] for pair in ((middle, end), (start, middle))]
            self.share = _share(*moves)
        if self.share is None:
            return None
        self.shares = [*self.shares, self.share][-NUM_MEASUREMENTS:]
        mean = sum(self.shares) / len(self.shares)
        if len(self.shares) == NUM_MEASUREMENTS and mean > LIMITS[self.mode] and not self.warned:
            self.warned = True
            what = "gradient" if self.mode == "loss" else "update"
            way_out = ", or penalty_mode: decoupled" if self.mode == "loss" else ""
            self.warn(
                f"The penalty makes up {mean:.0%} of the {what} and may starve the new task; a smaller ewc_lambda{way_out}"
                " leaves it more"
            )
        return self.share
