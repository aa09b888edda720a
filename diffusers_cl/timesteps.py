"""The geometry of the gradients timestep by timestep, and how long it is going to take."""

import time
from collections.abc import Callable
from dataclasses import replace

import torch
from tqdm.auto import tqdm

from .bands import gram_of_files, without_noise
from .gram import Plan, geometry_of, gradient_gram
from .parts import Options, flat, kept, losses
from .passes import estimating
from .shards import Shards
from .subject import Subject
from .surrogate import SAMPLES_PER_DIMENSION, linear_residuals, scaled_prediction_error


def all_draws(batches) -> tuple[torch.Tensor, ...]:
    """Returns the draws of all batches as one."""
    return tuple(map(torch.cat, zip(*batches, strict=True)))


def expected_seconds(subject: Subject, plan: Plan) -> float:
    """Returns about how long the gradients and products of one timestep take, from a few of them."""
    draws = subject.draws(("estimate",), 4 * plan.rows, (500, 501), 4 * plan.rows)
    rows = next(iter(draws))
    short = replace(plan, num_samples=len(rows[0]), panel=min(plan.panel, 4096))
    # The first one also pays for what is set up once.
    gradient_gram(
        subject.unet, losses, tuple(tensor[: plan.rows] for tensor in rows), replace(short, num_samples=plan.rows)
    )
    start = time.perf_counter()
    gradient_gram(subject.unet, losses, rows, short)
    seconds = (time.perf_counter() - start) / len(rows[0]) * plan.num_samples
    columns = torch.ones(plan.num_samples, short.panel, dtype=torch.float64, device=subject.device)
    start = time.perf_counter()
    (columns @ columns.T).sum().item()
    return seconds + (time.perf_counter() - start) * plan.num_parameters / short.panel / 2


def measure_timesteps(subject: Subject, options: Options, plan: Plan, shards: Shards, say: Callable) -> dict:
    """
    Returns what the Gram matrix says at every timestep, and the cosines between timesteps' mean gradients.

    Draws of different timesteps are independent, so that these cosines are not of shared noise; `corrected` has unbiased
    squared lengths in its denominator.
    """
    left = [t for t in options.timesteps if shards.load(f"t{t:04d}") is None]
    seconds = expected_seconds(subject, plan) if left else 0.0
    say(
        f"{len(left)} of {len(options.timesteps)} timestep(s) to do, {plan.num_samples} gradients of {plan.num_parameters:,}"
        f" numbers each: {plan.passes} pass(es) a timestep within {options.memory_gib:g} GiB"
        f" ({plan.bytes_at_a_time / 2**30:.2f} GiB at a time), about {seconds * len(left):.0f} s in all"
    )
    # Resumed timesteps are not part of the bar: its time left is of what is to do.
    total = len(left) * plan.passes * plan.num_samples
    bar = tqdm(total=total, desc="Gradients", unit="gradient", disable=options.disable_progress_bar or not total)

    def at(t: int) -> tuple[dict, dict]:
        start = time.perf_counter()
        draws = subject.draws(("timestep", t), options.num_samples, (t, t + 1), options.batch_size)
        rows = all_draws(draws)
        found = gradient_gram(subject.unet, losses, rows, plan, bar.update)
        with torch.no_grad(), estimating(subject.unet):
            loss = torch.cat([losses(subject.unet, batch) for batch in draws]).double().mean().item()
            error = scaled_prediction_error(subject.unet, subject.source.scheduler, draws)
        content = {"t": t, "scaled_prediction_error": error, "loss": loss, **geometry_of(found)}
        return {**content, "seconds": time.perf_counter() - start}, {"mean": flat(found.mean)}

    with bar:
        rows = [kept(shards, f"t{t:04d}", lambda t=t: at(t)) for t in options.timesteps]
    products = gram_of_files([shards.folder / f"t{t:04d}.safetensors" for t in options.timesteps], ["mean"])
    lengths = products.diagonal().sqrt()
    signal = torch.tensor([row["unbiased_mean_square"] for row in rows], dtype=torch.float64)
    return {
        "rows": rows,
        "mean_cosines": (products / torch.outer(lengths, lengths)).tolist(),
        "corrected_mean_cosines": without_noise(products, signal, signal / products.diagonal()),
    }


def measure_surrogate(subject: Subject, options: Options, shards: Shards) -> list[dict]:
    """Returns [`linear_residuals`] at every timestep."""
    config = subject.unet.config
    samples = SAMPLES_PER_DIMENSION * config.in_channels * config.sample_size**2

    def at(t: int) -> tuple[dict, dict]:
        train = subject.draws(("surrogate", t), samples, (t, t + 1), options.batch_size)
        held_out = subject.draws(("held out", t), samples // 4, (t, t + 1), options.batch_size, split="test")
        with estimating(subject.unet):
            return {"t": t, **linear_residuals(subject.unet, subject.source.scheduler, train, held_out)}, {}

    bar = tqdm(options.timesteps, desc="Linear surrogate", unit="timestep", disable=options.disable_progress_bar)
    return [kept(shards, f"t{t:04d}", lambda t=t: at(t)) for t in bar]
