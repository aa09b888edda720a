"""New classes in a network and its penalty: old rows stay, and growing is the same as having had room."""

import copy
import json

import pytest
import torch
from estimate_helpers import PENALTIES
from pipeline_helpers import noise, tiny_unet
from safetensors.torch import save_file

from diffusers_cl import Rank1EWC
from diffusers_cl.config import TrainingConfig
from diffusers_cl.errors import CheckpointError, ConfigError
from diffusers_cl.growth import EMBEDDING, load_weights, pad_penalty, restore_penalty
from diffusers_cl.losses import denoising_losses
from diffusers_cl.models import create_unet


OLD, NEW = {"cat": 0, "dog": 1}, {"cat": 0, "dog": 1, "bird": 2, "7": 3}


@pytest.fixture(scope="module")
def architecture():
    return dict(tiny_unet().config)


def network(architecture, class_ids, **kwargs):
    config = TrainingConfig(dataset_name="digits", classes_per_task=2, resolution=8, **kwargs)
    return create_unet(architecture, 1, class_ids, config)


def batches(num_classes: int) -> list[tuple[torch.Tensor, ...]]:
    generator = torch.Generator().manual_seed(1)
    images, target = torch.randn(2, 6, 1, 8, 8, generator=generator)
    return [(images, torch.arange(6) * 100, torch.arange(6) % num_classes, target)]


def losses(model, batch):
    return denoising_losses(model, *batch)


def trained(unet):
    """The network after some steps on the old classes alone."""
    optimizer = torch.optim.Adam(unet.parameters(), lr=1e-2)
    for _ in range(3):
        losses(unet, batches(2)[0]).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return unet


@pytest.fixture
def task(architecture, tmp_path):
    """A network that knows the old classes, and its folder."""
    unet = trained(network(architecture, OLD))
    unet.save_pretrained(tmp_path / "unet")
    return unet, tmp_path


def test_old_rows_are_kept_to_the_bit_and_old_classes_drawn_as_before(architecture, task):
    old, folder = task
    grown = network(architecture, NEW)
    fresh = grown.state_dict()[EMBEDDING].clone()
    load_weights(grown, folder, list(OLD.values()))
    for name, tensor in grown.state_dict().items():
        if name != EMBEDDING:
            assert torch.equal(tensor, old.state_dict()[name])
    rows = grown.state_dict()[EMBEDDING]
    assert torch.equal(rows[:2], old.state_dict()[EMBEDDING]) and torch.equal(rows[2:], fresh[2:])
    assert grown.config.num_class_embeds == 4
    labels, timesteps = torch.tensor([0, 1, 1, 0]), torch.tensor([0, 10, 500, 999])
    with torch.no_grad():
        before, after = (m(noise(), timesteps, class_labels=labels).sample for m in (old, grown))
    assert torch.equal(before, after)


@pytest.mark.parametrize("kind", PENALTIES)
def test_growth_is_as_good_as_room_from_the_start(architecture, task, kind, tmp_path):
    # One network has two rows and gains two, the other had four; both learn the same.
    small, folder = task
    roomy = trained(network(architecture, OLD, num_class_embeds=4))
    assert not roomy.state_dict()[EMBEDDING][2:].any()
    results = []
    for unet, name in ((small, "small"), (roomy, "roomy")):
        penalty = kind(15.0)
        penalty.consolidate(unet, losses, batches(2))
        saved = tmp_path / name
        unet.save_pretrained(saved / "unet")
        penalty.save_pretrained(saved)
        grown = network(architecture, NEW, num_class_embeds=4)
        load_weights(grown, saved, list(OLD.values()))
        restored = kind(15.0)
        assert restore_penalty(restored, saved, grown)
        optimizer = torch.optim.Adam(grown.parameters(), lr=1e-3)
        for _ in range(3):
            (losses(grown, batches(4)[0]).mean() + restored(grown)).backward()
            optimizer.step()
            optimizer.zero_grad()
        restored.consolidate(grown, losses, batches(4))
        results.append((grown.state_dict(), restored.state_dict()))
    for first, second in zip(*results, strict=True):
        assert first.keys() == second.keys()
        for name in first:
            torch.testing.assert_close(first[name], second[name], rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("kind", PENALTIES)
def test_a_grown_penalty_leaves_new_rows_free(architecture, task, kind):
    unet, folder = task
    penalty = kind(15.0)
    penalty.consolidate(unet, losses, batches(2))
    grown = network(architecture, NEW)
    load_weights(grown, folder, list(OLD.values()))
    with pytest.raises(ValueError, match=EMBEDDING):
        penalty(grown)
    pad_penalty(penalty, grown)
    with torch.no_grad():
        grown.class_embedding.weight[2:] += 1
    assert penalty(grown).item() == pytest.approx(0, abs=1e-10)
    before = copy.deepcopy(grown.state_dict())
    with torch.no_grad():
        grown.class_embedding.weight[0] += 1
    assert penalty(grown).item() > 0
    grown.load_state_dict(before)
    penalty.step(grown, 0.1)
    assert torch.equal(grown.class_embedding.weight[2:], before[EMBEDDING][2:])


def test_weights_that_do_not_fit_are_one_sentence(architecture, task, tmp_path):
    _, folder = task
    other = network({**architecture, "block_out_channels": (8, 8)}, NEW)
    with pytest.raises(CheckpointError, match="does not fit the network of unet/config.json"):
        load_weights(other, folder, [0, 1])
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="does not fit"):
        load_weights(network(architecture, NEW), folder)


def test_a_penalty_that_does_not_fit_is_one_sentence(architecture, task, tmp_path):
    unet, _ = task
    assert not restore_penalty(Rank1EWC(15.0), tmp_path / "nothing", unet)
    diagonal = PENALTIES[0](15.0)
    diagonal.consolidate(unet, losses, batches(2))
    diagonal.save_pretrained(tmp_path / "diagonal")
    with pytest.raises(ConfigError, match="penalty: .* holds penalty 'ewc', not 'rank1_ewc'; allowed: that, or none"):
        restore_penalty(Rank1EWC(15.0), tmp_path / "diagonal", unet)
    # Its own strength, not the file's.
    other = PENALTIES[0](3.0)
    assert restore_penalty(other, tmp_path / "diagonal", unet) and other.ewc_lambda == 3.0
    path = tmp_path / "diagonal" / "ewc.safetensors"
    state = {name: t for name, t in diagonal.state_dict().items() if "conv_in" not in name}
    save_file(state, path, {"penalty": json.dumps({"kind": "ewc", "ewc_lambda": 15.0})})
    with pytest.raises(CheckpointError, match="does not fit the model.*conv_in"):
        restore_penalty(PENALTIES[0](15.0), tmp_path / "diagonal", unet)
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(CheckpointError, match="cannot be read"):
        restore_penalty(PENALTIES[0](15.0), tmp_path / "diagonal", unet)
