"""`skip_nonfinite`: a few steps that are not finite are left out, and it is on record which images were in them."""

import json
import math

import pytest
from safetensors.torch import load_file
from script_helpers import arguments, interrupted_copy, read_log, run

import train_continual


SETTINGS = {"replay": "none", "penalty": "none"}


@pytest.fixture
def spoil(monkeypatch):
    """Makes the losses of some calls not finite, counted from 1 over the runs of a test; returns the calls."""
    losses, count, calls = train_continual.denoising_losses, 0, set()

    def spoilt(*args):
        nonlocal count
        count += 1
        return losses(*args) * (math.nan if count in calls else 1.0)

    monkeypatch.setattr(train_continual, "denoising_losses", spoilt)
    return calls


def skipped(output_dir) -> dict:
    return json.loads((output_dir / "run.json").read_text())["skipped"]


def test_steps_are_skipped_and_recorded(files, tmp_path, spoil, capfd):
    output_dir = tmp_path / "run"
    spoil |= {3, 8}
    assert run(arguments(files, output_dir, skip_nonfinite=2, **SETTINGS)) == 0
    found = skipped(output_dir)
    # By steps before them. A batch has eight images, of the classes of its task, by their rows in the data set.
    assert found.keys() == {"2", "7"} and [entry["task"] for entry in found.values()] == [0, 1]
    assert all(len(set(entry["rows"])) == 8 and entry["loss"] == "nan" for entry in found.values())
    assert [line["step"] for line in read_log(output_dir)] == [1, 2, 4, 5, 6, 7, 9, 10]
    # No weight moved in a step that was skipped.
    before, after, next_one = (
        load_file(output_dir / f"checkpoint-{step}" / "model.safetensors") for step in (2, 3, 4)
    )
    assert all(before[name].equal(after[name]) for name in before)
    assert not all(after[name].equal(next_one[name]) for name in after)


def test_one_more_than_allowed_stops_before_the_update(files, tmp_path, spoil, capfd):
    output_dir = tmp_path / "run"
    spoil |= {2, 4}
    assert run(arguments(files, output_dir, skip_nonfinite=1, **SETTINGS)) == 5
    assert "step 3: loss nan" in capfd.readouterr().err
    assert skipped(output_dir).keys() == {"1"} and (output_dir / "checkpoint-3").exists()
    # The same command with one more goes on.
    assert run(arguments(files, output_dir, skip_nonfinite=2, **SETTINGS)) == 0


def test_a_skipped_step_counts_once_when_it_is_taken_again(files, tmp_path, spoil):
    whole = tmp_path / "whole"
    spoil |= {1}
    assert run(arguments(files, whole, skip_nonfinite=1, **SETTINGS)) == 0
    record = (whole / "run.json").read_text()
    # Adam has no moments after the first step: it was skipped.
    output_dir = interrupted_copy(whole, tmp_path / "run", 1, 0, True)
    (output_dir / "run.json").write_text(record)
    assert run(arguments(files, output_dir, skip_nonfinite=1, **SETTINGS)) == 0
    assert skipped(output_dir) == skipped(whole)
    assert (output_dir / "metrics.json").read_bytes() == (whole / "metrics.json").read_bytes()
