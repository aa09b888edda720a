"""Ratios of times: everything that is compared is measured in one run, in turns, because machines are shared and noisy."""

import contextlib
import statistics
import time
from collections.abc import Callable

import torch


def synchronize(device: torch.device) -> None:
    """Waits for a GPU; the CPU needs no waiting."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextlib.contextmanager
def threads(number: int):
    """So many CPU threads, and afterwards as many as before."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def seconds(function: Callable[[], object], device: torch.device) -> float:
    """Returns how long one call takes."""
    synchronize(device)
    start = time.perf_counter()
    function()
    synchronize(device)
    return time.perf_counter() - start


def in_turns(
    functions: dict[str, Callable[[], object]], device: torch.device, repetitions: int, warmup: int = 1
) -> dict[str, list[float]]:
    """Returns seconds by name, a list entry a repetition: in each all functions are called once, in reversed order each time."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for repetition in range(-warmup, repetitions):
        for name in list(functions)[:: 1 if repetition % 2 else -1]:
            elapsed = seconds(functions[name], device)
            if repetition >= 0:
                found[name].append(elapsed)
    return found


def row(
    what: str,
    network: str,
    times: dict[str, list[float]],
    over: str,
    under: str,
    target: str | None = None,
    **details,
) -> dict:
    """
    Returns a line of the table: the median over repetitions of the ratio of two times in the same repetition.

    Args:
        what, network (`str`): what is measured, and on what.
        times (`dict[str, list[float]]`): of [`in_turns`].
        over, under (`str`): names in it; the ratio is `over / under`.
        target (`str`, *optional*): such as `<= 1.05`.
        details: goes into the file as it is.
    """
    ratios = [a / b for a, b in zip(times[over], times[under], strict=True)]
    medians = {name: statistics.median(values) for name, values in times.items()}
    return ratio_row(what, network, ratios, target, over=over, under=under, seconds=medians, **details)


def ratio_row(what: str, network: str, ratios: list[float], target: str | None = None, **details) -> dict:
    """Returns a line of the table from ratios that are measured already: median, least and largest."""
    median = statistics.median(ratios)
    reached = None
    if target is not None:
        sign, limit = target.split()
        reached = median <= float(limit) if sign == "<=" else median >= float(limit)
    spread = {"ratio": median, "least": min(ratios), "largest": max(ratios), "repetitions": len(ratios)}
    about = {"what": what, "network": network, "threads": torch.get_num_threads()}
    return {**about, **spread, "target": target, "reached": reached, **details}
