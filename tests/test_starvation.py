"""The penalty's share of the update, and when it warns."""

import pytest
import torch

from diffusers_cl.starvation import LIMIT, MEASURE_EVERY, NUM_MEASUREMENTS, PenaltyShare


class Quadratic:
    """`strength / 2 * |theta - 1|^2`, with its proximal step."""

    def __init__(self, strength: float, num_tasks: int = 1):
        self.strength, self.num_tasks = strength, num_tasks

    def __call__(self, model):
        return self.strength / 2 * sum((parameter - 1).square().sum() for parameter in model.parameters())

    @torch.no_grad()
    def step(self, model, lr):
        for parameter in model.parameters():
            parameter.copy_((parameter + lr * self.strength) / (1 + lr * self.strength))


@pytest.fixture
def model():
    model = torch.nn.Linear(3, 2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    return model


def run(share, model, mode, penalty, num_steps, lr=0.1):
    """Steps of plain gradient descent on a loss whose gradient is 1 everywhere, from zeros each time."""
    values = []
    for step in range(num_steps):
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        loss = sum(parameter.sum() for parameter in model.parameters())
        if mode == "loss":
            loss = loss + penalty(model)
        model.zero_grad()
        loss.backward()
        share.before_update(model, step)
        torch.optim.SGD(model.parameters(), lr).step()
        share.after_update(model)
        if mode == "decoupled":
            penalty.step(model, lr)
        values.append(share.finish(model))
    return values


def test_share_of_the_gradient(model):
    # |g_penalty| = 3 |g_data| everywhere.
    penalty = Quadratic(3.0)
    values = run(PenaltyShare(penalty, "loss", print), model, "loss", penalty, MEASURE_EVERY + 1)
    assert values[0] == pytest.approx(0.75) and values[-1] == pytest.approx(0.75)
    assert values[1:-1] == [None] * (MEASURE_EVERY - 1)


def test_share_of_the_displacement(model):
    # The optimizer moves by -0.1, the proximal step from -0.1 to (-0.1 + 0.1 * 4) / 1.4.
    penalty = Quadratic(4.0)
    values = run(PenaltyShare(penalty, "decoupled", print), model, "decoupled", penalty, 1)
    moved = 0.3 / 1.4 + 0.1
    assert values == [pytest.approx(moved / (moved + 0.1), rel=1e-5)]


@pytest.mark.parametrize("mode", ["loss", "decoupled"])
def test_one_warning_a_task_and_only_above_the_limit(model, mode):
    for strength, count in ((1e4, 1), (0.1, 0)):
        warnings = []
        penalty = Quadratic(strength)
        share = PenaltyShare(penalty, mode, warnings.append)
        values = run(share, model, mode, penalty, (NUM_MEASUREMENTS - 1) * MEASURE_EVERY)
        assert warnings == []
        values += run(share, model, mode, penalty, 5 * MEASURE_EVERY)
        assert len(warnings) == count, values
        assert all((value > LIMIT) == (count == 1) for value in values if value is not None)


def test_nothing_is_measured_without_a_penalty_or_before_its_first_task(model):
    for penalty in (None, Quadratic(1.0, num_tasks=0)):
        share = PenaltyShare(penalty, "loss", print)
        assert run(share, model, "decoupled" if penalty else "none", Quadratic(1.0), 2) == [None, None]
