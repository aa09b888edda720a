"""A training step with penalties over many tasks against the same without, and under other options."""

import copy

import torch

from diffusers_cl import DiagonalEWC, Rank1EWC

from .baselines import FlatPenalty
from .networks import NETWORKS, batches, losses, network
from .timing import in_turns, row, seconds, threads


LEARNING_RATE = 1e-4


def random_penalty(kind, model: torch.nn.Module, num_tasks: int):
    """Returns a penalty over so many tasks, with random directions or diagonals: what it costs does not depend on them."""
    names = {name: parameter.detach() for name, parameter in model.named_parameters()}
    scale = sum(parameter.numel() for parameter in names.values()) ** -0.5
    statistics = {"offset": 0.0, "second_moment": 1e-6, "num_samples": 1.0, "curvature": float("nan"), "constant": 0.0}
    state = {f"statistics.{key}": torch.full((num_tasks,), value).double() for key, value in statistics.items()}
    for name, parameter in names.items():
        if kind is DiagonalEWC:
            state |= {f"fisher.{name}": torch.rand_like(parameter), f"anchor.{name}": parameter.clone()}
        else:
            state[f"direction.{name}"] = scale * torch.randn(num_tasks, *parameter.shape, device=parameter.device)
    penalty = kind(1e-6)
    penalty.load_state_dict(state)
    return penalty


def penalties(
    name: str, num_rows: int, rows_of_a_step: int, tasks: tuple[int, ...], device, repetitions: int, num_threads=None
) -> list[dict]:
    """
    Returns the lines of penalties: a step with one, of `rows_of_a_step` rows, of which half are replayed and have a teacher,
    against the same step without.

    A step is measured with `num_rows` rows (the paper's 256 take a minute on two cores), and its forward and backward passes, but not
    the optimizer's part and not the penalty, count `rows_of_a_step / num_rows` times.
    """
    model, (batch,) = network(name, device), batches(name, num_rows, num_rows, device)
    replayed = tuple(tensor[: num_rows // 2] for tensor in batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

    # Each turn ends with gradients that are there, whichever way round it goes.
    def passes() -> None:
        optimizer.zero_grad()
        with torch.no_grad():
            losses(model, replayed)
        losses(model, batch).mean().backward()

    def in_the_loss(penalty) -> None:
        penalty(model).backward()

    lines = []
    for num_tasks in tasks:
        rank1, diagonal = (random_penalty(kind, model, num_tasks) for kind in (Rank1EWC, DiagonalEWC))
        flat = FlatPenalty(model, num_tasks)
        passes()
        functions = {
            "passes": passes,
            "rank-1, in the loss": lambda penalty=rank1: in_the_loss(penalty),
            "rank-1, decoupled": lambda penalty=rank1: penalty.step(model, LEARNING_RATE),
            "diagonal, in the loss": lambda penalty=diagonal: in_the_loss(penalty),
            "diagonal, decoupled": lambda penalty=diagonal: penalty.step(model, LEARNING_RATE),
            "flat vectors, in the loss": lambda penalty=flat: in_the_loss(penalty),
            "update": optimizer.step,
        }
        with threads(num_threads or torch.get_num_threads()):
            lines += _lines(name, functions, device, repetitions, num_tasks, num_rows, rows_of_a_step)
    return lines


def _lines(name, functions, device, repetitions, num_tasks, num_rows, rows_of_a_step) -> list[dict]:
    times, share = in_turns(functions, device, repetitions), rows_of_a_step / num_rows
    steps = [share * a + b for a, b in zip(times["passes"], times["update"], strict=True)]
    about = {"tasks": num_tasks, "rows of a step": rows_of_a_step, "rows measured": num_rows}
    lines = []
    for kind in list(functions)[1:-1]:
        measured = {"step": steps, "with": [a + b for a, b in zip(steps, times[kind], strict=True)]}
        target = "<= 1.03" if kind.startswith("rank-1") else None
        reckoned = f" ({rows_of_a_step} rows, reckoned from {num_rows})" * (num_rows != rows_of_a_step)
        what = f"step with {kind}, {num_tasks} task{'s' * (num_tasks > 1)}{reckoned}"
        lines.append(row(what, name, measured, "with", "step", target, **about))
    return lines


def precisions(name: str, num_rows: int, device, repetitions: int, compiled: bool) -> list[dict]:
    """
    Returns the lines of options: a step under each against float32, eager, contiguous; forward, backward and optimizer, the
    teacher's forward pass on half the rows.
    """
    student, (batch,) = network(name, device), batches(name, num_rows, num_rows, device)
    half = tuple(tensor[: num_rows // 2] for tensor in batch)

    def step_of(model, precision: str, channels_last: bool = False, is_compiled: bool = False):
        model, teacher = copy.deepcopy(model), copy.deepcopy(model).requires_grad_(False)
        if channels_last:
            model, teacher = (part.to(memory_format=torch.channels_last) for part in (model, teacher))
        if is_compiled:
            model.compile()
            teacher.compile()
        optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, fused=True)

        def step() -> None:
            allowed = "tf32" if precision != "float32" else "ieee"
            torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = allowed
            with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
                with torch.no_grad():
                    losses(teacher, half)
                loss = losses(model, batch).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        return step

    is_gpu = device.type == "cuda"
    functions = {
        "float32, eager": step_of(student, "float32"),
        "channels_last": step_of(student, "float32", channels_last=True),
        "bfloat16": step_of(student, "bfloat16"),
        "bfloat16, channels_last": step_of(student, "bfloat16", channels_last=True),
    }
    if is_gpu:
        functions["tf32"] = step_of(student, "tf32")
    if compiled:
        functions["compiled"] = step_of(student, "float32", is_compiled=True)
        functions["bfloat16, compiled"] = step_of(student, "bfloat16", is_compiled=True)
        functions["bfloat16, compiled, channels_last"] = step_of(student, "bfloat16", True, True)
    first = {key: seconds(function, device) for key, function in functions.items()}
    times = in_turns(functions, device, repetitions)
    lines = []
    for key in list(functions)[1:]:
        target = ">= 4" if is_gpu and key == "bfloat16, compiled, channels_last" else None
        about = {"rows": num_rows, "seconds of the first step": first[key]}
        lines.append(row(f"float32 eager step, against {key}", name, times, "float32, eager", key, target, **about))
    return lines


def rows_of_a_step(name: str) -> int:
    """Returns the rows of a preset's batch: new images and as many replayed ones."""
    return 2 * NETWORKS[name][3]
