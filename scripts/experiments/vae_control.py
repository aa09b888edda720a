"""
Asks of a variational auto-encoder what the paper asks of a diffusion model: how much of the second moment rank-1 explains.

    python scripts/experiments/vae_control.py --output FILE.json [--geometry results/geometry/digits/geometry.json]

The summary of the paper's appendix reports about 50 % for a VAE (MSE + KL), 85 % with a KL weight of 1e-3 and 99 % for the
diffusion loss; the text of the paper itself has no such table. Digits, the same small network for all VAEs.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

from diffusers_cl.config import TrainingConfig
from diffusers_cl.data import load_splits
from diffusers_cl.errors import ConfigError, RunError
from diffusers_cl.files import read_json, write_json
from diffusers_cl.gram import geometry_of, gradient_gram, plan_passes
from diffusers_cl.pipeline import from_uint8
from diffusers_cl.plots import format_number
from diffusers_cl.randomness import generator


# What is published, by KL weight: the share that rank-1 explains.
PUBLISHED = {1.0: 0.50, 1e-3: 0.85}
KL_WEIGHTS = (1.0, 1e-3, 0.0)
NUM_STEPS, BATCH_SIZE, LEARNING_RATE = 4000, 64, 1e-3
NUM_SAMPLES, NUM_SEEDS = 512, 3


class VAE(torch.nn.Module):
    """An auto-encoder of 8x8 images with a Gaussian code of 8 numbers; the code's noise is an argument."""

    def __init__(self, pixels: int = 64, hidden: int = 128, code: int = 8):
        super().__init__()
        self.encoder = torch.nn.Sequential(
            torch.nn.Linear(pixels, hidden), torch.nn.SiLU(), torch.nn.Linear(hidden, 2 * code)
        )
        self.decoder = torch.nn.Sequential(
            torch.nn.Linear(code, hidden), torch.nn.SiLU(), torch.nn.Linear(hidden, pixels)
        )

    def forward(self, images: torch.Tensor, noise: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        mean, log_variance = self.encoder(images).chunk(2, dim=1)
        return self.decoder(mean + (log_variance / 2).exp() * noise), mean, log_variance


def vae_losses(kl_weight: float):
    """Returns the loss of every row: squared error and KL to a standard normal, both summed over their dimensions."""

    def losses(model, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
        images, noise = batch
        output, mean, log_variance = model(images, noise)
        error = F.mse_loss(output, images, reduction="none").sum(dim=1)
        divergence = (log_variance.exp() + mean.square() - 1 - log_variance).sum(dim=1) / 2
        return error + kl_weight * divergence

    return losses


def draws(images: torch.Tensor, count: int, *purpose) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns images chosen at random, and noise for the code."""
    g = generator(*purpose)
    return images[torch.randint(len(images), (count,), generator=g)], torch.randn(count, 8, generator=g)


def measure(images: torch.Tensor, kl_weight: float, seed: int) -> dict:
    """Trains a VAE and returns what its gradients say."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = VAE()
    losses, optimizer = vae_losses(kl_weight), torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    for step in range(NUM_STEPS):
        for group in optimizer.param_groups:
            # To 0, so that what is measured is a minimum and not the optimizer's last steps.
            group["lr"] = LEARNING_RATE * (1 - step / NUM_STEPS)
        loss = losses(model, draws(images, BATCH_SIZE, seed, "train", step)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    batch = draws(images, NUM_SAMPLES, seed, "measure")
    found = geometry_of(gradient_gram(model, losses, batch, plan_passes(model, NUM_SAMPLES, 2**30)))
    error = F.mse_loss(model(*batch)[0], batch[0]).item()
    return {"kl_weight": kl_weight, "seed": seed, "reconstruction_error": error, **shares(found)}


def shares(row: dict) -> dict:
    """
    Returns what rank-1 explains, in three readings, since the summary does not say which it is: the top eigenvalue's share of the
    trace, its square's share of `|F|_F^2`, and the second moment's along the mean gradient, m, of the trace.
    """
    top = row["eigenvalues"][0]
    return {
        "share_of_trace": top / row["trace"],
        "share_of_square": (top / row["frobenius"]) ** 2,
        "mean_direction": row["second_moment"] / row["trace"],
        "ratio": row["ratio"],
    }


def table(rows: list[dict], diffusion: list[dict]) -> str:
    """Returns the Markdown table."""
    lines = [
        "| loss | lambda_1 / trace | lambda_1^2 / F^2 | m / trace | lambda_2 / lambda_1 | published |",
        "|---" * 6 + "|",
    ]

    def line(name: str, group: list[dict], published: str) -> str:
        values = [
            [row[key] for row in group] for key in ("share_of_trace", "share_of_square", "mean_direction", "ratio")
        ]
        cells = [f"{format_number(min(v))} to {format_number(max(v))}" for v in values]
        return f"| {name} | {' | '.join(cells)} | {published} |"

    for weight in KL_WEIGHTS:
        published = f"about {PUBLISHED[weight]:.0%}" if weight in PUBLISHED else ""
        lines.append(line(f"MSE + {weight:g} KL", [row for row in rows if row["kl_weight"] == weight], published))
    if diffusion:
        lines.append(line("diffusion, t = 100 to 900", diffusion, "about 99%"))
        late = [row for row in diffusion if row["t"] >= 500]
        lines.append(line("diffusion, t = 500 to 900", late, ""))
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Runs the script and returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="a JSON file to write")
    parser.add_argument("--geometry", type=Path, help="geometry.json of a diffusion model, to stand beside")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    try:
        diffusion = []
        if args.geometry is not None:
            content = read_json(args.geometry)
            if "timesteps" not in content:
                raise ConfigError(
                    f"--geometry is {args.geometry}, which has no timesteps; allowed: of the part timesteps"
                )
            diffusion = [{"t": row["t"], **shares(row)} for row in content["timesteps"]["rows"]]
        train, _ = load_splits(TrainingConfig(dataset_name="digits", resolution=8))
        images = from_uint8(train.decode(range(len(train.labels)))).flatten(1)
        start = time.process_time()
        rows = [measure(images, weight, seed) for weight in KL_WEIGHTS for seed in range(NUM_SEEDS)]
        constants = {"steps": NUM_STEPS, "batch_size": BATCH_SIZE, "num_samples": NUM_SAMPLES, "data": "digits"}
        content = {"constants": constants, "cpu_seconds": time.process_time() - start, "torch": torch.__version__}
        write_json(args.output, json.loads(json.dumps({**content, "rows": rows, "diffusion": diffusion})))
    except (RunError, OSError) as error:
        print(f"vae_control.py: error: {error}", file=sys.stderr)
        return getattr(error, "exit_code", ConfigError.exit_code)
    print(table(rows, diffusion))
    return 0


if __name__ == "__main__":
    sys.exit(main())
