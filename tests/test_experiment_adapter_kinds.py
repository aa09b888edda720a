"""scripts/experiments/adapter_kinds.py: every kind of adapter against its formula, and old classes as they were."""

import importlib.util
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DModel
from script_helpers import ROOT

from diffusers_cl.config import TrainingConfig
from diffusers_cl.errors import ConfigError
from diffusers_cl.filters import EMBEDDING


SPEC = importlib.util.spec_from_file_location("kinds", ROOT / "scripts" / "experiments" / "adapter_kinds.py")
kinds = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(kinds)
CONFIG = TrainingConfig(adapter="funlora", adapter_layers=["mid_block.*", "up_blocks.*", "conv_in"])


def inputs(*class_ids: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(1)
    noisy = torch.randn(len(class_ids), 1, 8, 8, generator=draws)
    return noisy, torch.randint(1000, (len(class_ids),), generator=draws), torch.tensor(class_ids)


def trained(kind: str, unet, class_ids=(2, 3)):
    """Adapters of two classes, with numbers in the place of training."""
    adapters = kinds.create_adapters(kind, unet, [0, 1], CONFIG)
    for class_id in class_ids:
        adapters.add_class(class_id, unet, seed=class_id)
    adapters.train_only(class_ids)
    draws = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapters.classes.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draws)
    return adapters


def with_hooks(unet, names, hook, batch) -> torch.Tensor:
    """What the network predicts with the mean of the first classes' rows, every named layer's output changed."""
    noisy, timesteps, class_labels = batch
    handles = [
        unet.get_submodule(name).register_forward_hook(
            lambda module, arguments, output, i=i: hook(i, module, arguments[0], output)
        )
        for i, name in enumerate(names)
    ]
    mean = getattr(unet, EMBEDDING).weight[:2].mean(dim=0)
    embedding = getattr(unet, EMBEDDING).register_forward_hook(lambda *_: mean.expand(len(class_labels), -1))
    try:
        return unet(noisy, timesteps, class_labels=class_labels).sample
    finally:
        for handle in (*handles, embedding):
            handle.remove()


@torch.no_grad()
def test_scale_and_shift_of_every_feature_map(tiny_unet):
    adapters, batch = trained("scale_shift", tiny_unet), inputs(3, 3, 3)
    tensors = list(adapters.classes["3"])

    def hook(i, module, arguments, output):
        return tensors[2 * i][:, None, None] * output + tensors[2 * i + 1][:, None, None]

    expected = with_hooks(tiny_unet, adapters.layers, hook, batch)
    assert len(tensors) == 2 * len(adapters.layers) > 10 and "conv_in" in adapters.layers
    # The same sums in another order, in float32.
    torch.testing.assert_close(adapters(tiny_unet, *batch).sample, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_lora_with_the_kernel_in_the_bottleneck(tiny_unet):
    adapters, batch = trained("lora_conv_v1", tiny_unet), inputs(2, 2)
    tensors = list(adapters.classes["2"])

    def hook(i, module, arguments, output):
        A, B = tensors[2 * i : 2 * i + 2]
        (out, into, k, _), flat = module.weight.shape, []
        for row in range(out * k):
            for column in range(into * k):
                flat.append(sum(B[row, rank] * A[rank, column] for rank in range(k)))
        added = torch.stack(flat).reshape(out, into, k, k)
        return output + F.conv2d(arguments, added, None, module.stride, module.padding)

    # One small layer by hand, element by element; the others have the same formula.
    adapters.layers, tensors = ["conv_in"], tensors[2 * adapters.layers.index("conv_in") :][:2]
    adapters.classes["2"] = torch.nn.ParameterList(tensors)
    assert [tuple(tensor.shape) for tensor in tensors] == [(3, 3), (24, 3)]
    expected = with_hooks(tiny_unet, adapters.layers, hook, batch)
    torch.testing.assert_close(adapters(tiny_unet, *batch).sample, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_lora_of_peft(tiny_unet):
    adapters, batch = trained("lora_conv_v2", tiny_unet), inputs(2, 2)
    tensors = list(adapters.classes["2"])
    layers = [tiny_unet.get_submodule(name) for name in adapters.layers]
    bases = [f"{name}.base_layer" for name in adapters.layers]

    def hook(i, module, arguments, output):
        A, B = tensors[2 * i : 2 * i + 2]
        assert A.shape == (1, *module.weight.shape[1:]) and B.shape == (module.out_channels, 1, 1, 1)
        return output + F.conv2d(F.conv2d(arguments, A, None, module.stride, module.padding), B)

    found = adapters(tiny_unet, *batch).sample
    assert all(layer.disable_adapters for layer in layers)
    torch.testing.assert_close(found, with_hooks(tiny_unet, bases, hook, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_a_new_class_starts_at_the_frozen_network(tiny_unet, kind):
    batch = inputs(3, 3)
    expected = with_hooks(tiny_unet, [], None, batch)
    adapters = kinds.create_adapters(kind, tiny_unet, [0, 1], CONFIG)
    adapters.add_class(3, tiny_unet, seed=0)
    assert torch.equal(adapters(tiny_unet, *batch).sample, expected)


def test_parameters_per_class(tiny_unet):
    convolutions = {
        name: module.weight.shape
        for name, module in tiny_unet.named_modules()
        if isinstance(module, torch.nn.Conv2d) and name.startswith(("mid_block", "up_blocks", "conv_in"))
    }
    linear = [weight.shape for name, weight in tiny_unet.named_parameters() if ".to_" in name and weight.dim() == 2]
    # One block in the second resolution, and one in the middle; four layers of 16 x 16 each.
    assert linear == [torch.Size([16, 16])] * 8
    counts = {
        "scale_shift": sum(2 * out for out, *_ in convolutions.values()),
        "lora_attention": 2 * (16 + 16) * 8,
        "lora_conv_v1": sum(k * k * (into + out) for out, into, k, _ in convolutions.values()),
        "lora_conv_v2": sum(k * k * into + out for out, into, k, _ in convolutions.values()),
        "vanilla_conditioning": 32,
    }
    for kind, count in counts.items():
        unet = UNet2DModel.from_config(tiny_unet.config)
        adapters = trained(kind, unet)
        assert adapters.parameters_per_class == count, kind
        in_training = [p for p in torch.nn.ModuleList([unet, adapters]).parameters() if p.requires_grad]
        assert sum(parameter.numel() for parameter in in_training) == 2 * count
        unet = UNet2DModel.from_config(tiny_unet.config)
        with_row = kinds.create_adapters(kind, unet, [0, 1], replace(CONFIG, train_class_embedding=True))
        with_row.add_class(4, unet, seed=0)
        assert with_row.parameters_per_class == count + 32 * (kind != "vanilla_conditioning")


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_every_class_of_a_batch_has_its_own_gradient(tiny_unet, kind):
    adapters = trained(kind, tiny_unet, (2, 3, 4))
    adapters.train_only([2, 3])
    noisy, timesteps, class_labels = batch = inputs(3, 0, 2, 4, 3)
    output = adapters(tiny_unet, *batch).sample
    weights = torch.arange(1.0, 6.0)
    (output.flatten(1).mean(dim=1) * weights).sum().backward()
    parameters = [*adapters.rows.items(), *adapters.classes.named_parameters()]
    found = {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}
    assert {name.split(".")[0] for name in found} == {"2", "3"}
    adapters.zero_grad()
    for row in range(5):
        alone = adapters(tiny_unet, *(part[row : row + 1] for part in batch)).sample
        # A batch of another size may sum in another order.
        torch.testing.assert_close(alone, output[row : row + 1], rtol=1e-4, atol=1e-5)
        if class_labels[row] in (2, 3):
            (alone.mean() * weights[row]).backward()
    for name, parameter in parameters:
        if name in found:
            torch.testing.assert_close(parameter.grad, found[name], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_old_classes_stay_bit_by_bit(tiny_unet):
    old, mixed = inputs(0, 1, 1), inputs(0, 1, 1, 3, 2)
    old = tuple(part[:3] for part in mixed)
    before = tiny_unet(old[0], old[1], class_labels=old[2]).sample
    adapters = trained("lora_conv_v2", tiny_unet)
    assert torch.equal(adapters(tiny_unet, *old).sample, before)
    assert torch.equal(adapters(tiny_unet, *mixed).sample[:3], before)
    second = adapters(tiny_unet, *inputs(2, 2)).sample
    adapters.add_class(4, tiny_unet, seed=4)
    assert torch.equal(adapters(tiny_unet, *inputs(2, 2)).sample, second)
    assert torch.equal(tiny_unet(old[0], old[1], class_labels=old[2]).sample, before)


def test_attention_is_needed_for_its_adapters(tiny_unet):
    config = {key: value for key, value in tiny_unet.config.items() if key != "_use_default_values"}
    config |= {"down_block_types": ["DownBlock2D"] * 2, "add_attention": False}
    with pytest.raises(ConfigError, match="lora_attention: the network of the run has no attention blocks"):
        kinds.create_adapters("lora_attention", UNet2DModel.from_config(config), [0, 1], CONFIG)
