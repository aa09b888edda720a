"""The penalties that the others are judged by, and what is said of those that cannot work."""

import typing

import pytest
import torch
from estimate_helpers import NUM_TASKS, consolidated, flat, moved_along, num_parameters, value_and_gradient, weights

from diffusers_cl import Rank1EWC, TrainingConfig
from diffusers_cl.along import curvature_along
from diffusers_cl.controls import L2Penalty, RandomDirectionEWC, random_direction
from diffusers_cl.methods import create_penalty, create_replay


def directions(penalty, model) -> torch.Tensor:
    """One row a task."""
    names = [name for name, _ in model.named_parameters()]
    return torch.stack([flat(penalty.tensors["direction"][name][k] for name in names) for k in range(NUM_TASKS)])


def test_a_random_direction_has_the_strength_of_the_real_one(tasks, losses):
    real, control = (consolidated(kind, "auto", tasks, losses) for kind in (Rank1EWC, RandomDirectionEWC))
    assert control.strengths() == real.strengths() and all(strength > 0 for strength in control.strengths())
    model = tasks[0][0]
    v, u = directions(real, model), directions(control, model)
    torch.testing.assert_close(u.norm(dim=1), torch.ones(NUM_TASKS, dtype=torch.float64))
    # Unit vectors at random: cosines of 1 / sqrt(D). Another one for every task, the same one for the same draws.
    bound = 5 / num_parameters(model) ** 0.5
    assert (u @ v.T).abs().max() < bound and (u @ u.T - torch.eye(NUM_TASKS)).abs().max() < bound
    assert torch.equal(u, directions(consolidated(RandomDirectionEWC, 7.0, tasks, losses), model))
    # And it is what holds: moving along it costs strength * e^2 / 2.
    step = {name: control.tensors["direction"][name][-1] for name, _ in model.named_parameters()}
    only_last = RandomDirectionEWC("auto")
    only_last.consolidate(*tasks[-1][:1], losses, tasks[-1][1])
    value, _ = value_and_gradient(only_last, moved_along(tasks[-1][0], step, 0.1))
    assert abs(value / (only_last.strengths()[0] * 0.1**2 / 2) - 1) < 1e-3


def test_l2_holds_every_parameter_alike(tasks, losses):
    penalty = consolidated(L2Penalty, 3.0, tasks, losses)
    model = tasks[0][0]
    value, gradient = value_and_gradient(penalty, model)
    away = [weights(model) - weights(anchor) for anchor, _ in tasks]
    expected = 1.5 * sum(difference.square().sum() for difference in away)
    torch.testing.assert_close(value, expected.item(), rtol=1e-4, atol=0)
    torch.testing.assert_close(gradient, 3.0 * sum(away), rtol=1e-3, atol=1e-4)


def test_l2_auto_is_the_mean_curvature_over_directions(tasks, losses):
    model, batches = tasks[0]
    penalty = L2Penalty("auto")
    penalty.consolidate(model, losses, batches)
    (curvature,) = penalty.statistics["curvature"]
    held = flat(penalty.tensors["fisher"])
    assert held.unique().numel() == 1
    torch.testing.assert_close(held[0].item(), max(0.0, curvature), rtol=1e-6, atol=0)
    # The trace of the Hessian over the number of parameters, from many more directions.
    generator = torch.Generator().manual_seed(0)
    many = torch.tensor(
        [curvature_along(model, losses, batches, random_direction(model, generator), (0.1,))[0] for _ in range(60)]
    )
    assert abs(curvature - many.mean()) < 4 * many.std() * (1 / 4 + 1 / 60) ** 0.5


def test_a_direction_of_noise_is_named(tasks, losses, make_batches):
    model = tasks[0][0]
    with pytest.warns(UserWarning, match="largely sampling noise: signal ratio .* after 2 draws"):
        Rank1EWC().consolidate(model, losses, make_batches([2]))
    # One draw many times over is all signal.
    batch = tuple(tensor.expand(8, *tensor.shape[1:]) for tensor in make_batches([1])[0])
    penalty = Rank1EWC()
    penalty.consolidate(model, losses, [batch])
    assert penalty.statistics["signal_ratio"][0] == pytest.approx(8, rel=1e-3)


def test_every_penalty_and_replay_has_its_class():
    def names(key: str) -> list[str]:
        return typing.get_args(typing.get_type_hints(TrainingConfig)[key])

    made = {name: create_penalty(TrainingConfig(penalty=name, use_ema=True), print) for name in names("penalty")}
    assert made.pop("none") is None and made["lowrank_ewc"].rank == TrainingConfig.fisher_rank
    assert all(penalty.kind == name and penalty.ewc_lambda == 15_000 for name, penalty in made.items())
    sources = {name: getattr(create_replay(TrainingConfig(replay=name)), "source", None) for name in names("replay")}
    assert sources == {"none": None, "lwf": "current", "memory": "memory"} | dict.fromkeys(
        ("generative_replay", "generative_distillation"), "generated"
    )


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"penalty": "rank1_ewc"}, 1),
        ({"penalty": "lowrank_ewc", "lr_scheduler": "constant_with_warmup"}, 1),
        ({"penalty": "rank1_ewc", "use_ema": True}, 0),
        ({"penalty": "rank1_ewc", "lr_scheduler": "cosine"}, 0),
        ({"penalty": "ewc"}, 0),
        ({}, 0),
    ],
)
def test_raw_weights_at_a_constant_rate_are_warned_of(settings, expected):
    said = []
    create_penalty(TrainingConfig(**settings), said.append)
    assert len(said) == expected and all("use_ema" in text for text in said)
