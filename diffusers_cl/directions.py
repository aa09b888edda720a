"""The directions of tasks and bands at one checkpoint, and what lies along them: the loss, and the Gauss-Newton matrix."""

from collections.abc import Callable

import torch
from tqdm.auto import tqdm

from .along import projections
from .bands import ALL, BANDS, HALVES, band_statistics, compare_bands, gram_of_files
from .controls import random_direction
from .fisher import diagonal_fisher, trainable_parameters
from .gauss_newton import NUM_ITERATIONS, top_gauss_newton
from .movement import STEPS, coordinate_direction, loss_curve
from .parts import Options, flat, kept, losses
from .passes import estimating
from .randomness import generator
from .shards import Shards
from .subject import Subject


# Draws of a half, of one task in one band; of a loss along a direction; of the diagonal and the Gauss-Newton matrix.
BAND_DRAWS, LOSS_DRAWS, CURVATURE_DRAWS = 1024, 256, 256
# Random and coordinate directions, and other tasks, to compare with.
NUM_RANDOM, MAX_OTHER_TASKS = 5, 4


def measure_bands(subject: Subject, options: Options, shards: Shards) -> dict:
    """Returns [`compare_bands`] of all tasks, at this checkpoint's weights; the mean gradients stay in the shards."""
    names = [(task, band) for task in range(len(subject.tasks)) for band in BANDS]

    def of(task: int, band: str) -> tuple[dict, dict]:
        halves = [
            list(subject.draws(("band", task, band, half), BAND_DRAWS, BANDS[band], options.batch_size, task))
            for half in range(HALVES)
        ]
        tensors = band_statistics(subject.unet, losses, halves)
        return {"trace": tensors.pop("trace").item()}, tensors

    bar = tqdm(names, desc="Bands", unit="band of a task", disable=options.disable_progress_bar)
    traces = [kept(shards, f"{task:02d}-{band}", lambda x=(task, band): of(*x))["trace"] for task, band in bar]
    files = [shards.folder / f"{task:02d}-{band}.safetensors" for task, band in names]
    gram = gram_of_files(files, [f"half.{half}" for half in range(HALVES)])
    return compare_bands(
        gram, torch.tensor(traces, dtype=torch.float64).view(-1, len(BANDS)), len(subject.tasks), BAND_DRAWS
    )


def direction_of(shards: Shards, task: int, band: str) -> torch.Tensor:
    """Returns v of a task in a band, or in all, from what [`measure_bands`] has kept: `(D,)` float32, of unit length."""
    total = 0.0
    for name, (start, stop) in BANDS.items():
        if band in (name, ALL):
            found = shards.load(f"{task:02d}-{name}")
            total = total + (stop - start) * sum(found[f"half.{half}"].double() for half in range(HALVES))
    return (total / total.norm()).float()


def measure_movement(subject: Subject, options: Options, bands: Shards, shards: Shards) -> dict:
    """
    Returns the loss of the last task along its own v, along other tasks', along random directions and along the coordinates
    that are largest on the Fisher's diagonal: on test images, at equal step lengths.
    """
    task, scheduler = len(subject.tasks) - 1, subject.source.scheduler
    everything = (0, scheduler.config.num_train_timesteps)
    others = list(range(task))[-MAX_OTHER_TASKS:]
    batches = list(subject.draws(("movement",), LOSS_DRAWS, everything, options.batch_size, task, "test"))
    num_directions = (1 + len(BANDS)) * (1 + len(others)) + 2 * NUM_RANDOM
    bar = tqdm(
        total=num_directions * (2 * len(STEPS) + 1), desc="Moves", unit="loss", disable=options.disable_progress_bar
    )

    def along(name: str, direction: Callable[[], torch.Tensor]) -> list[float]:
        found = kept(
            shards,
            name,
            lambda: ({"curve": loss_curve(subject.unet, losses, batches, direction(), on_loss=bar.update)}, {}),
        )
        return found["curve"]

    curves, size = {}, sum(parameter.numel() for parameter in trainable_parameters(subject.unet).values())
    with bar:
        for band in (ALL, *BANDS):
            curves[band] = {
                "own": along(f"{band}-{task}", lambda b=band: direction_of(bands, task, b)),
                "others": [
                    along(f"{band}-{other}", lambda b=band, k=other: direction_of(bands, k, b)) for other in others
                ],
            }
        curves["random"] = [
            along(
                f"random-{i}", lambda i=i: flat(random_direction(subject.unet, generator(subject.seed, "random", i)))
            )
            for i in range(NUM_RANDOM)
        ]
        draws = subject.draws(("diagonal",), CURVATURE_DRAWS, everything, options.batch_size, task)
        diagonal = []

        def coordinates(i: int) -> torch.Tensor:
            diagonal[:] = diagonal or [flat(diagonal_fisher(subject.unet, losses, draws, chunk_size=8)[0])]
            return coordinate_direction(diagonal[0], generator(subject.seed, "coordinates", i))

        curves["top_coordinates"] = [along(f"top-{i}", lambda i=i: coordinates(i)) for i in range(NUM_RANDOM)]
    return {
        "task": task,
        "others": others,
        "steps": list(STEPS),
        "num_samples": LOSS_DRAWS,
        "num_parameters": size,
        "curves": curves,
    }


def measure_gauss_newton(subject: Subject, options: Options, bands: Shards, shards: Shards) -> dict:
    """Returns the last task's top Gauss-Newton eigenvectors, and how v of every band lies to them."""
    task = len(subject.tasks) - 1
    everything = (0, subject.source.scheduler.config.num_train_timesteps)

    def predict(model, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        # Whatever the network predicts: that is what the loss is a squared error of.
        return model(batch[0], batch[1], class_labels=batch[2]).sample

    def compute() -> tuple[dict, dict]:
        batches = list(subject.draws(("gauss newton",), CURVATURE_DRAWS, everything, options.batch_size, task))
        v = direction_of(bands, task, ALL).to(subject.device)
        with tqdm(
            total=NUM_ITERATIONS + 1, desc="Gauss-Newton", unit="product", disable=options.disable_progress_bar
        ) as bar:
            vectors, values, residual = top_gauss_newton(
                subject.unet, predict, batches, v, num_iterations=NUM_ITERATIONS, on_iteration=lambda: bar.update()
            )
        shares = {}
        for band in (ALL, *BANDS):
            inside = (vectors.cpu() @ direction_of(bands, task, band).double()).square()
            shares[band] = {"cosine": inside[0].sqrt().item(), "share_in_block": inside.sum().item()}
        parameters = trainable_parameters(subject.unet)
        parts = v.split([parameter.numel() for parameter in parameters.values()])
        by_name = {name: part.view_as(p) for (name, p), part in zip(parameters.items(), parts, strict=True)}
        with estimating(subject.unet):
            projected = torch.cat([projections(subject.unet, losses, batch, by_name) for batch in batches])
        second_moment = projected.double().square().mean().item()
        return {
            "task": task,
            "num_samples": CURVATURE_DRAWS,
            "eigenvalues": values,
            "residual": residual,
            "directions": shares,
            "second_moment": second_moment,
        }, {}

    return kept(shards, "top", compute)
