"""Replayed rows: which are drawn, what they aim at, and what a step with them is, against METHOD.md's formula."""

import copy

import pytest
import torch
from diffusers import DDIMScheduler

from diffusers_cl import GenerativeDistillation, GenerativeReplay
from diffusers_cl.losses import denoising_losses, training_target
from diffusers_cl.replay import replay_weights


REPLAYS = [GenerativeReplay, GenerativeDistillation]


@pytest.fixture
def stored() -> tuple[torch.Tensor, torch.Tensor]:
    """Forty uint8 images of grey level i, ten of each of the classes 3, 1, 2, 0."""
    images = torch.arange(40, dtype=torch.uint8)[:, None, None, None].expand(40, 1, 8, 8)
    return images, torch.tensor([3, 1, 2, 0]).repeat_interleave(10)


@pytest.fixture
def teacher(tiny_unet):
    """The student's network at other weights."""
    teacher = copy.deepcopy(tiny_unet).requires_grad_(False)
    generator = torch.Generator().manual_seed(1)
    for parameter in teacher.parameters():
        parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return teacher


# What is drawn


@pytest.mark.parametrize("kind", REPLAYS)
def test_rows_are_handed_out_as_they_are_with_their_labels(stored, kind):
    replay = kind()
    assert len(replay) == 0
    replay.update(*stored)
    assert len(replay) == 40
    images, class_labels = replay.sample(torch.empty(100), torch.Generator().manual_seed(0))
    assert images.dtype == torch.uint8 and images.shape == (100, 1, 8, 8)
    assert (images == images[:, :, :1, :1]).all()
    assert torch.equal(class_labels, stored[1][images[:, 0, 0, 0].long()])


def test_sample_is_a_function_of_the_generator(stored):
    replay = GenerativeReplay()
    replay.update(*stored)
    state = torch.get_rng_state()
    first, again, other = (
        replay.sample(torch.empty(30), torch.Generator().manual_seed(seed))[0] for seed in (0, 0, 1)
    )
    assert torch.equal(first, again) and not torch.equal(first, other)
    # A call after another with one generator draws anew.
    generator = torch.Generator().manual_seed(0)
    assert torch.equal(replay.sample(torch.empty(30), generator)[0], first)
    assert not torch.equal(replay.sample(torch.empty(30), generator)[0], first)
    assert torch.equal(torch.get_rng_state(), state)
    # Without one it is the global state that decides: the script seeds it for every step.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        first = replay.sample(torch.empty(30))[0]
        torch.manual_seed(0)
        assert torch.equal(replay.sample(torch.empty(30))[0], first)
        assert not torch.equal(replay.sample(torch.empty(30))[0], first)


def test_sample_is_balanced(stored):
    replay = GenerativeReplay()
    replay.update(*stored)
    images, class_labels = replay.sample(torch.empty(4000), torch.Generator().manual_seed(0))
    # Binomial: 1000 of a class with a standard deviation of 27, 100 of an image with one of 10; five of each.
    assert (class_labels.bincount() - 1000).abs().max() < 5 * 27.4
    assert (images[:, 0, 0, 0].long().bincount() - 100).abs().max() < 5 * 9.9


def test_update_replaces_what_is_replayed(stored, teacher):
    replay = GenerativeDistillation()
    replay.update(*stored)
    replay.update(stored[0][:5] + 100, torch.full((5,), 7), teacher=teacher)
    assert len(replay) == 5 and replay.teacher is teacher
    images, class_labels = replay.sample(torch.empty(20), torch.Generator().manual_seed(0))
    assert images.min() >= 100 and (class_labels == 7).all()


@pytest.mark.parametrize("num_images, num_labels", [(0, 0), (3, 2), (2, 3)])
def test_images_without_labels_are_an_error(num_images, num_labels):
    with pytest.raises(ValueError, match=f"got {num_images} images, {num_labels} labels"):
        GenerativeReplay().update(torch.zeros(num_images, 1, 8, 8), torch.zeros(num_labels, dtype=torch.long))


# What they aim at


def test_distillation_target_is_the_teachers_prediction(stored, teacher, make_batches):
    replay = GenerativeDistillation()
    replay.update(*stored, teacher=teacher)
    ((noisy_images, timesteps, class_labels, noise),) = make_batches([5])
    before = copy.deepcopy(teacher.state_dict())
    target = replay.target(noisy_images, timesteps, class_labels, noise)
    expected = teacher(noisy_images, timesteps, class_labels=class_labels).sample
    assert torch.equal(target, expected)
    assert not torch.equal(target, noise)
    # Not of other timesteps or labels.
    assert not torch.equal(target, teacher(noisy_images, timesteps.flip(0), class_labels=class_labels).sample)
    assert not torch.equal(target, teacher(noisy_images, timesteps, class_labels=class_labels.flip(0)).sample)
    assert all(torch.equal(tensor, before[name]) for name, tensor in teacher.state_dict().items())


def test_no_gradient_reaches_the_teacher(stored, teacher, make_batches):
    replay = GenerativeDistillation()
    replay.update(*stored, teacher=teacher.requires_grad_(True))
    ((noisy_images, timesteps, class_labels, noise),) = make_batches([3])
    target = replay.target(noisy_images.requires_grad_(True), timesteps, class_labels, noise)
    assert not target.requires_grad


def test_plain_replay_leaves_the_target(stored, teacher, make_batches):
    replay = GenerativeReplay()
    replay.update(*stored, teacher=teacher)
    ((noisy_images, timesteps, class_labels, noise),) = make_batches([5])
    before = noise.clone()
    assert replay.target(noisy_images, timesteps, class_labels, noise) is noise
    assert torch.equal(noise, before)


# A step

NUM_NEW, NUM_OLD = 5, 3


@pytest.fixture
def step(stored, teacher, make_batches):
    """
    Returns a function of the kind of replay that gives what the docstring's lines leave: `(noisy_images, timesteps,
    class_labels, noise, target, replay)`, new rows first. Unequally many, so that one mean over all is not two means.
    """

    def build(kind):
        replay = kind()
        replay.update(*stored, teacher=teacher)
        ((images, timesteps, class_labels, noise),) = make_batches([NUM_NEW + NUM_OLD])
        replayed_images, replayed_labels = replay.sample(torch.empty(NUM_OLD), torch.Generator().manual_seed(0))
        clean_images = torch.cat([images[:NUM_NEW].clamp(-1, 1), replayed_images / 127.5 - 1])
        class_labels = torch.cat([class_labels[:NUM_NEW], replayed_labels])
        scheduler = DDIMScheduler()
        noisy_images = scheduler.add_noise(clean_images, noise, timesteps)
        target = training_target(scheduler, clean_images, noise, timesteps).clone()
        old = slice(NUM_NEW, None)
        target[old] = replay.target(noisy_images[old], timesteps[old], class_labels[old], target[old])
        return noisy_images, timesteps, class_labels, noise, target, replay

    return build


def test_exactly_the_replayed_rows_are_distilled(step, teacher):
    noisy_images, timesteps, class_labels, noise, target, _ = step(GenerativeDistillation)
    assert torch.equal(target[:NUM_NEW], noise[:NUM_NEW])
    old = slice(NUM_NEW, None)
    assert torch.equal(target[old], teacher(noisy_images[old], timesteps[old], class_labels=class_labels[old]).sample)
    assert (target[old] != noise[old]).all()
    assert torch.equal(step(GenerativeReplay)[4], noise)


@pytest.mark.parametrize("weighting", ["sum", "by_task"])
@pytest.mark.parametrize("kind", REPLAYS)
def test_one_forward_pass_equals_the_formula_of_two(step, teacher, tiny_unet, kind, weighting):
    noisy_images, timesteps, class_labels, noise, target, replay = step(kind)
    parameters = list(tiny_unet.parameters())

    # The script's lines, in its third task.
    w_new, w_old = replay_weights(weighting, task=2, distillation_weight=0.5)
    losses = denoising_losses(tiny_unet, noisy_images, timesteps, class_labels, target)
    loss = w_new * losses[:NUM_NEW].mean() + w_old * losses[NUM_NEW:].mean()
    gradient = torch.autograd.grad(loss, parameters)

    # METHOD.md, section 2: l_i on the new images, d_i on the replayed ones, each a mean over its own rows.
    new, old = slice(0, NUM_NEW), slice(NUM_NEW, None)
    predicted_new = tiny_unet(noisy_images[new], timesteps[new], class_labels=class_labels[new]).sample
    predicted_old = tiny_unet(noisy_images[old], timesteps[old], class_labels=class_labels[old]).sample
    aim = noise[old]
    if kind is GenerativeDistillation:
        with torch.no_grad():
            aim = teacher(noisy_images[old], timesteps[old], class_labels=class_labels[old]).sample
    denoising = (predicted_new - noise[new]).square().mean(dim=(1, 2, 3)).mean()
    distillation = (predicted_old - aim).square().mean(dim=(1, 2, 3)).mean()
    by_hand = {"sum": denoising + 0.5 * distillation, "by_task": denoising / 3 + 2 * distillation / 3}[weighting]
    expected = torch.autograd.grad(by_hand, parameters)

    # GroupNorm and attention are per image, so one pass over 8 rows is two over 5 and 3: float32 rounding.
    torch.testing.assert_close(loss, by_hand, rtol=1e-5, atol=0)
    difference = sum((a - b).square().sum() for a, b in zip(gradient, expected, strict=True)).sqrt()
    assert difference < 1e-5 * sum(b.square().sum() for b in expected).sqrt()
    # And one mean over the concatenated batch is something else.
    assert abs(losses.mean() - by_hand) > 0.01 * by_hand


def test_weights():
    # arXiv 2509.23593, Eq. 7: both 1, in every task.
    assert [replay_weights("sum", task, 1.0) for task in range(3)] == [(1.0, 1.0)] * 3
    assert replay_weights("sum", 1, 2.5) == (1.0, 2.5)
    # Masip et al., arXiv 2311.14028: 1/k and 1 - 1/k in task k = 1, 2, ...
    for k in (1, 2, 3, 5):
        assert replay_weights("by_task", k - 1, 2.5) == pytest.approx((1 / k, 1 - 1 / k), abs=1e-15)


def test_unknown_weighting_is_an_error():
    with pytest.raises(ValueError, match="replay_weighting 'mean' is not one of sum, by_task"):
        replay_weights("mean", 1, 1.0)
