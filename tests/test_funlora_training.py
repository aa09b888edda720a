"""FunLoRA on batches and in training: rows by class, and no parameter touched but those of the class."""

import pytest
import torch
from diffusers import DDIMScheduler
from diffusers.training_utils import EMAModel
from funlora_helpers import adapted, move, predict, rows

from diffusers_cl.filters import FUNCTIONS, find_layers, group_rows
from diffusers_cl.funlora import FunLoRA
from diffusers_cl.pipeline import ClassConditionalPipeline


def test_one_convolution_for_every_class_in_the_batch(tiny_unet, monkeypatch):
    calls = []
    plain = torch.nn.Conv2d._conv_forward

    def counted(self, rows, weight, bias):
        calls.append(len(rows))
        return plain(self, rows, weight, bias)

    images, timesteps, class_labels = rows()
    adapters = adapted(tiny_unet)
    all_layers = len(find_layers(tiny_unet, ["*"]))
    predict(adapters, tiny_unet, images, timesteps, class_labels)
    monkeypatch.setattr(torch.nn.Conv2d, "_conv_forward", counted)
    predict(adapters, tiny_unet, images, timesteps, class_labels)
    num_adapted = len(adapters.config.layers)
    # Classes 2 and 3, and the others together; all rows once.
    assert len(calls) == all_layers + 2 * num_adapted
    assert sum(calls) == 7 * all_layers
    assert group_rows([3, 0, 2, 1, 3], [2, 3]) == ([1, 3, 2, 0, 4], [(None, 2), (2, 1), (3, 2)])
    assert group_rows([0, 2, 2], [2, 3]) == (None, [(None, 1), (2, 2)])


@pytest.mark.parametrize("function", FUNCTIONS)
def test_old_classes_stay_as_they_were_bit_by_bit(tiny_unet, function):
    images, timesteps, class_labels = rows()
    first, second = class_labels < 2, class_labels == 2
    with torch.no_grad():
        before = tiny_unet(images[first], timesteps[first], class_labels=class_labels[first]).sample
    adapters = adapted(tiny_unet, function, classes=[2])
    train(adapters, tiny_unet, images, timesteps, class_labels, [2])
    between = predict(adapters, tiny_unet, images[second], timesteps[second], class_labels[second])
    adapters.add_class(3, tiny_unet)
    train(adapters, tiny_unet, images, timesteps, class_labels, [3])
    after = [predict(adapters, tiny_unet, images[p], timesteps[p], class_labels[p]) for p in (first, second)]
    assert torch.equal(after[0], before) and torch.equal(after[1], between)


def train(adapters, unet, images, timesteps, class_labels, class_ids) -> list[str]:
    """A few steps on these classes; returns the names of the parameters that changed, of network and adapters."""
    adapters.train_only(class_ids)
    modules = torch.nn.ModuleList([unet, adapters])
    before = {name: parameter.clone() for name, parameter in modules.named_parameters()}
    part = torch.isin(class_labels, torch.tensor(class_ids))
    optimizer = torch.optim.AdamW(modules.parameters(), lr=0.01, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        adapters(unet, images[part], timesteps[part], class_labels[part]).sample.square().mean().backward()
        optimizer.step()
    return [name for name, parameter in modules.named_parameters() if not torch.equal(parameter, before[name])]


@pytest.mark.parametrize("train_class_embedding", [False, True])
def test_only_the_new_classes_train(tiny_unet, train_class_embedding):
    adapters = adapted(tiny_unet, train_class_embedding=train_class_embedding)
    changed = train(adapters, tiny_unet, *rows(), [3])
    assert {name.split(".")[2] for name in changed} == {"3"}
    assert ("1.classes.3.class_embedding" in changed) == train_class_embedding
    assert sum(p.numel() for p in adapters.parameters() if p.requires_grad) == adapters.parameters_per_class


def test_a_class_that_is_not_in_the_batch_has_a_gradient_of_zero(tiny_unet):
    images, timesteps, class_labels = rows()
    adapters = adapted(tiny_unet, train_class_embedding=True)
    adapters.train_only([2, 3])
    part = class_labels == 3
    adapters(tiny_unet, images[part], timesteps[part], class_labels[part]).sample.square().mean().backward()
    for class_id, is_zero in ((2, True), (3, False)):
        gradients = [parameter.grad for parameter in adapters.classes[str(class_id)].parameters()]
        assert all(gradient is not None and (gradient == 0).all() == is_zero for gradient in gradients)


def test_factors_are_computed_once_for_all_steps_of_a_sample(tiny_unet, monkeypatch):
    calls = []
    plain = FunLoRA._factors
    monkeypatch.setattr(FunLoRA, "_factors", lambda *args: calls.append(args[1:]) or plain(*args))
    adapters = adapted(tiny_unet)
    pipeline = ClassConditionalPipeline(tiny_unet, DDIMScheduler(), {i: str(i) for i in range(4)}, adapters)
    noise = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def sample() -> torch.Tensor:
        return pipeline([2, 3, 0], 5, latents=noise, output_type="latent").images

    first = sample()
    assert len(calls) == len(adapters.config.layers)
    # Whatever changes parameters, the next sample has them: a fused optimizer and EMA leave no trace on a tensor.
    adapters.train_only([2, 3])
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=0.01, fused=True)
    adapters(tiny_unet, *rows()).sample.square().mean().backward()
    optimizer.step()
    second = sample()
    assert not torch.equal(first[:2], second[:2]) and torch.equal(first[2], second[2])
    ema = EMAModel(adapters.parameters())
    move(adapters, 2, 3)
    ema.copy_to(adapters.parameters())
    assert torch.equal(sample(), second)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_precision_is_the_networks_and_factors_are_exact(tiny_unet, function):
    images, timesteps, class_labels = rows()
    adapters = adapted(tiny_unet, function)
    move(adapters, 2, 3)
    name = next(iter(adapters.config.layers))
    expected = adapters._factors(name, [2, 3])
    with torch.autocast("cpu", torch.bfloat16):
        found = adapters._factors(name, [2, 3])
        assert all(map(torch.equal, found, expected))
        assert adapters(tiny_unet, images, timesteps, class_labels).sample.isfinite().all()
    half = tiny_unet.to(torch.bfloat16)
    assert predict(adapters, half, images.bfloat16(), timesteps, class_labels).dtype is torch.bfloat16


def test_a_batch_without_any_class_in_training_has_a_gradient_too(tiny_unet):
    images, timesteps, class_labels = rows()
    adapters = adapted(tiny_unet)
    adapters.train_only([2])
    first = class_labels < 2
    output = adapters(tiny_unet, images[first], timesteps[first], class_labels[first]).sample
    with torch.no_grad():
        plain = tiny_unet(images[first], timesteps[first], class_labels=class_labels[first]).sample
    assert torch.equal(output, plain)
    output.mean().backward()
    assert all((p.grad == 0).all() for p in adapters.parameters() if p.requires_grad)
