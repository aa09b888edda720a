"""
Asks of runs of one task whether v, the normalised mean gradient, is a property of the task, and how stiff it is.

    python scripts/experiments/direction.py RUN [RUN ...] --output FILE.json [--plot FILE.png]

A RUN is an output folder of train_continual.py with `tasks: [[0, 1]]`, `checkpointing_steps: 5` and
`checkpoints_total_limit: 9`, so that its last 40 steps are there. With EMA it gives two rows, raw and EMA weights.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import numpy as np
import torch
import yaml
from diffusers import UNet2DModel
from matplotlib.figure import Figure
from safetensors.torch import load_file
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_cl import __version__, along, fisher
from diffusers_cl.checkpoint import PREFIX, list_checkpoints, read_state
from diffusers_cl.config import NUM_TRAIN_TIMESTEPS, OPERATIONAL_KEYS, TrainingConfig
from diffusers_cl.data import load_splits
from diffusers_cl.draws import FisherBatches
from diffusers_cl.errors import CheckpointError, DataError, RunError
from diffusers_cl.files import write_json
from diffusers_cl.folders import task_folder
from diffusers_cl.losses import denoising_losses
from diffusers_cl.models import create_scheduler, create_unet
from diffusers_cl.plots import format_number
from diffusers_cl.randomness import derive_seed, generator, permutation
from diffusers_cl.tasks import TaskImages, resolve_tasks


# Steps before the end at which v is taken again.
STEPS_BEFORE_END = (40, 20, 10, 5)
# Draws of v, in units of the task's training images; the ceiling is measured at fewer, too. Each divides the largest.
ROUNDS = (1, 4, 16)
# Draws of the Hessians, and others, which none of the directions has seen, for everything that is measured along them.
HESSIAN_DRAWS, HELD_OUT_DRAWS, BATCH_SIZE = 256, 256, 128
# Lanczos stops when the residual of every wanted pair is below this share of its value (which is then right to about
# the share's square), or after so many Hessian-vector products.
EIGENVECTORS, MAX_RESIDUAL, MAX_PRODUCTS = 5, 0.1, 40
# Step lengths of the central differences: along random directions the loss is so flat that short ones drown in rounding.
STEP, RANDOM_STEP, RANDOM_DIRECTIONS = 0.01, 0.1, 5


def losses(model, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return denoising_losses(model, *batch)


def flat(tensors: dict[str, torch.Tensor] | torch.nn.Module) -> torch.Tensor:
    """Returns one float64 vector of tensors by name, or of a model's parameters."""
    tensors = fisher.trainable_parameters(tensors) if isinstance(tensors, torch.nn.Module) else tensors
    return torch.cat([tensor.detach().double().flatten() for tensor in tensors.values()])


def by_name(vector: torch.Tensor, model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Returns the inverse of [`flat`], float32, in the shapes of the model's parameters."""
    parameters = fisher.trainable_parameters(model)
    parts = vector.float().split([parameter.numel() for parameter in parameters.values()])
    return {name: part.view_as(p) for (name, p), part in zip(parameters.items(), parts, strict=True)}


def cosine(one: torch.Tensor, other: torch.Tensor) -> float:
    """Returns |cos| of two vectors."""
    return (one @ other / (one.norm() * other.norm())).abs().item()


def round_gradients(model: torch.nn.Module, rounds: FisherBatches) -> torch.Tensor:
    """Returns the mean gradient of every batch, float64 of shape `(batches, parameters)`."""
    return torch.stack([flat(fisher.mean_gradient(model, losses, [batch])[0]) for batch in rounds])


def agreement(one: torch.Tensor, other: torch.Tensor, size: int) -> float:
    """Returns |cos| of the means over `size` rounds of two independent sets of draws, averaged over as many as there are."""
    pairs = zip(one.split(size), other.split(size), strict=True)
    return float(np.mean([cosine(a.mean(dim=0), b.mean(dim=0)) for a, b in pairs]))


def hessian_product(model: torch.nn.Module, batches: list, vector: torch.Tensor) -> torch.Tensor:
    """Returns the Hessian of the mean loss times a float64 vector of shape `(parameters,)`, by two backward passes."""
    names, inputs = zip(*fisher.trainable_parameters(model).items(), strict=True)
    tangent, total = by_name(vector, model), torch.zeros_like(vector)
    with sdpa_kernel(SDPBackend.MATH):
        for batch in batches:
            gradients = torch.autograd.grad(losses(model, batch).sum(), inputs, create_graph=True)
            along = sum((gradient * tangent[name]).sum() for gradient, name in zip(gradients, names, strict=True))
            total += flat(dict(zip(names, torch.autograd.grad(along, inputs), strict=True)))
    return total / sum(len(batch[0]) for batch in batches)


def top_eigenvectors(product: Callable, size: int, count: int) -> tuple[torch.Tensor, dict]:
    """
    Returns eigenvectors, `(count, size)`, of the largest (not: largest in magnitude) eigenvalues of a symmetric matrix,
    and their Rayleigh quotients, the norms of `H x - value x`, the lowest eigenvalue and the products taken.

    By Lanczos: several pairs at the price of power iteration. `product` is the matrix times a float64 vector `(size,)`.
    """
    start = torch.randn(1, size, generator=generator(0, "lanczos"), dtype=torch.float64)
    basis, diagonal, beside = start / start.norm(), [], []
    while True:
        image = product(basis[-1])
        diagonal.append(image @ basis[-1])
        for _ in range(2):
            image = image - basis.T @ (basis @ image)
        beside.append(image.norm())
        off = torch.diag(torch.tensor(beside, dtype=torch.float64), 1)[:-1, :-1]
        values, vectors = torch.linalg.eigh(torch.diag(torch.tensor(diagonal, dtype=torch.float64)) + off + off.T)
        values, vectors = values.flip(0), vectors.flip(1)
        residuals = (beside[-1] * vectors[-1].abs())[:count]
        settled = len(values) >= count and bool((residuals <= MAX_RESIDUAL * values[:count].abs()).all())
        if settled or len(values) == MAX_PRODUCTS:
            break
        basis = torch.cat([basis, (image / beside[-1]).unsqueeze(0)])
    found = {"values": values[:count].tolist(), "residuals": residuals.tolist(), "settled": settled}
    return vectors[:, :count].T @ basis, {**found, "lowest eigenvalue": values[-1].item(), "products": len(values)}


class Task:
    """A run of one task (another number is a `DataError`): its checkpoints, and its images and those of other classes."""

    def __init__(self, run: Path):
        self.run, self.config = run, TrainingConfig(**yaml.safe_load((run / "config.yaml").read_text()))
        self.train, test = load_splits(self.config)
        tasks = resolve_tasks(self.config, self.train, test)
        if len(tasks) != 1:
            raise DataError(f"{run}: tasks has {len(tasks)} entries; allowed: one")
        unseen = [name for name in self.train.names if name not in tasks[0]]
        self.class_ids = {name: class_id for class_id, name in enumerate(tasks[0] + unseen)}
        self.num_classes = len(tasks[0])
        self.rows = {"old": self.train.rows_of(tasks[0]), "unseen": self.train.rows_of(unseen)}
        steps = [int(path.name.removeprefix(PREFIX)) for path in list_checkpoints(run)]
        if not steps or not {steps[0] - back for back in STEPS_BEFORE_END} <= set(steps):
            raise CheckpointError(f"{run} has checkpoints {steps}; needed: the last and {STEPS_BEFORE_END} before")
        self.last_step = steps[0]
        raw = "raw" if self.config.lr_scheduler == "constant" else "decayed"
        self.variants = {raw: "model.safetensors", **({"ema": "ema.safetensors"} if self.config.use_ema else {})}

    def network(self, variant: str, step: int) -> UNet2DModel:
        """Returns the network of a checkpoint, with the embedding rows that a longer stream has for the other classes."""
        folder, config = self.run / f"{PREFIX}{step}", dataclasses.replace(self.config, num_class_embeds=None)
        read_state(folder)
        architecture = UNet2DModel.load_config(task_folder(self.run, 0) / "unet")
        unet = create_unet(architecture, self.train.channels, self.class_ids, config).eval()
        weights, rows = load_file(folder / self.variants[variant]), unet.class_embedding.weight.detach().clone()
        rows[: self.num_classes] = weights["class_embedding.weight"][: self.num_classes]
        unet.load_state_dict({**weights, "class_embedding.weight": rows})
        return unet

    def draws(self, which: str, purpose: str, num_samples: int, batch_size=BATCH_SIZE, rows=None) -> FisherBatches:
        """Returns draws of the `old` or `unseen` images, independent of those for any other purpose."""
        images = TaskImages(self.train.select(self.rows[which] if rows is None else rows), self.class_ids)
        seed = derive_seed(self.config.seed, "direction", purpose)
        scheduler = create_scheduler(self.config)
        return FisherBatches(images, scheduler, num_samples, (0, NUM_TRAIN_TIMESTEPS), batch_size, seed, 0, "cpu")

    def rounds(self, which: str, purpose: str, rows=None) -> FisherBatches:
        """Returns the draws of v, a batch a round: as many as the task has images (or as `rows`)."""
        size = len(self.rows["old"] if rows is None else rows)
        return self.draws(which, purpose, ROUNDS[-1] * size, size, rows)

    def share_in_unseen_rows(self, unet: UNet2DModel, vector: torch.Tensor) -> float:
        """Returns the share of a vector's squared length in the embedding rows of the classes that the task lacks."""
        rows = by_name(vector / vector.norm(), unet)["class_embedding.weight"][self.num_classes :]
        return rows.double().square().sum().item()


def stability(task: Task, variant: str, unet: UNet2DModel) -> tuple[torch.Tensor, dict]:
    """
    Returns v at the end, of shape `(parameters,)`, and |cos| of it to v of other draws (the ceiling), to v earlier, to v'
    of the unseen classes, and of v on two halves of the images. No two of a pair share a draw.
    """
    again, half = task.rounds("old", "v again"), ROUNDS[-1] // 2
    one, other = round_gradients(unet, task.rounds("old", "v")), round_gradients(unet, again)
    mu, weights = one.mean(dim=0), flat(unet)
    result = {f"cos, other draws, {size} an image": agreement(one, other, size) for size in ROUNDS}
    for back in STEPS_BEFORE_END:
        before = task.network(variant, task.last_step - back)
        result[f"cos, {back} steps before"] = cosine(mu, round_gradients(before, again).mean(dim=0))
        result[f"distance of the weights, {back} steps before"] = (weights - flat(before)).norm().item()

    order = permutation(len(task.rows["old"]), task.config.seed, "direction", "halves").numpy()
    images = {f"half {part}": task.rows["old"][np.sort(x)] for part, x in enumerate(np.array_split(order, 2))}
    halves = [round_gradients(unet, task.rounds("old", *item)).mean(dim=0) for item in images.items()]
    result |= {"cos, halves of the images": cosine(*halves), "... ceiling": agreement(one, other, half)}
    unseen = round_gradients(unet, task.rounds("unseen", "v unseen"))
    nu, halved = unseen.mean(dim=0), agreement(unseen[:half], unseen[half:], half)
    # What the cosine would be without sampling noise; twice the draws have the agreement 2 r / (1 + r).
    ceilings = agreement(one, other, ROUNDS[-1]) * 2 * halved / (1 + halved)
    result |= {"cos, v' of unseen classes": cosine(mu, nu), "... without noise": cosine(mu, nu) / ceilings**0.5}
    result["... share of v' in their embedding rows"] = task.share_in_unseen_rows(unet, nu)
    return mu / mu.norm(), {"mean gradient": mu.norm().item(), **result}


def stiffness(task: Task, unet: UNet2DModel, v: torch.Tensor) -> dict:
    """Returns eigenvalues, and curvatures and second moments along v and others, of the old and of the unseen loss."""
    directions, result = {"v": v}, {}
    for loss, count in (("old", EIGENVECTORS), ("unseen", 1)):
        batches = list(task.draws(loss, "hessian", HESSIAN_DRAWS))
        vectors, found = top_eigenvectors(lambda x, b=batches: hessian_product(unet, b, x), len(v), count)
        directions[f"top {loss}"] = vectors[0]
        values, shares = found.pop("values"), (vectors @ v).square().cumsum(dim=0).tolist()
        result |= {f"eigenvalue {i}, {loss} loss": value for i, value in enumerate(values, start=1)}
        result |= {f"{name}, {loss} loss": value for name, value in found.items()}
        result |= {f"share of v in the top {i}, {loss} loss": shares[i - 1] for i in sorted({1, count})}
    result["top unseen in their rows"] = task.share_in_unseen_rows(unet, directions["top unseen"])

    randoms = torch.randn(RANDOM_DIRECTIONS, len(v), generator=generator(task.config.seed, "direction", "random"))
    for loss in ("old", "unseen"):
        batches = list(task.draws(loss, "held out", HELD_OUT_DRAWS))

        def curvature(x: torch.Tensor, step: float = STEP, batches=batches) -> float:
            return along.curvature_along(unet, losses, batches, by_name(x / x.norm(), unet), (step,))[0]

        result |= {f"curvature along {name}, {loss} loss": curvature(x) for name, x in directions.items()}
        result[f"curvature along v, Hessian product, {loss} loss"] = (v @ hessian_product(unet, batches, v)).item()
        random = [curvature(x, RANDOM_STEP) for x in randoms]
        result |= {f"curvature along random, {loss} loss": float(np.mean(random)), f"... each, {loss} loss": random}
        projected = torch.cat([along.projections(unet, losses, batch, by_name(v, unet)) for batch in batches])
        m = projected.double().square().mean().item()
        trace, _ = fisher.gradient_trace(unet, losses, batches, HELD_OUT_DRAWS)
        result |= {f"m, {loss} loss": m, f"trace, {loss} loss": trace, f"m / trace, {loss} loss": m / trace}
    return result


def measure(task: Task, variant: str) -> dict:
    """Returns all numbers of one run's weights."""
    start, unet = time.process_time(), task.network(variant, task.last_step)
    v, numbers = stability(task, variant, unet)
    numbers |= stiffness(task, unet, v)
    about = {"run": task.run.name, "variant": variant, "seed": task.config.seed, "step": task.last_step}
    about |= {"num_images": {loss: len(rows) for loss, rows in task.rows.items()}, "num_parameters": len(v)}
    config = {key: value for key, value in dataclasses.asdict(task.config).items() if key not in OPERATIONAL_KEYS}
    return {**about, "cpu_seconds": time.process_time() - start, "numbers": numbers, "config": config}


def table(rows: list[dict]) -> str:
    """Returns the Markdown table: a column a variant, the mean over seeds and the range."""
    variants = list(dict.fromkeys(row["variant"] for row in rows))
    columns = [[row["numbers"] for row in rows if row["variant"] == variant] for variant in variants]
    heads = [f"{variant} (n={len(column)})" for variant, column in zip(variants, columns, strict=True)]
    text = [f"| | {' | '.join(heads)} |", "| --- |" + " --- |" * len(variants)]
    for name in [name for name, value in rows[0]["numbers"].items() if not isinstance(value, (list, bool))]:
        values = [[numbers[name] for numbers in column] for column in columns]
        cells = [[format_number(float(x)) for x in (np.mean(cell), min(cell), max(cell))] for cell in values]
        text.append(f"| {name} | " + " | ".join(f"{mean} ({low} to {high})" for mean, low, high in cells) + " |")
    return "\n".join(text)


def plot(path: Path, rows: list[dict]) -> None:
    """Saves |cos| to the last v over the last steps: a line a variant, thin ones the seeds, dashed the ceiling."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.add_subplot()
    for number, variant in enumerate(dict.fromkeys(row["variant"] for row in rows)):
        seeds, color = [row["numbers"] for row in rows if row["variant"] == variant], f"C{number}"
        curves = np.array([[seed[f"cos, {back} steps before"] for back in STEPS_BEFORE_END] for seed in seeds])
        axes.plot(-np.array(STEPS_BEFORE_END), curves.T, color=color, linewidth=0.6, alpha=0.6)
        axes.plot(-np.array(STEPS_BEFORE_END), curves.mean(axis=0), color=color, marker="o", label=variant)
        ceiling = np.mean([seed[f"cos, other draws, {ROUNDS[-1]} an image"] for seed in seeds])
        axes.axhline(ceiling, color=color, linestyle="--", linewidth=1, label=f"{variant}, other draws at the end")
    axes.set(xlabel="optimizer steps from the end", ylabel="|cos| to the last v", ylim=(0, 1.02))
    figure.legend(loc="outside lower center", ncols=2, fontsize=8, frameon=False)
    figure.savefig(path, dpi=120, facecolor="white")


def main(argv: list[str] | None = None) -> int:
    """Runs the script and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path, help="output folders of train_continual.py")
    parser.add_argument("--output", type=Path, required=True, help="a JSON file to write")
    parser.add_argument("--plot", type=Path, default=None, help="a PNG file to write")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    constants = {name: value for name, value in globals().items() if name.isupper()}
    versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "diffusers_cl": __version__}
    content = {"versions": versions, "device": "cpu", "threads": 1, "constants": constants, "rows": []}
    try:
        for run in args.runs:
            task = Task(run)
            for variant in task.variants:
                content["rows"].append(measure(task, variant))
                write_json(args.output, content)
    except (RunError, OSError) as error:
        print(f"direction.py: error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", DataError.exit_code)
    print(table(content["rows"]))
    if args.plot is not None:
        plot(args.plot, content["rows"])
    return 0


if __name__ == "__main__":
    sys.exit(main())
