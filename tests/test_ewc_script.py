"""The penalties in someone's own script: a plain training loop, what they import, and their arguments."""

import copy
import inspect
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from estimate_helpers import PENALTIES

import diffusers_cl


@pytest.mark.parametrize("mode", ["loss", "decoupled"])
@pytest.mark.parametrize("kind", PENALTIES)
def test_penalty_in_a_plain_training_loop(tiny_unet, make_batches, losses, kind, mode):
    old, new = make_batches([6], seed=1, classes=(0, 1)), make_batches([6], seed=2, classes=(2, 3))
    penalty = kind(ewc_lambda=15_000.0)
    penalty.consolidate(tiny_unet, losses, old)

    def train(model, use_penalty: bool) -> tuple[float, float]:
        """Adam on the new task alone; what the penalty and the new task's loss are in the end."""
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for _ in range(10):
            loss = losses(model, new[0]).mean()
            if use_penalty and mode == "loss":
                loss = loss + penalty(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if use_penalty and mode == "decoupled":
                penalty.step(model, 1e-3)
        return penalty(model).item(), losses(model, new[0]).mean().item()

    before = losses(tiny_unet, new[0]).mean().item()
    free, _ = train(copy.deepcopy(tiny_unet), use_penalty=False)
    held, learned = train(copy.deepcopy(tiny_unet), use_penalty=True)
    assert free > 1
    assert held < 0.5 * free
    # The new task is learned all the same.
    assert learned < before


SCRIPT = """
import sys

import torch

from diffusers_cl import DiagonalEWC, Rank1EWC

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1))
batches = [(torch.randn(6, 4), torch.randn(6, 1)) for _ in range(2)]


def losses(model, batch):
    return (model(batch[0]) - batch[1]).square().mean(dim=1)


penalty = Rank1EWC(ewc_lambda=15_000.0)
loss = losses(model, batches[0]).mean()
loss = loss + penalty(model)
loss.backward()
penalty.consolidate(model, losses, batches, diagnostics=False)
penalty.save_pretrained(sys.argv[1])
assert Rank1EWC.from_pretrained(sys.argv[1]).num_tasks == 1
assert DiagonalEWC().num_tasks == 0
print(*sorted({name for name in sys.modules if name.startswith("diffusers_cl")}))
print(*sorted({name.split(".")[0] for name in sys.modules}))
"""


def test_penalties_need_torch_and_safetensors_only(tmp_path):
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path],
        cwd=Path(diffusers_cl.__file__).parents[1],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    ours, all_modules = map(str.split, result.stdout.splitlines())
    modules = ("along", "ewc", "fisher", "passes", "quadratic", "strength")
    assert ours == ["diffusers_cl", *(f"diffusers_cl.{name}" for name in modules)]
    # What else the project depends on was not imported, by us or by what we import.
    others = {"accelerate", "datasets", "diffusers", "huggingface_hub", "jsonargparse", "matplotlib", "scipy"}
    assert not others & set(all_modules)


def test_public_arguments_are_those_of_the_design():
    for kind in PENALTIES:
        assert list(inspect.signature(kind).parameters) == ["ewc_lambda"]
        assert list(inspect.signature(kind.step).parameters) == ["self", "model", "lr"]
        assert list(inspect.signature(kind.consolidate).parameters)[:5] == [
            "self",
            "model",
            "losses",
            "batches",
            "reduce",
        ]
