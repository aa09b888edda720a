"""All processes go on from one place, or none does."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from diffusers_cl.errors import CheckpointError
from diffusers_cl.resume import ResumePoint, check_agreement


def accelerator(*others: list[int]) -> SimpleNamespace:
    """Stands for the main one of several processes, of which the others have found these places."""
    gathered = [torch.tensor([place]) for place in others]
    gather = lambda tensor: torch.cat([tensor, *gathered])  # noqa: E731
    return SimpleNamespace(num_processes=1 + len(others), device="cpu", gather=gather)


def test_processes_agree_where_they_go_on():
    within = ResumePoint(1, 5, [], [], (Path("checkpoint-7"), {"step": 7}))
    after = ResumePoint(1, 5, [], [], None)
    check_agreement(within, accelerator())
    check_agreement(within, accelerator([1, 7]))
    check_agreement(after, accelerator([1, -1], [1, -1]))
    for place, other in ((within, [1, -1]), (within, [1, 8]), (after, [0, -1])):
        with pytest.raises(CheckpointError, match="output_dir must be a folder that all share"):
            check_agreement(place, accelerator(other))
