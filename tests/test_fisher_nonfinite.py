"""What is not finite stops an estimate on all processes alike, and a decoupled step before it changes a weight."""

import copy
import math

import pytest
import torch
from estimate_helpers import consolidated
from torture_fisher import PENALTIES, Interruption, task

from diffusers_cl import DiagonalEWC, Rank1EWC
from diffusers_cl.along import curvature_along
from diffusers_cl.fisher import diagonal_fisher, gradient_trace, mean_gradient, rank1_fisher
from diffusers_cl.lowrank import top_fisher_directions


def breaking(losses, after: int, value: float = math.nan):
    """Losses that are multiplied by NaN after so many calls."""
    calls = 0

    def broken(model, batch):
        nonlocal calls
        calls += 1
        return losses(model, batch) * (value if calls > after else 1.0)

    return broken


def along(model, losses, batches, reduce):
    return curvature_along(
        model, losses, batches, {n: torch.ones_like(p) for n, p in model.named_parameters()}, reduce=reduce
    )


def lowrank_moments(model, losses, batches, reduce):
    return top_fisher_directions(model, losses, batches, 2, num_iterations=0, reduce=reduce)


def lowrank_directions(model, losses, batches, reduce):
    return top_fisher_directions(model, losses, batches, 2, num_iterations=1, reduce=reduce)


# One call of the losses is a pass, with one batch a process (two are, for two directions and for a central difference).
@pytest.mark.parametrize(
    ("estimate", "after", "named"),
    [
        (mean_gradient, 0, "the Fisher's mean gradient"),
        (rank1_fisher, 0, "the Fisher's mean gradient"),
        (rank1_fisher, 1, "the Fisher's second moment"),
        (rank1_fisher, 2, "the Fisher's second moment"),
        (rank1_fisher, 3, "the loss along the Fisher's direction"),
        (rank1_fisher, 6, "the loss along the Fisher's direction"),
        (rank1_fisher, 7, "the Fisher's trace"),
        (along, 0, "the loss along the Fisher's direction"),
        (gradient_trace, 0, "the Fisher's trace"),
        (diagonal_fisher, 0, "the Fisher's diagonal"),
        (lowrank_directions, 0, "the Fisher's mean gradient"),
        (lowrank_directions, 1, "a Fisher direction"),
        (lowrank_moments, 1, "the Fisher's second moments"),
    ],
)
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_all_processes_stop_and_name_it(estimate, after, named, value):
    model, losses, batches = task(Interruption())
    first, second, _ = batches
    expected = f"{named} is not finite"

    # The process at fault, and what it gives to every sum up to the one that stops it.
    given = []
    with pytest.raises(FloatingPointError) as error:
        estimate(model, breaking(losses, after, value), [first], reduce=lambda t: given.append(t.clone()) or t)
    assert str(error.value) == expected

    # Another one, whose draws are sound, stops at the same sum.
    others = iter(given)
    with pytest.raises(FloatingPointError) as error:
        estimate(model, losses, [second], reduce=lambda t: t + next(others))
    assert str(error.value) == expected
    assert next(others, None) is None


@pytest.mark.parametrize("name", PENALTIES)
def test_a_consolidation_that_is_not_finite_leaves_the_penalty_as_it_was(name):
    # In its last pass: by then all others have gone well.
    whole = Interruption()
    penalty = PENALTIES[name]()
    penalty.consolidate(*task(whole))
    before = {key: tensor.clone() for key, tensor in penalty.state_dict().items()}
    model, losses, batches = task(Interruption(), seed=1)
    with pytest.raises(FloatingPointError, match="is not finite"):
        penalty.consolidate(model, breaking(losses, whole.calls - 1), batches)
    assert penalty.num_tasks == 1 and penalty.state_dict().keys() == before.keys()
    for key, tensor in penalty.state_dict().items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=0, equal_nan=True)


class Slope(torch.nn.Linear):
    """One weight, whose gradient is the input: the losses below are the product."""

    def __init__(self):
        super().__init__(1, 1, bias=False)
        torch.nn.init.ones_(self.weight)

    @staticmethod
    def losses(model, batch) -> torch.Tensor:
        return model(batch[0])[:, 0]


def test_what_overflows_in_a_sum_of_tasks_is_named():
    # 1.4e19 squared is 2e38, twice that is more than float32 holds.
    penalty = DiagonalEWC(1.0)
    penalty.consolidate(Slope(), Slope.losses, [(torch.full((2, 1), 1.4e19),)])
    with pytest.raises(FloatingPointError, match="the sum of the Fishers"):
        penalty.consolidate(Slope(), Slope.losses, [(torch.full((2, 1), 1.4e19),)])
    assert penalty.num_tasks == 1 and penalty.tensors["fisher"]["weight"].item() == pytest.approx(1.96e38)
    with pytest.raises(FloatingPointError, match="the Fisher's diagonal"):
        penalty.consolidate(Slope(), Slope.losses, [(torch.full((2, 1), 3e19),)])


def test_what_is_divided_by_zero_is_named():
    # The squares of 1e-30 are 0 in float32: nothing to scale.
    with pytest.raises(FloatingPointError, match="the Fisher's scale"):
        DiagonalEWC("auto").consolidate(Slope(), Slope.losses, [(torch.full((2, 1), 1e-30),)])
    # The first draws, which the trace is of, have no gradient.
    rows = torch.zeros(200, 1)
    rows[-1] = 1.0
    penalty = Rank1EWC()
    with pytest.raises(FloatingPointError, match="a ratio to the Fisher's trace"):
        penalty.consolidate(Slope(), Slope.losses, [(rows,)])
    assert penalty.state_dict() == {}


@pytest.mark.parametrize("name", ["rank1_ewc", "lowrank_ewc"])
def test_an_offset_that_is_not_finite_is_named(name):
    # A weight that the losses do not see, as an embedding row of a class that the task lacks.
    model = torch.nn.Embedding(2, 3)
    model.weight.data[1] = math.inf
    penalty = PENALTIES[name]()
    with pytest.raises(FloatingPointError, match="the penalty's offset"):
        penalty.consolidate(model, lambda m, b: m(b[0]).square().mean(dim=1), [(torch.zeros(4, dtype=torch.long),)])
    assert penalty.state_dict() == {}


# The decoupled step


def in_the_last_weight(value: float):
    def spoil(penalty, model) -> float:
        list(model.parameters())[-1].data[-1] = value
        return 0.1

    return spoil


def in_the_state(penalty, model) -> float:
    if "offset" in penalty.statistics:
        penalty.statistics["offset"][0] = math.nan
    else:
        list(penalty.tensors["anchor"].values())[-1].fill_(math.nan)
    return 0.1


SPOILED = {
    "nan": in_the_last_weight(math.nan),
    "inf": in_the_last_weight(math.inf),
    "state": in_the_state,
    "learning rate": lambda penalty, model: math.nan,
}


@pytest.mark.parametrize("spoiled", SPOILED)
@pytest.mark.parametrize("name", PENALTIES)
def test_a_step_that_is_not_finite_changes_no_weight(name, spoiled):
    model, losses, batches = task(Interruption())
    penalty = PENALTIES[name]()
    penalty.consolidate(model, losses, batches)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    lr = SPOILED[spoiled](penalty, model)
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(FloatingPointError, match="the penalty's step is not finite"):
        penalty.step(model, lr)
    for key, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[key], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", [Rank1EWC, DiagonalEWC])
def test_a_finite_step_is_taken(tasks, losses, kind):
    penalty, model = consolidated(kind, 15_000.0, tasks[:1], losses), copy.deepcopy(tasks[1][0])
    before = copy.deepcopy(model.state_dict())
    penalty.step(model, 1e-3)
    assert any(not torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
