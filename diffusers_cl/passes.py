"""
Passes over a task's draws, which all estimates are made of: at which weights and in which mode the model is asked, which
draws are taken, and how a pass that was interrupted goes on.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator

import torch
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel


Losses = Callable[..., torch.Tensor]
Reduce = Callable[[torch.Tensor], torch.Tensor]


def alone(tensor: torch.Tensor) -> torch.Tensor:
    """Returns the sum over processes where there is one."""
    return tensor


def trainable_parameters(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """Returns the parameters that require a gradient, by name; a model without any is a `ValueError`."""
    parameters = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    if not parameters:
        raise ValueError("the model has no parameter that requires a gradient")
    return parameters


def with_parameters(model: torch.nn.Module, parameters: dict[str, torch.Tensor]) -> Callable:
    """Returns the model with other values for its parameters."""
    return lambda *args, **kwargs: functional_call(model, parameters, args, kwargs)


@contextlib.contextmanager
def estimating(model: torch.nn.Module):
    """Eval mode, float32 without TF32 or autocast, and attention that forward-mode derivatives can pass."""
    training = [module for module in model.modules() if module.training]
    matmul, conv = torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = "ieee"
    device_type = next(model.parameters()).device.type
    model.eval()
    try:
        with torch.autocast(device_type, enabled=False), sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        for module in training:
            module.training = True
        torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision = matmul, conv


def finite(value: torch.Tensor, name: str) -> torch.Tensor:
    """Returns a tensor, if all of it is finite: anything else is a `FloatingPointError` that says `name`."""
    if not torch.isfinite(value).all():
        raise FloatingPointError(f"{name} is not finite")
    return value


def batches_to_do(progress, batches: Iterable, name: str, sums: dict[str, torch.Tensor]) -> Iterable:
    """
    Returns the batches that a pass has still to take.

    Args:
        progress: `None`, or what keeps the sums of a pass: `over(batches, name, sums)` yields the batches that are not in the
            sums yet, and saves the sums as it goes on ([`Shards.over`]).
        batches: re-iterable.
        name (`str`): of the pass, another one for each of an estimate.
        sums (`dict[str, torch.Tensor]`): all that the pass adds its batches to, in place.
    """
    return batches if progress is None else progress.over(batches, name, sums)


def checksum_of(batch: tuple[torch.Tensor, ...], start: int) -> torch.Tensor:
    """Of rows by their position, so that the same labels on other images are other draws."""
    positions = torch.arange(start + 1, start + 1 + len(batch[0]), dtype=torch.float64, device=batch[0].device)
    return sum((tensor.double().reshape(len(tensor), -1).sum(dim=1) * positions).sum() for tensor in batch)


def first_draws(batches: Iterable, num_samples: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """
    Yields the first draws: over all processes where the batches know which these are (`batches.first`, as
    [`FisherBatches`] has), otherwise of this process.
    """
    if hasattr(batches, "first"):
        yield from batches.first(num_samples)
        return
    for batch in batches:
        yield tuple(tensor[:num_samples] for tensor in batch)
        num_samples -= len(batch[0])
        if num_samples <= 0:
            return
