"""The penalty's share of the update, and when it warns."""

import logging

import pytest
import torch
from script_helpers import arguments, read_log, run

from diffusers_cl import starvation
from diffusers_cl.starvation import LIMITS, MEASURE_EVERY, NUM_MEASUREMENTS, PenaltyShare


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


def steps_of(share, model, mode, penalty, num_steps, lr=0.1):
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
    values = steps_of(PenaltyShare(penalty, "loss", print), model, "loss", penalty, MEASURE_EVERY + 1)
    assert values[0] == pytest.approx(0.75) and values[-1] == pytest.approx(0.75)
    assert values[1:-1] == [None] * (MEASURE_EVERY - 1)


def test_share_of_the_displacement(model):
    # The optimizer moves by -0.1, the proximal step from -0.1 to (-0.1 + 0.1 * 4) / 1.4.
    penalty = Quadratic(4.0)
    values = steps_of(PenaltyShare(penalty, "decoupled", print), model, "decoupled", penalty, 1)
    moved = 0.3 / 1.4 + 0.1
    assert values == [pytest.approx(moved / (moved + 0.1), rel=1e-5)]


@pytest.mark.parametrize("mode", ["loss", "decoupled"])
def test_one_warning_a_task_and_only_above_the_limit(model, mode):
    for strength, count in ((1e4, 1), (0.1, 0)):
        warnings = []
        penalty = Quadratic(strength)
        share = PenaltyShare(penalty, mode, warnings.append)
        values = steps_of(share, model, mode, penalty, (NUM_MEASUREMENTS - 1) * MEASURE_EVERY)
        assert warnings == []
        values += steps_of(share, model, mode, penalty, 5 * MEASURE_EVERY)
        assert len(warnings) == count, values
        assert all((value > LIMITS[mode]) == (count == 1) for value in values if value is not None)


def test_nothing_is_measured_without_a_penalty_or_before_its_first_task(model):
    for penalty in (None, Quadratic(1.0, num_tasks=0)):
        share = PenaltyShare(penalty, "loss", print)
        assert steps_of(share, model, "decoupled" if penalty else "none", Quadratic(1.0), 2) == [None, None]


def test_a_clipped_gradient_has_the_share_of_a_whole_one(model):
    penalty, shares = Quadratic(3.0), []
    for limit in (None, 0.5):
        share = PenaltyShare(penalty, "loss", print)
        (sum(parameter.sum() for parameter in model.parameters()) + penalty(model)).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), limit or float("inf")).item()
        share.before_update(model, 0, min(1.0, (limit or float("inf")) / (norm + 1e-6)))
        shares.append(share.finish(model))
        model.zero_grad()
    assert norm > 1 and shares == [pytest.approx(0.75), pytest.approx(0.75, rel=1e-4)]


@pytest.mark.parametrize("mode", ["loss", "decoupled"])
def test_a_run_logs_the_share_and_warns(files, tmp_path, monkeypatch, caplog, mode):
    monkeypatch.setattr(starvation, "MEASURE_EVERY", 1)
    settings = {"penalty": "ewc", "penalty_mode": mode, "ewc_lambda": 1e9, "replay": "none", "max_grad_norm": 1.0}
    with caplog.at_level(logging.WARNING):
        assert run(arguments(files, tmp_path / "run", **settings)) == 0
    log = read_log(tmp_path / "run")
    assert [record["task"] for record in log if "penalty_share" in record] == [1] * 5
    assert all(0 <= record["penalty_share"] <= 1 for record in log if "penalty_share" in record)
    assert sum("may starve the new task" in record.getMessage() for record in caplog.records) == 1
