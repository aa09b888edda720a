"""The Fisher against one backward pass an image, what finished tasks keep, and sampling against bare forward passes."""

import torch
from diffusers import DDIMScheduler
from torch.utils.flop_counter import FlopCounterMode

from diffusers_cl import DiagonalEWC, Rank1EWC
from diffusers_cl.fisher import diagonal_fisher, rank1_fisher
from diffusers_cl.passes import estimating
from diffusers_cl.pipeline import ClassConditionalPipeline
from diffusers_cl.sampling import sample_images

from . import baselines
from .networks import NUM_CLASSES, batches, losses, network
from .timing import in_turns, ratio_row, row


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the distance of two vectors in units of the expected one's length."""
    return ((found - expected).norm() / expected.norm()).item()


def rank1(name: str, num_draws: int, batch_size: int, device, repetitions: int, target: str) -> list[dict]:
    """Returns the lines of the rank-1 Fisher: without and with its diagnostics, and the passes it is made of."""
    model, draws = network(name, device).eval(), batches(name, num_draws, batch_size, device)

    def forward() -> None:
        with torch.no_grad():
            for batch in draws:
                losses(model, batch)

    def backward() -> None:
        for batch in draws:
            torch.autograd.grad(losses(model, batch).sum(), list(model.parameters()))

    ours, loop = {}, {}
    times = in_turns(
        {
            "loop": lambda: loop.update(baselines.rank1_loop(model, losses, draws)),
            "rank1": lambda: ours.update(vars(rank1_fisher(model, losses, draws, diagnostics=False, curvature=False))),
            "with diagnostics": lambda: rank1_fisher(model, losses, draws),
            "forward": forward,
            "forward and backward": backward,
        },
        device,
        repetitions,
    )
    agreement = {
        "second moment, relative difference": abs(ours["second_moment"] / loop["second_moment"] - 1),
        "|mu|, relative difference": abs(ours["mean_gradient_norm"] / loop["norm"] - 1),
    }
    about = {"draws": num_draws, "batch": batch_size, **agreement}
    return [
        row("rank-1 Fisher, against two passes of the loop", name, times, "loop", "rank1", target, **about),
        row(
            "... against an epoch's forward and backward passes", name, times, "rank1", "forward and backward", "<= 2"
        ),
        row("... with trace and curvature, against without", name, times, "with diagnostics", "rank1"),
        row("... at most, if all but the mean gradient cost nothing", name, times, "loop", "forward and backward"),
        row("... forward and backward passes, against forward ones", name, times, "forward and backward", "forward"),
    ]


def diagonal(name: str, num_draws: int, batch_size: int, device, repetitions: int, target: str) -> dict:
    """Returns the line of the diagonal Fisher."""
    model, draws = network(name, device).eval(), batches(name, num_draws, batch_size, device)
    ours, loop = {}, {}
    times = in_turns(
        {
            "loop": lambda: loop.update(found=baselines.diagonal_loop(model, losses, draws)),
            "diagonal": lambda: ours.update(found=diagonal_fisher(model, losses, draws)[0]),
        },
        device,
        repetitions,
    )
    found = torch.cat([tensor.flatten() for tensor in ours["found"].values()])
    about = {"draws": num_draws, "batch": batch_size, "relative difference": relative(found, loop["found"])}
    return row("diagonal Fisher, against the loop", name, times, "loop", "diagonal", target, **about)


def memory(name: str, num_tasks: int, device) -> list[dict]:
    """Returns how many parameter vectors penalties keep after so many tasks, all consolidated, on two draws each."""
    lines = []
    for kind, limit in ((Rank1EWC, num_tasks), (DiagonalEWC, 2)):
        model, penalty = network(name, device), kind()
        size = sum(parameter.nbytes for parameter in model.parameters())
        for task in range(num_tasks):
            penalty.consolidate(model, losses, batches(name, 2 + task, 64, device), diagnostics=False)
            penalty(model)
        tensors = [tensor for named in penalty.tensors.values() for tensor in named.values()]
        tensors += penalty._joined.matrices if kind is Rank1EWC else []
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        held = sum(storages.values())
        what = f"vectors kept after {num_tasks} tasks, {kind.kind}"
        lines.append(ratio_row(what, name, [round(held / size, 4)], f"<= {limit}", bytes=held))
    return lines


def sampling(name: str, num_images: int, batch_size: int, steps: int, device, repetitions: int) -> dict:
    """Returns the line of sampling for replay, all classes mixed, against the forward passes that it takes."""
    model = network(name, device).eval()
    pipeline = ClassConditionalPipeline(model, DDIMScheduler())
    labels = [index % NUM_CLASSES for index in range(num_images)]
    keys = [("replay", 0, label, index) for index, label in enumerate(labels)]
    shards = batches(name, num_images, batch_size, device)

    def forward() -> None:
        with torch.no_grad():
            for noisy_images, timesteps, class_labels, _ in shards:
                for _ in range(steps):
                    model(noisy_images, timesteps, class_labels=class_labels)

    options = {"seed": 0, "num_inference_steps": steps, "batch_size": batch_size, "disable_progress_bar": True}
    times = in_turns(
        {"sampling": lambda: sample_images(pipeline, labels, keys, **options), "forward": forward}, device, repetitions
    )
    about = {"images": num_images, "batch": batch_size, "DDIM steps": steps}
    return row("sampling, against its forward passes", name, times, "sampling", "forward", "<= 1.10", **about)


def arithmetic(name: str, num_rows: int, device, repetitions: int) -> dict:
    """Returns the rate of a forward pass and of a large matrix product, in GFLOP/s: how near a pass is to the machine's limit."""
    model, (batch,) = network(name, device).eval(), batches(name, num_rows, num_rows, device)
    one, other = torch.randn(2, 2048, 2048, device=device)

    def forward() -> None:
        with torch.no_grad(), estimating(model):
            losses(model, batch)

    with FlopCounterMode(display=False) as counter:
        forward()
    times = in_turns({"forward": forward, "product": lambda: one @ other}, device, repetitions)
    work = {"forward": counter.get_total_flops(), "product": 2 * 2048**3}
    rates = {key: [work[key] / value / 1e9 for value in values] for key, values in times.items()}
    ratios = [a / b for a, b in zip(rates["forward"], rates["product"], strict=True)]
    about = {key: sorted(values)[len(values) // 2] for key, values in rates.items()}
    return ratio_row("GFLOP/s of a forward pass, against a large matrix product's", name, ratios, **{"GFLOP/s": about})
