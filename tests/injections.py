"""Ways to make one number of a run not finite, at a chosen moment; for a process of its own, nothing is put back."""

import math

import torch
from diffusers.training_utils import EMAModel

import train_continual
from diffusers_cl.ewc import Rank1EWC
from diffusers_cl.record import RunRecord


def _at(moment: int, call, spoil):
    """The function `call`, whose result is spoilt the `moment`-th time."""
    count = 0

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        result = call(*args, **kwargs)
        return spoil(result, *args) if count == moment else result

    return counted


def _in_phase(name: str, task: int):
    """Returns a function that says whether the run is in a phase of a task."""
    inside, phase = [], RunRecord.phase

    def entered(self, entered_name):
        inside[:] = [(entered_name, self.task)]
        return phase(self, entered_name)

    RunRecord.phase = entered
    return lambda: inside == [(name, task)]


def _not_a_number(tensor: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        tensor.view(-1)[0] = math.nan
    return tensor


def inject(what: str, moment: int = 1, phase: str | None = None, task: int = 0, value: float = math.nan) -> None:
    """
    Makes a number not finite.

    Args:
        what (`str`): `loss`, `gradient`, `penalty`, `ema`, `weights`, `teacher`, `fisher` or `images`.
        moment (`int`): which time it is computed, from 1.
        phase (`str`), task (`int`): for `fisher` and `images`, in which phase of which task.
        value (`float`): in place of the number.
    """
    losses, norm = train_continual.denoising_losses, train_continual.get_total_norm
    if what == "loss":
        train_continual.denoising_losses = _at(moment, losses, lambda found, *_: found * value)
    elif what == "fisher":
        inside = _in_phase("fisher", task)
        train_continual.denoising_losses = lambda *args: losses(*args) * (value if inside() else 1.0)
    elif what == "gradient":

        def measured(gradients):
            spoil_now(gradients)
            return norm(gradients)

        spoil_now = _at(moment, lambda gradients: None, lambda found, gradients: _not_a_number(gradients[0]))
        train_continual.get_total_norm = measured
    elif what == "penalty":
        Rank1EWC.__call__ = _at(moment, Rank1EWC.__call__, lambda found, *_: found * value)
    elif what == "ema":
        EMAModel.step = _at(moment, EMAModel.step, lambda found, model, *_: _not_a_number(model.shadow_params[0]))
    elif what == "weights":
        step = torch.optim.AdamW.step
        torch.optim.AdamW.step = _at(
            moment, step, lambda found, optimizer, *_: _not_a_number(optimizer.param_groups[0]["params"][0])
        )
    elif what == "teacher":
        from diffusers_cl.replay import GenerativeDistillation

        GenerativeDistillation.target = _at(moment, GenerativeDistillation.target, lambda found, *_: found * value)
    elif what == "images":
        inside, pipeline = _in_phase(phase, task), train_continual.ClassConditionalPipeline
        call = pipeline.__call__

        def sampled(self, *args, **kwargs):
            output = call(self, *args, **kwargs)
            if inside():
                _not_a_number(output.images)
            return output

        pipeline.__call__ = sampled
    else:
        raise ValueError(f"unknown injection {what!r}")
