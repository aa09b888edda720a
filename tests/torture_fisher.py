"""Interruptions of the Fisher estimate: a few in test_fisher_progress.py, more with `make torture`."""

import random
from pathlib import Path

import torch

from diffusers_cl.controls import L2Penalty, RandomDirectionEWC
from diffusers_cl.ewc import DiagonalEWC, Rank1EWC
from diffusers_cl.lowrank import LowRankEWC
from diffusers_cl.shards import Shards


PENALTIES = {
    "rank1_ewc": lambda: Rank1EWC("auto"),
    "ewc": lambda: DiagonalEWC("auto"),
    "lowrank_ewc": lambda: LowRankEWC("auto", 2),
    "l2": lambda: L2Penalty("auto"),
    "random_direction": lambda: RandomDirectionEWC("auto"),
}
# The most that a pass calls the losses for one batch: two for a central difference.
CALLS_OF_A_BATCH = {"lowrank_ewc": 3, "l2": 1}


class Interrupted(Exception):
    """Stands for the end of the process."""


class Interruption:
    """
    Where the process ends: in the batches, once the losses have seen `after_batches` of them, or in call number `at_call` of
    the losses; by default nowhere. `calls` counts the calls.
    """

    def __init__(self, after_batches: int | None = None, at_call: int | None = None):
        self.after_batches, self.at_call, self.calls, self.num_seen = after_batches, at_call, 0, 0

    def losses(self, model, batch) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.at_call:
            raise Interrupted
        return (model(batch[0]) - batch[1]).square().mean(dim=1)


class Batches:
    """A re-iterable of batches in which the process ends."""

    def __init__(self, interruption: Interruption, batches: list):
        self.interruption, self.batches = interruption, batches

    def __iter__(self):
        for batch in self.batches:
            if self.interruption.num_seen == self.interruption.after_batches:
                raise Interrupted
            calls = self.interruption.calls
            yield batch
            # A batch that was in the sums already is asked for, too.
            self.interruption.num_seen += self.interruption.calls > calls


def task(interruption: Interruption, seed: int = 0) -> tuple:
    """Returns a small network, its losses, and batches of 4, 3 and 4 rows."""
    generator = torch.Generator().manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.Tanh(), torch.nn.Linear(6, 2))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    rows = (
        torch.randn(11, 4, generator=generator).split([4, 3, 4]),
        torch.randn(11, 2, generator=generator).split([4, 3, 4]),
    )
    return model, interruption.losses, Batches(interruption, list(zip(*rows, strict=True)))


def consolidate(name: str, progress, interruption: Interruption, seed: int = 0) -> dict[str, torch.Tensor]:
    """Returns the state of a penalty after its first task."""
    penalty = PENALTIES[name]()
    penalty.consolidate(*task(interruption, seed), progress=progress)
    return penalty.state_dict()


def interruptions(folder: Path, count: int, seed: int = 0) -> dict:
    """
    Interrupts consolidations of every penalty one to three times, at random calls of the losses, with the sums saved after
    every, every second or every fifth batch.

    Returns:
        `dict`: `tried`; `equal`, to the bit; `no_more_than_lost`, those that did again only what was not saved; and `missed`,
        what is not both.
    """
    chance = random.Random(seed)
    counts = {"tried": 0, "equal": 0, "no_more_than_lost": 0, "missed": []}
    for number in range(count):
        name, every = list(PENALTIES)[number % len(PENALTIES)], chance.choice([1, 2, 5])
        whole = Interruption()
        expected = consolidate(name, None, whole, seed=number)
        calls, lost, kills = 0, 0, [chance.randint(1, whole.calls) for _ in range(chance.randint(1, 3))]
        for at_call in [*kills, None]:
            interruption, state = Interruption(at_call=at_call), None
            try:
                state = consolidate(name, Shards(folder / str(number), {}, every), interruption, seed=number)
            except Interrupted:
                lost += every * CALLS_OF_A_BATCH.get(name, 2)
            calls += interruption.calls
            if state is not None:
                break
        equal = all(torch.equal(state[key].nan_to_num(-1.0), expected[key].nan_to_num(-1.0)) for key in expected)
        counts["tried"] += 1
        counts["equal"] += equal
        counts["no_more_than_lost"] += calls <= whole.calls + lost
        if not equal or calls > whole.calls + lost:
            counts["missed"].append(
                {"number": number, "penalty": name, "kills": kills, "every": every, "calls": calls}
            )
    return counts
