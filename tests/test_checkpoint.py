"""Checkpoints are there whole or not at all, and change nothing before all of them was checked."""

import json

import pytest
import torch
import torture_storage
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file
from torture_storage import STATE, full_disk, make_model, same, tensors_of, trained

from diffusers_cl.checkpoint import (
    check_finite,
    list_checkpoints,
    load_checkpoint,
    newest_checkpoint,
    read_state,
    save_checkpoint,
)
from diffusers_cl.errors import CheckpointError, NonFiniteError, StorageError
from diffusers_cl.files import file_sha256, verify_folder


def test_round_trip(tmp_path):
    model, optimizer, ema_model = trained()
    path = save_checkpoint(tmp_path, 7, model, optimizer, {**STATE, "task": 1, "cursor": [1, 2]}, ema_model)
    assert path == tmp_path / "checkpoint-7"
    state = read_state(path)
    assert (state["task"], state["cursor"], state["step"]) == (1, [1, 2], 7)
    # Nothing in it is a pickle.
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}
    fresh = make_model(seed=1)
    fresh_optimizer, fresh_ema = torch.optim.AdamW(fresh.parameters(), lr=0.1), EMAModel(fresh.parameters(), decay=0.5)
    load_checkpoint(path, fresh, fresh_optimizer, fresh_ema)
    expected = tensors_of(model, optimizer, ema_model)
    assert same(expected, tensors_of(fresh, fresh_optimizer, fresh_ema))
    assert fresh_ema.optimization_step == ema_model.optimization_step == 2


def test_a_full_disk_is_a_storage_error(tmp_path):
    model, optimizer, _ = trained()
    save_checkpoint(tmp_path, 1, model, optimizer, STATE)
    with full_disk(100), pytest.raises(StorageError, match="checkpoint-2"):
        save_checkpoint(tmp_path, 2, model, optimizer, STATE, total_limit=1)
    verify_folder(tmp_path / "checkpoint-1")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "bit-flip", "missing"])
def test_damage_is_found(tmp_path, name, damage):
    model, optimizer, _ = trained()
    path = save_checkpoint(tmp_path, 1, model, optimizer, STATE)
    verify_folder(path)
    content = bytearray((path / name).read_bytes())
    if damage == "missing":
        (path / name).unlink()
    else:
        content[-1] ^= 1
        (path / name).write_bytes(content if damage == "bit-flip" else content[:-1])
    with pytest.raises(CheckpointError, match=name):
        read_state(path)


def test_a_disk_that_is_full_anywhere_in_a_save(tmp_path):
    assert torture_storage.disk_full(tmp_path, 10) == {"tried": 10, "previous_valid": 10, "missed": []}


def test_newest_checkpoint(tmp_path):
    model, optimizer, _ = trained()
    for step, task in ((9, 0), (10, 1), (100, 1)):
        save_checkpoint(tmp_path, step, model, optimizer, {**STATE, "task": task})
    for name in ("checkpoint-final", "checkpoint-\u00b2", "checkpoint-0101", ".partial-checkpoint-101"):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-102").write_text("a file")
    warnings = []
    # 100 is newer than 9, whatever their names sort like.
    assert newest_checkpoint(tmp_path, 1, warnings.append)[0].name == "checkpoint-100" and not warnings
    (tmp_path / "checkpoint-100" / "model.safetensors").write_bytes(b"")
    path, state = newest_checkpoint(tmp_path, 1, warnings.append)
    assert (path.name, state["step"], len(warnings)) == ("checkpoint-10", 10, 1) and "checkpoint-100" in warnings[0]
    assert newest_checkpoint(tmp_path, 0, warnings.append)[0].name == "checkpoint-9"
    # Behind one of an earlier task there are no more.
    (tmp_path / "checkpoint-9" / "model.safetensors").write_bytes(b"")
    warnings.clear()
    assert newest_checkpoint(tmp_path, 2, warnings.append) is None and len(warnings) == 1


@pytest.mark.parametrize(
    ("there", "published", "limit", "kept"),
    [
        ([8, 9, 10], 11, 2, [11, 10]),
        ([8, 9, 10], 11, 1, [11, 10]),
        ([8, 9, 10], 11, 3, [11, 10, 9]),
        ([8, 9, 10], 11, None, [11, 10, 9, 8]),
        ([9, 10], 10, 2, [10, 9]),
        # Gone back: what was later is given up first, and never what was published just now.
        ([9, 10], 4, 2, [9, 4]),
        ([3, 9, 10], 4, 2, [4, 3]),
        ([2, 3, 9, 10], 4, 4, [9, 4, 3, 2]),
    ],
)
def test_total_limit(tmp_path, there, published, limit, kept):
    model, optimizer, _ = trained()
    for step in there:
        save_checkpoint(tmp_path, step, model, optimizer, STATE)
    save_checkpoint(tmp_path, published, model, optimizer, STATE, total_limit=limit)
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in kept]
    assert len(list(tmp_path.iterdir())) == len(kept)
    for path in list_checkpoints(tmp_path):
        read_state(path)


def poison(tensor: torch.Tensor, value: float) -> None:
    with torch.no_grad():
        tensor.view(-1)[-1] = value


@pytest.mark.parametrize(
    ("name", "value", "change"),
    [
        ("1.bias in the weights", float("nan"), lambda m, o, e, v: poison(m[1].bias, v)),
        (
            "exp_avg_sq.0.weight in the Adam",
            float("inf"),
            lambda m, o, e, v: poison(o.state[m[0].weight]["exp_avg_sq"], v),
        ),
        ("step.0.bias in the Adam", float("nan"), lambda m, o, e, v: poison(o.state[m[0].bias]["step"], v)),
        ("0.weight in the EMA", -float("inf"), lambda m, o, e, v: poison(e.shadow_params[0], v)),
    ],
)
def test_what_is_not_finite_is_not_saved(tmp_path, name, value, change):
    model, optimizer, ema_model = trained()
    check_finite(model, optimizer, ema_model)
    save_checkpoint(tmp_path, 1, model, optimizer, STATE, ema_model)
    change(model, optimizer, ema_model, value)
    for call in (
        lambda: check_finite(model, optimizer, ema_model),
        lambda: save_checkpoint(tmp_path, 2, model, optimizer, STATE, ema_model, total_limit=1),
    ):
        with pytest.raises(NonFiniteError, match=f"{name}.* is not finite"):
            call()
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    read_state(tmp_path / "checkpoint-1")


def test_extremes_that_are_finite(tmp_path):
    model, optimizer, _ = trained()
    # Their difference is not.
    with torch.no_grad():
        model[0].bias.copy_(torch.tensor([3e38, -3e38, 0.0]))
    model.register_buffer("none", torch.zeros(0))
    model.register_buffer("count", torch.tensor(3))
    check_finite(model, optimizer)


def rewrite(path, name: str, change) -> None:
    """Changes the content of a file of a checkpoint, and its manifest with it."""
    if name.endswith(".json"):
        content = json.loads((path / name).read_text())
        change(content)
        (path / name).write_text(json.dumps(content))
    else:
        tensors = load_file(path / name)
        change(tensors)
        save_file(tensors, path / name)
    sums = json.loads((path / "manifest.json").read_text())["sha256"]
    (path / "manifest.json").write_text(json.dumps({"sha256": {**sums, name: file_sha256(path / name)}}))


MODEL, OPTIMIZER, EMA = "model.safetensors", "optimizer.safetensors", "ema.safetensors"
UNFIT = {
    "no weight": (MODEL, lambda tensors: tensors.pop("0.weight"), "lacks 0.weight"),
    "a weight more": (MODEL, lambda tensors: tensors.update({"2.bias": torch.zeros(1)}), "has 2.bias"),
    "weight shape": (MODEL, lambda tensors: tensors.update({"1.bias": torch.zeros(2)}), r"1.bias is .*\(2,\)"),
    "weight type": (
        MODEL,
        lambda tensors: tensors.update({"1.bias": torch.zeros(1).double()}),
        "1.bias is torch.float64",
    ),
    "weight NaN": (MODEL, lambda tensors: poison(tensors["0.bias"], float("nan")), "0.bias is not finite"),
    "moment name": (
        OPTIMIZER,
        lambda tensors: tensors.update({"exp_avg.5.weight": torch.zeros(2)}),
        "has exp_avg.5.weight",
    ),
    "moment shape": (
        OPTIMIZER,
        lambda tensors: tensors.update({"exp_avg.1.bias": torch.zeros(2)}),
        r"exp_avg.1.bias is",
    ),
    "moment type": (
        OPTIMIZER,
        lambda tensors: tensors.update({"step.1.bias": torch.tensor(1)}),
        "step.1.bias is torch.int",
    ),
    "moment infinite": (
        OPTIMIZER,
        lambda tensors: poison(tensors["exp_avg_sq.1.bias"], float("inf")),
        "is not finite",
    ),
    "no moment": (OPTIMIZER, lambda tensors: tensors.pop("exp_avg_sq.0.bias"), "lacks exp_avg_sq.0.bias"),
    "no step": (OPTIMIZER, lambda tensors: tensors.pop("step.0.bias"), "lacks step.0.bias"),
    "no EMA": (EMA, lambda tensors: tensors.pop("0.weight"), "lacks 0.weight"),
    "EMA shape": (EMA, lambda tensors: tensors.update({"1.bias": torch.zeros(2)}), "1.bias is"),
    "EMA NaN": (EMA, lambda tensors: poison(tensors["1.bias"], float("nan")), "1.bias is not finite"),
}


@pytest.mark.parametrize(("name", "change", "words"), UNFIT.values(), ids=UNFIT)
def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path, name, change, words):
    path = save_checkpoint(tmp_path, 1, *trained()[:2], STATE, trained()[2])
    rewrite(path, name, change)
    live = trained(seed=1, steps=1)
    before = tensors_of(*live)
    with pytest.raises(CheckpointError, match=f"checkpoint-1/{name}.*{words}"):
        load_checkpoint(path, *live)
    assert same(before, tensors_of(*live))


def test_no_moments_yet(tmp_path):
    # The gradient scaler of fp16 skips the first steps.
    path = save_checkpoint(tmp_path, 1, *trained(steps=0)[:2], {**STATE, "scaler": {"scale": 65536.0}})
    model, optimizer, _ = trained(seed=1, steps=0)
    load_checkpoint(path, model, optimizer)
    assert not optimizer.state and model[0].weight.equal(make_model()[0].weight)


def test_a_checkpoint_without_the_ema(tmp_path):
    model, optimizer, ema_model = trained()
    path = save_checkpoint(tmp_path, 1, model, optimizer, STATE)
    assert json.loads((path / "state.json").read_text())["ema_step"] is None
    with pytest.raises(CheckpointError, match=r"has no ema\.safetensors, and the run keeps an EMA"):
        load_checkpoint(path, model, optimizer, ema_model)
    path = save_checkpoint(tmp_path, 2, model, optimizer, STATE, ema_model)
    with pytest.raises(CheckpointError, match=r"has an ema\.safetensors, and the run keeps no EMA"):
        load_checkpoint(path, model, optimizer)


def test_what_was_loaded_outlives_its_file(tmp_path):
    path = save_checkpoint(tmp_path, 1, *trained(width=2000)[:2], STATE, trained(width=2000)[2])
    live = trained(seed=1, width=2000)
    load_checkpoint(path, *live)
    for file in path.iterdir():
        # What is still mapped would change with it.
        file.write_bytes(bytes(file.stat().st_size))
    assert same(tensors_of(*live), tensors_of(*trained(width=2000)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda state: state.pop("lr_scheduler"), "has no 'lr_scheduler'"),
        (lambda state: state.update(task="0"), "task is '0'; allowed: int"),
        (lambda state: state.update(task=True), "task is True; allowed: int"),
        (lambda state: state.update(task=-1), "task is -1; allowed: numbers from 0"),
        (lambda state: state.update(scaler=[]), r"scaler is \[\]; allowed: dict \| None"),
        (lambda state: state.update(step=2), "checkpoint-1 is the checkpoint of step 2"),
    ],
)
def test_a_state_that_no_run_writes(tmp_path, change, words):
    path = save_checkpoint(tmp_path, 1, *trained()[:2], STATE)
    rewrite(path, "state.json", change)
    with pytest.raises(CheckpointError, match=words):
        read_state(path)


def test_a_checkpoint_by_a_link(tmp_path):
    path = save_checkpoint(tmp_path, 1, *trained()[:2], STATE)
    (tmp_path / "latest").symlink_to(path)
    assert read_state(tmp_path / "latest")["step"] == 1
    with pytest.raises(CheckpointError, match="checkpoint-9 is not there"):
        read_state(tmp_path / "checkpoint-9")
