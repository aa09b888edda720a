"""Checkpoints are there whole or not at all, and change nothing before all of them was checked."""

import contextlib
import json
import resource

import pytest
import torch
from diffusers.training_utils import EMAModel
from safetensors.torch import load_file, save_file

from diffusers_cl.checkpoint import list_checkpoints, load_checkpoint, newest_checkpoint, read_state, save_checkpoint
from diffusers_cl.errors import CheckpointError, StorageError
from diffusers_cl.files import publish_folder, verify_folder


def make_model(seed: int = 0, width: int = 3) -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.Linear(width, 1))


def trained(seed: int = 0, steps: int = 2):
    """Returns a model, its optimizer and its EMA after a few steps."""
    model = make_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    ema_model = EMAModel(model.parameters(), decay=0.5)
    for step in range(steps):
        model(torch.tensor([[1.0, step]])).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        ema_model.step(model.parameters())
    return model, optimizer, ema_model


def tensors_of(model, optimizer, ema_model) -> dict[str, torch.Tensor]:
    tensors = {**model.state_dict(), **{f"ema.{i}": tensor for i, tensor in enumerate(ema_model.shadow_params)}}
    for name, parameter in model.named_parameters():
        tensors |= {f"{name}.{quantity}": value for quantity, value in optimizer.state[parameter].items()}
    return {name: tensor.detach().clone() for name, tensor in tensors.items()}


@contextlib.contextmanager
def full_disk(size: int):
    """Lets no file grow over `size` bytes: writing fails as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_round_trip(tmp_path):
    model, optimizer, ema_model = trained()
    path = save_checkpoint(tmp_path, 7, model, optimizer, {"task": 1, "cursor": [1, 2]}, ema_model)
    assert path == tmp_path / "checkpoint-7"
    state = read_state(path)
    assert (state["task"], state["cursor"], state["step"]) == (1, [1, 2], 7)
    # Nothing in it is a pickle.
    assert {file.suffix for file in path.iterdir()} == {".json", ".safetensors"}
    fresh = make_model(seed=1)
    fresh_optimizer, fresh_ema = torch.optim.AdamW(fresh.parameters(), lr=0.1), EMAModel(fresh.parameters(), decay=0.5)
    load_checkpoint(path, fresh, fresh_optimizer, fresh_ema)
    expected = tensors_of(model, optimizer, ema_model)
    loaded = tensors_of(fresh, fresh_optimizer, fresh_ema)
    assert expected.keys() == loaded.keys() and all(loaded[name].equal(expected[name]) for name in expected)
    assert fresh_ema.optimization_step == ema_model.optimization_step == 2


def test_a_write_that_fails_leaves_the_old_folder(tmp_path):
    publish_folder(tmp_path / "folder", lambda folder: (folder / "a").write_text("old"))

    def fail(folder):
        (folder / "a").write_text("new")
        raise OSError(28, "No space left on device")

    with pytest.raises(StorageError, match=r"folder.*No space left"):
        publish_folder(tmp_path / "folder", fail)
    verify_folder(tmp_path / "folder")
    assert (tmp_path / "folder" / "a").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
    publish_folder(tmp_path / "folder", lambda folder: (folder / "a").write_text("new"))
    assert (tmp_path / "folder" / "a").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_full_disk_is_a_storage_error(tmp_path):
    model, optimizer, _ = trained()
    save_checkpoint(tmp_path, 1, model, optimizer, {"task": 0})
    with full_disk(100), pytest.raises(StorageError, match="checkpoint-2"):
        save_checkpoint(tmp_path, 2, model, optimizer, {"task": 0}, total_limit=1)
    verify_folder(tmp_path / "checkpoint-1")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]


@pytest.mark.parametrize("name", ["model.safetensors", "optimizer.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["truncated", "bit-flip", "missing"])
def test_damage_is_found(tmp_path, name, damage):
    model, optimizer, _ = trained()
    path = save_checkpoint(tmp_path, 1, model, optimizer, {"task": 0})
    verify_folder(path)
    content = bytearray((path / name).read_bytes())
    if damage == "missing":
        (path / name).unlink()
    else:
        content[-1] ^= 1
        (path / name).write_bytes(content if damage == "bit-flip" else content[:-1])
    with pytest.raises(CheckpointError, match=name):
        read_state(path)


@pytest.mark.parametrize("content", [None, "", "{}", "[]", "no json"])
def test_a_manifest_that_cannot_be_read(tmp_path, content):
    publish_folder(tmp_path / "folder", lambda folder: (folder / "a").write_text("a"))
    (tmp_path / "folder" / "manifest.json").unlink()
    if content is not None:
        (tmp_path / "folder" / "manifest.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"manifest\.json"):
        verify_folder(tmp_path / "folder")


def test_newest_checkpoint(tmp_path):
    model, optimizer, _ = trained()
    for step, task in ((9, 0), (10, 1), (100, 1)):
        save_checkpoint(tmp_path, step, model, optimizer, {"task": task})
    (tmp_path / "checkpoint-final").mkdir()
    (tmp_path / ".partial-checkpoint-101").mkdir()
    warnings = []
    # 100 is newer than 9, whatever their names sort like.
    assert newest_checkpoint(tmp_path, 1, warnings.append)[0].name == "checkpoint-100" and not warnings
    (tmp_path / "checkpoint-100" / "model.safetensors").write_bytes(b"")
    path, state = newest_checkpoint(tmp_path, 1, warnings.append)
    assert (path.name, state["step"], len(warnings)) == ("checkpoint-10", 10, 1) and "checkpoint-100" in warnings[0]
    assert newest_checkpoint(tmp_path, 2, warnings.append) is None


def test_total_limit(tmp_path):
    model, optimizer, _ = trained()
    for step in (8, 9, 10, 11):
        save_checkpoint(tmp_path, step, model, optimizer, {"task": 0}, total_limit=2)
        verify_folder(tmp_path / f"checkpoint-{step}")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-11", "checkpoint-10"]


def replace_file(path, name: str, change) -> None:
    tensors = load_file(path / name)
    change(tensors)
    save_file(tensors, path / name)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("model.safetensors", lambda tensors: tensors.pop("0.weight")),
        ("model.safetensors", lambda tensors: tensors.update({"1.bias": torch.zeros(2)})),
        ("optimizer.safetensors", lambda tensors: tensors.update({"exp_avg.5.weight": torch.zeros(2)})),
        ("optimizer.safetensors", lambda tensors: tensors.update({"exp_avg.1.bias": torch.zeros(2)})),
        ("ema.safetensors", lambda tensors: tensors.pop("0.weight")),
        ("ema.safetensors", lambda tensors: tensors.update({"1.bias": torch.zeros(2)})),
    ],
    ids=["no-weight", "weight-shape", "moment-name", "moment-shape", "no-ema", "ema-shape"],
)
def test_a_checkpoint_that_does_not_fit_changes_nothing(tmp_path, name, change):
    path = save_checkpoint(tmp_path, 1, *trained()[:2], {"task": 0}, trained()[2])
    replace_file(path, name, change)
    live = trained(seed=1, steps=1)
    before = tensors_of(*live)
    with pytest.raises(CheckpointError, match="checkpoint-1"):
        load_checkpoint(path, *live)
    after = tensors_of(*live)
    assert before.keys() == after.keys() and all(after[key].equal(before[key]) for key in before)


def test_a_checkpoint_without_the_ema(tmp_path):
    model, optimizer, ema_model = trained()
    path = save_checkpoint(tmp_path, 1, model, optimizer, {"task": 0})
    assert json.loads((path / "state.json").read_text())["ema_step"] is None
    with pytest.raises(CheckpointError, match=r"ema\.safetensors"):
        load_checkpoint(path, model, optimizer, ema_model)
