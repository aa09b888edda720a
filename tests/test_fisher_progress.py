"""An estimate that was interrupted, and is asked for again with the same folder of shards, goes on to the same bits."""

import pytest
import torch
from torture_fisher import PENALTIES, Interrupted, Interruption, consolidate, interruptions, task

from diffusers_cl.along import curvature_along
from diffusers_cl.fisher import diagonal_fisher, gradient_trace, mean_gradient, rank1_fisher
from diffusers_cl.lowrank import top_fisher_directions
from diffusers_cl.shards import Shards


def assert_equal(state, expected) -> None:
    assert state.keys() == expected.keys()
    for name, tensor in state.items():
        torch.testing.assert_close(tensor, expected[name], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", PENALTIES)
def test_a_consolidation_killed_at_every_batch_goes_on(tmp_path, name):
    expected, uninterrupted = consolidate(name, None, Interruption()), Interruption()
    consolidate(name, Shards(tmp_path / "whole", {}), uninterrupted)
    # One more batch each time: every batch of every pass is where it was killed once.
    attempts, done = 0, 0
    while True:
        attempts += 1
        interruption = Interruption(after_batches=1)
        try:
            state = consolidate(name, Shards(tmp_path / "parts", {}), interruption)
        except Interrupted:
            done += interruption.calls
            assert attempts <= 200, "it never ends"
            continue
        break
    assert_equal(state, expected)
    # Nothing was done twice.
    assert done + interruption.calls == uninterrupted.calls
    assert attempts > 10


# The second calls of a batch, in the pass of central differences: after three of the mean gradient, or six with the diagonal.
@pytest.mark.parametrize(("name", "second_calls"), [("rank1_ewc", (5, 7, 9)), ("ewc", (8, 10, 12))])
def test_a_consolidation_killed_in_any_call_goes_on(tmp_path, name, second_calls):
    whole = Interruption()
    expected = consolidate(name, None, whole)
    for at_call in range(1, whole.calls + 1):
        first, second = Interruption(at_call=at_call), Interruption()
        with pytest.raises(Interrupted):
            consolidate(name, Shards(tmp_path / str(at_call), {}), first)
        assert_equal(consolidate(name, Shards(tmp_path / str(at_call), {}), second), expected)
        # The batch that it was killed in is done again.
        assert first.calls + second.calls == whole.calls + 1 + (at_call in second_calls)


@pytest.mark.parametrize("name", PENALTIES)
def test_nothing_is_done_again_after_the_end(tmp_path, name):
    expected = consolidate(name, Shards(tmp_path, {}), Interruption())
    again = Interruption()
    assert_equal(consolidate(name, Shards(tmp_path, {}), again), expected)
    assert again.calls == 0


def test_interruptions_at_random(tmp_path):
    # What `make torture` does more often.
    counts = interruptions(tmp_path, 20)
    assert counts == {"tried": 20, "equal": 20, "no_more_than_lost": 20, "missed": []}


def test_shards_of_other_inputs_are_not_taken(tmp_path):
    expected = consolidate("rank1_ewc", None, Interruption())
    with pytest.raises(Interrupted):
        consolidate("rank1_ewc", Shards(tmp_path, {"seed": 1}), Interruption(after_batches=5), seed=1)
    assert_equal(consolidate("rank1_ewc", Shards(tmp_path, {"seed": 0}), Interruption()), expected)


class Names:
    """A progress that keeps nothing but the names of the passes and of their sums."""

    def __init__(self):
        self.passes, self.sums = [], []

    def over(self, batches, name, sums):
        self.passes.append(name)
        self.sums.append(sums)
        assert all(isinstance(tensor, torch.Tensor) for tensor in sums.values())
        # It names a file.
        assert "/" not in name
        return batches


@pytest.mark.parametrize("name", PENALTIES)
def test_every_pass_has_a_name_of_its_own(name):
    names = Names()
    consolidate(name, names, Interruption())
    assert len(names.passes) == len(set(names.passes)) > 2
    # What is restored is what is added to: of two passes no tensor is the same.
    tensors = [id(tensor) for sums in names.sums for tensor in sums.values()]
    assert len(tensors) == len(set(tensors))


def test_names_of_passes():
    model, losses, batches = task(Interruption())
    names = Names()
    fisher = rank1_fisher(model, losses, batches, progress=names)
    loss = [f"loss {step}" for step in ("+0.01", "-0.01", "+0.03", "-0.03")]
    assert names.passes == ["mean_gradient", "projections", *loss, "trace"]
    names = Names()
    mean_gradient(model, losses, batches, progress=names)
    diagonal_fisher(model, losses, batches, progress=names)
    gradient_trace(model, losses, batches, progress=names)
    curvature_along(model, losses, batches, fisher.direction, (0.1,), progress=names, label="along-2")
    assert names.passes == [
        "mean_gradient",
        "diagonal",
        "trace",
        *(f"along-2 {step}" for step in ("+0.0", "+0.1", "-0.1")),
    ]
    names = Names()
    top_fisher_directions(model, losses, batches, 2, num_iterations=2, progress=names)
    assert names.passes == ["mean_gradient", "power-0", "power-1", "power-2"]
    # The products are summed only where another iteration follows.
    assert ["product" in sums for sums in names.sums] == [False, True, True, False]


def test_the_trace_goes_on_within_its_first_draws(tmp_path):
    model, losses, batches = task(Interruption())
    expected = gradient_trace(model, losses, batches, num_samples=7)
    assert expected[1] == 7
    for done in (1, 2):
        folder = tmp_path / str(done)
        model, losses, batches = task(Interruption(after_batches=done))
        with pytest.raises(Interrupted):
            # Of draws 4, 3 and 4 the first seven are two batches; of eight a part of the third is needed.
            gradient_trace(model, losses, batches, num_samples=7 + (done == 2), progress=Shards(folder, {}))
        interruption = Interruption()
        model, losses, batches = task(interruption)
        assert gradient_trace(model, losses, batches, num_samples=7, progress=Shards(folder, {})) == expected
        assert interruption.calls == 2 - done
