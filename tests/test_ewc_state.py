"""What both penalties keep of finished tasks, report, save and load."""

import copy
import json

import pytest
import torch
from estimate_helpers import PENALTIES, consolidated, flat, moved, value_and_gradient, weights
from safetensors import safe_open

from diffusers_cl import DiagonalEWC, Rank1EWC
from diffusers_cl.fisher import rank1_fisher


# What is kept


def test_rank1_keeps_one_vector_a_task_and_no_anchor(tasks, losses):
    num_parameters = len(weights(tasks[0][0]))
    penalty = Rank1EWC()
    for number, (model, batches) in enumerate(tasks, start=1):
        penalty.consolidate(model, losses, batches)
        state = penalty.state_dict()
        vectors = {key: tensor for key, tensor in state.items() if not key.startswith("statistics.")}
        assert all(key.startswith("direction.") and tensor.dtype == torch.float32 for key, tensor in vectors.items())
        assert sum(tensor.numel() for tensor in vectors.values()) == number * num_parameters
        scalars = [tensor for key, tensor in state.items() if key.startswith("statistics.")]
        assert all(tensor.shape == (number,) and tensor.dtype == torch.float64 for tensor in scalars)
        assert len(scalars) < 15


def test_diagonal_keeps_two_vectors_whatever_the_number_of_tasks(tasks, losses):
    num_parameters = len(weights(tasks[0][0]))
    penalty = DiagonalEWC()
    for number, (model, batches) in enumerate(tasks, start=1):
        penalty.consolidate(model, losses, batches)
        state = penalty.state_dict()
        vectors = {key: tensor for key, tensor in state.items() if not key.startswith("statistics.")}
        assert sum(tensor.numel() for tensor in vectors.values()) == 2 * num_parameters
        assert all(tensor.dtype == torch.float32 for tensor in vectors.values())
        assert penalty.num_tasks == number
        assert penalty.statistics["constant"][-1] >= 0


def test_rank1_reports_what_was_measured(tasks, losses):
    (model, batches), (second_model, _), _ = tasks
    penalty = Rank1EWC(1.0)
    fisher = penalty.consolidate(model, losses, batches)
    penalty.consolidate(second_model, losses, batches, diagnostics=False)
    first, second = penalty.summary()
    expected = rank1_fisher(model, losses, batches)
    for name in ("second_moment", "curvature", "curvature_check", "mean_gradient_norm", "num_samples", "trace"):
        assert first[name] == getattr(expected, name) == getattr(fisher, name), name
    assert first["num_samples"] == first["trace_num_samples"] == 9
    # Both in float64.
    assert first["offset"] == pytest.approx((flat(fisher.direction.values()) @ weights(model)).item(), abs=1e-12)
    assert first["signal_ratio"] == pytest.approx(9 * fisher.mean_gradient_norm**2 / fisher.trace, rel=1e-12)
    assert first["direction_share"] == pytest.approx(fisher.second_moment / fisher.trace, rel=1e-12)
    for name in ("curvature", "curvature_check", "trace", "signal_ratio", "direction_share"):
        assert second[name] is None, name
    assert second["second_moment"] > 0


def test_diagonal_reports_what_was_measured(tasks, losses):
    (model, batches), _, _ = tasks
    penalty = DiagonalEWC(1.0)
    fisher = penalty.consolidate(model, losses, batches)
    penalty.consolidate(model, losses, batches, diagnostics=False)
    first, second = penalty.summary()
    assert first["num_samples"] == second["num_samples"] == 9
    assert first["trace"] == pytest.approx(flat(fisher.values()).sum().item(), rel=1e-6)
    assert first["curvature"] is None and second["trace"] is None


@pytest.mark.parametrize("kind", PENALTIES)
def test_consolidate_leaves_model_and_random_state_alone(small_denoiser, make_batches, losses, kind):
    model = small_denoiser.train()
    before, state = torch.get_rng_state(), copy.deepcopy(model.state_dict())
    consolidated(kind, "auto", [(model, make_batches([4]))], losses)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("ewc_lambda", [15_000.0, "auto"])
@pytest.mark.parametrize("kind", PENALTIES)
def test_two_processes_consolidate_what_one_does(tasks, losses, in_two_processes, kind, ewc_lambda):
    alone = consolidated(kind, ewc_lambda, tasks[:1], losses)
    model, (first_shard, second_shard) = tasks[0]

    def consolidate(rank, reduce):
        penalty = kind(ewc_lambda)
        penalty.consolidate(model, losses, [(first_shard, second_shard)[rank]], reduce=reduce)
        return penalty

    first, second = (penalty.state_dict() for penalty in in_two_processes(consolidate))
    assert first.keys() == second.keys() == alone.state_dict().keys()
    for name, expected in alone.state_dict().items():
        torch.testing.assert_close(first[name], second[name], rtol=0, atol=0, equal_nan=True)
        # The same batches in another order of float64 summation.
        torch.testing.assert_close(first[name], expected, rtol=1e-5, atol=1e-8, equal_nan=True)


@pytest.mark.parametrize("kind", PENALTIES)
def test_a_failed_consolidation_leaves_the_state_as_it_was(tasks, losses, kind):
    penalty = consolidated(kind, 1.0, tasks[:1], losses)
    before = {name: tensor.clone() for name, tensor in penalty.state_dict().items()}
    for batches, error in (([], ValueError), (tasks[1][1], FloatingPointError)):
        with pytest.raises(error):
            penalty.consolidate(tasks[1][0], lambda m, b: losses(m, b) / 0, batches)
        assert penalty.num_tasks == 1 and penalty.state_dict().keys() == before.keys()
        for name, tensor in penalty.state_dict().items():
            torch.testing.assert_close(tensor, before[name], rtol=0, atol=0, equal_nan=True)


# Saving and loading


def assert_equal_states(first, second) -> None:
    first, second = first.state_dict(), second.state_dict()
    assert first.keys() == second.keys()
    for name, tensor in first.items():
        assert tensor.dtype == second[name].dtype
        torch.testing.assert_close(tensor, second[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("ewc_lambda", [0.1, "auto"])
@pytest.mark.parametrize("kind", PENALTIES)
def test_round_trips_are_bit_equal_and_go_on(tmp_path, tasks, losses, kind, ewc_lambda):
    penalty = consolidated(kind, ewc_lambda, tasks[:2], losses)
    penalty.save_pretrained(tmp_path / "consolidation")
    assert [path.name for path in (tmp_path / "consolidation").iterdir()] == ["ewc.safetensors"]
    with safe_open(tmp_path / "consolidation" / "ewc.safetensors", framework="pt") as file:
        assert json.loads(file.metadata()["penalty"]) == {"kind": kind.kind, "ewc_lambda": ewc_lambda}
    from_file = kind.from_pretrained(tmp_path / "consolidation")
    from_dict = kind(ewc_lambda)
    from_dict.load_state_dict(penalty.state_dict())
    model = moved(tasks[1][0], 0.05, seed=10)
    value, gradient = value_and_gradient(penalty, model)
    for other in (from_file, from_dict):
        assert type(other) is kind and other.ewc_lambda == ewc_lambda and other.num_tasks == 2
        assert_equal_states(other, penalty)
        assert other.summary() == penalty.summary()
        other_value, other_gradient = value_and_gradient(other, model)
        assert other_value == value and torch.equal(other_gradient, gradient)
    # The third task after loading is the third task without saving.
    for other in (penalty, from_file, from_dict):
        other.consolidate(tasks[2][0], losses, tasks[2][1])
    assert_equal_states(from_file, penalty)
    assert_equal_states(from_dict, penalty)


@pytest.mark.parametrize("kind", PENALTIES)
def test_summary_is_in_the_same_order_after_loading(tmp_path, tasks, losses, kind):
    # metrics.json holds it: a run that was continued should leave the same bytes.
    penalty = consolidated(kind, 1.0, tasks[:1], losses)
    penalty.save_pretrained(tmp_path)
    assert list(kind.from_pretrained(tmp_path).summary()[0]) == list(penalty.summary()[0])


def test_loading_replaces_the_state(tasks, losses):
    penalty = consolidated(Rank1EWC, 1.0, tasks, losses)
    one_task = consolidated(Rank1EWC, 1.0, tasks[:1], losses)
    penalty.load_state_dict(one_task.state_dict())
    assert_equal_states(penalty, one_task)
    penalty.load_state_dict(Rank1EWC().state_dict())
    assert penalty.num_tasks == 0 and penalty(tasks[0][0]).item() == 0


def test_wrong_kind_of_file_is_an_error(tmp_path, tasks, losses):
    consolidated(Rank1EWC, 1.0, tasks[:1], losses).save_pretrained(tmp_path / "rank1")
    consolidated(DiagonalEWC, 1.0, tasks[:1], losses).save_pretrained(tmp_path / "diagonal")
    with pytest.raises(ValueError, match="holds penalty 'rank1_ewc', not 'ewc'"):
        DiagonalEWC.from_pretrained(tmp_path / "rank1")
    with pytest.raises(ValueError, match="holds penalty 'ewc', not 'rank1_ewc'"):
        Rank1EWC.from_pretrained(tmp_path / "diagonal")


@pytest.mark.parametrize(("kind", "other"), [PENALTIES, PENALTIES[::-1]])
def test_wrong_kind_of_state_is_an_error(tasks, losses, kind, other):
    state = consolidated(other, 1.0, tasks[:1], losses).state_dict()
    with pytest.raises(ValueError):
        penalty = kind(1.0)
        penalty.load_state_dict(state)
        penalty(tasks[0][0])


@pytest.mark.parametrize("kind", PENALTIES)
def test_other_parameters_are_an_error(tasks, losses, kind):
    model, batches = tasks[0]
    penalty = consolidated(kind, 1.0, tasks[:1], losses)

    renamed = copy.deepcopy(model)
    renamed.another = torch.nn.Linear(2, 2)
    frozen = copy.deepcopy(model)
    frozen.mix.requires_grad_(False)
    wider = type(model)(channels=8)
    for other, message in ((renamed, "another"), (frozen, "mix"), (wider, "conv_in.weight is .* in the state")):
        for use in (penalty, lambda m: penalty.step(m, 1.0), lambda m: penalty.consolidate(m, losses, batches)):
            with pytest.raises(ValueError, match=f"{kind.__name__}: .*{message}"):
                use(other)
    assert penalty.num_tasks == 1
