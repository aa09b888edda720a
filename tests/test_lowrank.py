"""Several directions a task: the leading eigenvectors of the Fisher, against the dense matrix."""

import pytest
import torch
from estimate_helpers import flat, moved, moved_along, num_parameters, value_and_gradient

from diffusers_cl.lowrank import LowRankEWC, top_fisher_directions


RANK = 3


@pytest.fixture
def dense(tasks, losses, gradient_loop):
    """The eigenvalues (largest first) and eigenvectors (columns) of the first task's E[g g^T]."""
    model, batches = tasks[0]
    gradients = gradient_loop(model, losses, batches)
    eigenvalues, vectors = torch.linalg.eigh(gradients.T @ gradients / len(gradients))
    return eigenvalues.flip(0), vectors.flip(1)


def rows(directions, model, start=0) -> torch.Tensor:
    return torch.stack(
        [flat(directions[name][k] for name, _ in model.named_parameters()) for k in range(start, start + RANK)]
    )


def test_leading_directions_are_those_of_the_dense_matrix(tasks, losses, dense):
    model, batches = tasks[0]
    directions, moments, num_samples = top_fisher_directions(model, losses, batches, RANK, num_iterations=30)
    found = rows(directions, model)
    eigenvalues, vectors = dense
    assert num_samples == 9
    torch.testing.assert_close(found @ found.T, torch.eye(RANK, dtype=torch.float64), rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.tensor(moments, dtype=torch.float64), eigenvalues[:RANK], rtol=1e-3, atol=0)
    assert (found @ vectors[:, :RANK]).diag().abs().min() > 0.99
    # By default the values are within a few percent.
    _, early, _ = top_fisher_directions(model, losses, batches, RANK)
    torch.testing.assert_close(torch.tensor(early, dtype=torch.float64), eigenvalues[:RANK], rtol=0.05, atol=0)


def test_processes_share_the_draws(tasks, losses, in_two_processes):
    model, batches = tasks[0]
    whole, moments, num_samples = top_fisher_directions(model, losses, batches, RANK)
    parts = in_two_processes(
        lambda rank, reduce: top_fisher_directions(model, losses, batches[rank : rank + 1], RANK, reduce=reduce),
        max_rounds=12,
    )
    for directions, values, count in parts:
        assert count == num_samples
        assert values == pytest.approx(moments, rel=1e-4)
        assert (rows(directions, model) @ rows(whole, model).T).diag().abs().min() > 1 - 1e-4


def test_penalty_equals_its_quadratic_form_and_holds_those_directions(tasks, losses):
    penalty = LowRankEWC(5.0, RANK)
    for model, batches in tasks:
        penalty.consolidate(model, losses, batches, diagnostics=False)
    assert penalty.num_tasks == 3 and len(penalty.strengths()) == 9 and len(penalty.summary()) == 3
    away = moved(tasks[-1][0], 0.1, seed=9)
    directions = [rows(penalty.tensors["direction"], away, RANK * k) for k in range(3)]
    expected = 0.0
    for k, (model, _) in enumerate(tasks):
        projected = directions[k] @ (flat(away.parameters()) - flat(model.parameters()))
        strengths = torch.tensor(penalty.strengths()[RANK * k : RANK * (k + 1)], dtype=torch.float64)
        expected += 0.5 * (strengths * projected.square()).sum().item()
    value, gradient = value_and_gradient(penalty, away)
    assert value == pytest.approx(expected, rel=1e-4)
    assert gradient.shape == (num_parameters(away),)

    # For a large lr the step is the projection onto what moves no anchor; nothing else moves.
    before = flat(away.parameters())
    penalty.step(away, 1e9)
    assert value_and_gradient(penalty, away)[0] < 1e-6 * value
    span = torch.linalg.qr(torch.cat(directions).T)[0]
    change = flat(away.parameters()) - before
    assert (change - span @ (span.T @ change)).norm() < 1e-4 * change.norm()


def test_auto_takes_the_curvature_along_each_direction_and_is_kept_in_files(tasks, losses, tmp_path):
    penalty = LowRankEWC("auto", RANK)
    model, batches = tasks[0]
    penalty.consolidate(model, losses, batches)
    assert penalty.strengths() == [max(0.0, value) for value in penalty.statistics["curvature"]]
    penalty.save_pretrained(tmp_path)
    again = LowRankEWC.from_pretrained(tmp_path)
    assert again.rank == RANK and again.strengths() == penalty.strengths()
    step = {name: penalty.tensors["direction"][name][0] for name, _ in model.named_parameters()}
    away = moved_along(model, step, 0.1)
    assert value_and_gradient(again, away)[0] == value_and_gradient(penalty, away)[0] > 0
    summary = penalty.summary()[0]
    assert len(summary["second_moment"]) == RANK and summary["num_samples"] == 9
