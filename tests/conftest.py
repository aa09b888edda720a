"""What several test files share: tiny real networks and files, draws to estimate from, and ways to check an estimate."""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from diffusers import DDIMScheduler, UNet2DModel
from estimate_helpers import stream
from pipeline_helpers import tiny_pipeline

from diffusers_cl import DiagonalEWC
from diffusers_cl.losses import denoising_losses, training_target


# The architecture alone: the script sets sample_size, in_channels, out_channels and num_class_embeds.
TINY_UNET = {
    "_class_name": "UNet2DModel",
    "block_out_channels": [8, 16],
    "layers_per_block": 1,
    "norm_num_groups": 4,
    "attention_head_dim": 8,
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["UpBlock2D", "UpBlock2D"],
}
# 8x8 greyscale images of four classes.
TINY_SIZES = {"sample_size": 8, "in_channels": 1, "out_channels": 1, "num_class_embeds": 4}


class SmallDenoiser(torch.nn.Module):
    """A class-conditional denoiser of 1,273 parameters, called like a UNet: small enough for a dense D x D Fisher."""

    def __init__(self, channels: int = 24):
        super().__init__()
        self.conv_in = torch.nn.Conv2d(1, channels, 3, padding=1)
        self.class_embedding = torch.nn.Embedding(4, channels)
        self.time_embedding = torch.nn.Linear(2, channels)
        self.norm = torch.nn.GroupNorm(2, channels)
        self.mix = torch.nn.Conv2d(channels, channels, 1)
        self.conv_out = torch.nn.Conv2d(channels, 1, 3, padding=1)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, sample: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor) -> SimpleNamespace:
        phase = timesteps.to(sample.dtype)[:, None] / 1000 * torch.tensor([1.0, 6.0], dtype=sample.dtype)
        embedding = self.time_embedding(phase.cos()) + self.class_embedding(class_labels)
        hidden = self.norm(self.conv_in(sample) + embedding[:, :, None, None])
        hidden = hidden + self.mix(torch.nn.functional.silu(hidden))
        return SimpleNamespace(sample=self.conv_out(self.dropout(torch.nn.functional.silu(hidden))))


def denoising(model, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """The losses that the script hands to the Fisher and the penalties."""
    return denoising_losses(model, *batch)


@pytest.fixture
def tiny_unet() -> UNet2DModel:
    """A real `UNet2DModel` of 43 thousand parameters with attention in one block, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return UNet2DModel.from_config({**TINY_UNET, **TINY_SIZES}).eval()


@pytest.fixture
def tiny_model_config(tmp_path) -> Path:
    """The architecture of `tiny_unet` as a JSON file, for `--model_config_name_or_path`."""
    path = tmp_path / "tiny_unet.json"
    path.write_text(json.dumps(TINY_UNET))
    return path


@pytest.fixture
def small_denoiser() -> SmallDenoiser:
    """A [`SmallDenoiser`] in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SmallDenoiser().eval()


@pytest.fixture(scope="session")
def make_batches() -> Callable[..., list[tuple[torch.Tensor, ...]]]:
    """
    Returns a function of batch sizes, seed and class ids that gives a list of `(noisy_images, timesteps, class_labels,
    target)`; the rows are the same however they are cut into batches. The images are structured, not noise, so
    that the mean gradient is not small beside its spread.
    """

    def make(sizes: list[int], seed: int = 0, classes: tuple[int, ...] = (0, 1, 2, 3)) -> list[tuple]:
        generator = torch.Generator().manual_seed(seed)
        num_rows = sum(sizes)
        class_labels = torch.tensor(classes)[torch.randint(len(classes), (num_rows,), generator=generator)]
        ramp = torch.linspace(-1, 1, 8)
        images = torch.sin(ramp[None, :, None] * (1.0 + class_labels[:, None, None]) + ramp[None, None, :])[:, None]
        images = images * torch.rand(num_rows, 1, 1, 1, generator=generator)
        noise = torch.randn(num_rows, 1, 8, 8, generator=generator)
        timesteps = torch.randint(0, 1000, (num_rows,), generator=generator)
        scheduler = DDIMScheduler()
        noisy_images = scheduler.add_noise(images, noise, timesteps)
        target = training_target(scheduler, images, noise, timesteps)
        columns = [tensor.split(sizes) for tensor in (noisy_images, timesteps, class_labels, target)]
        return list(zip(*columns, strict=True))

    return make


@pytest.fixture(scope="session")
def losses() -> Callable:
    """`losses(model, batch) -> (batch,)`, as the script defines it."""
    return denoising


@pytest.fixture(scope="session")
def gradient_loop() -> Callable:
    """
    Returns the gradients by hand: `gradient_loop(model, losses, batches)` is one ordinary backward pass a row, as a
    float64 matrix of shape `(rows, parameters)`.
    """

    def loop(model, losses, batches) -> torch.Tensor:
        rows = []
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        for batch in batches:
            for row in range(len(batch[0])):
                loss = losses(model, tuple(tensor[row : row + 1] for tensor in batch)).sum()
                gradients = torch.autograd.grad(loss, parameters)
                rows.append(torch.cat([gradient.flatten() for gradient in gradients]).double())
        return torch.stack(rows)

    return loop


@pytest.fixture(scope="session")
def in_two_processes() -> Callable:
    """
    Returns what two processes get that share the draws: `in_two_processes(estimate)` calls `estimate(rank, reduce)` for
    ranks 0 and 1 and returns both results.

    `reduce` adds what the other process gave to the same call the last time round. Each round makes the results of at
    least one more `reduce` that others depend on right, so when a round repeats the one before it, bit for bit, every
    sum was the sum that real processes would have seen.
    """

    def run(estimate: Callable, max_rounds: int = 6) -> list:
        given = [[], []]
        for _ in range(max_rounds):
            before, given, results = given, [[], []], []
            for rank in (0, 1):

                def reduce(tensor, rank=rank, before=before, given=given):
                    call = len(given[rank])
                    given[rank].append(tensor.clone())
                    if call >= len(before[1 - rank]):
                        return tensor
                    # Rank 0 first on both ranks, as in an all-reduce: the sums are bit-equal.
                    first, second = (tensor, before[1][call]) if rank == 0 else (before[0][call], tensor)
                    return first + second

                # With wrong sums, in the first rounds, an estimate may refuse to go on.
                try:
                    results.append(estimate(rank, reduce))
                except (ValueError, ArithmeticError) as error:
                    results.append(error)
            if all(
                len(now) == len(then) and all(map(torch.equal, now, then))
                for now, then in zip(given, before, strict=True)
            ):
                break
        else:
            raise AssertionError("the two processes' sums did not settle")
        for result in results:
            if isinstance(result, Exception):
                raise result
        assert len(given[0]) == len(given[1]), "the processes reduced unequally often: they would wait for ever"
        return results

    return run


@pytest.fixture
def tasks(small_denoiser, make_batches) -> list[tuple]:
    """Three finished tasks of a [`SmallDenoiser`]: the model at other weights, and draws of other classes."""
    return stream(small_denoiser, make_batches)


@pytest.fixture
def dense_fishers(tasks, losses, gradient_loop):
    """Returns a function of the penalty's class: the D x D matrix of every task, from one backward pass a row."""

    def build(kind) -> list[torch.Tensor]:
        matrices = []
        for model, batches in tasks:
            gradients = gradient_loop(model, losses, batches)
            if kind is DiagonalEWC:
                matrices.append(torch.diag(gradients.square().mean(dim=0)))
            else:
                # arXiv 2509.23593, Sec. 3.3 and Eq. 6: c* mu mu^T with c* = E[(mu . g)^2] / |mu|^4.
                mu = gradients.mean(dim=0)
                c_star = (gradients @ mu).square().mean() / mu.norm() ** 4
                matrices.append(c_star * torch.outer(mu, mu))
        return matrices

    return build


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder with a tiny pipeline in it."""
    folder = tmp_path_factory.mktemp("saved") / "task-00"
    tiny_pipeline().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The settings, architecture and classifier that `script_helpers.arguments` takes."""
    # Not at the top: it imports the script and all its dependencies, which most test files do without.
    from script_helpers import shared_folder, tiny_files

    return tiny_files(shared_folder(tmp_path_factory) / "tiny")


@pytest.fixture(scope="module")
def hub():
    """A local Hub for the tests of a file."""
    from hub_server import HubServer

    with HubServer() as server:
        yield server


@pytest.fixture(scope="module")
def client(hub, tmp_path_factory):
    """A process with the real client, on that Hub."""
    from hub_helpers import Client

    with Client(hub, tmp_path_factory.mktemp("home")) as process:
        yield process


@pytest.fixture
def fresh_hub(hub):
    """The Hub as a test wants it: nothing was asked of it yet, and nothing fails."""
    hub.requests.clear()
    hub.failures.clear()
    hub.has_collections = True
