"""The denoising loss and what it aims at, against the formulas written out."""

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler

from diffusers_cl.losses import denoising_losses, training_target


def test_losses_are_the_mean_squared_error_of_every_row(tiny_unet, make_batches):
    (batch,) = make_batches([5])
    losses = denoising_losses(tiny_unet, *batch)
    assert losses.shape == (5,) and losses.dtype == torch.float32
    noisy_images, timesteps, class_labels, target = batch
    for row in range(5):
        one = slice(row, row + 1)
        prediction = tiny_unet(noisy_images[one], timesteps[one], class_labels=class_labels[one]).sample
        expected = (prediction - target[one]).square().sum() / 64
        # One row and five are different float32 forward passes: a few units in the last place.
        torch.testing.assert_close(losses[row], expected, rtol=1e-5, atol=0)


def test_mean_of_the_rows_is_mse_loss(tiny_unet, make_batches):
    # METHOD: ewc_lambda = 15000 only means anything with reduction "mean".
    (batch,) = make_batches([6])
    prediction = tiny_unet(*batch[:2], class_labels=batch[2]).sample
    # The same numbers in another order of summation.
    torch.testing.assert_close(
        denoising_losses(tiny_unet, *batch).mean(), F.mse_loss(prediction, batch[3]), rtol=1e-6, atol=0
    )


def test_losses_depend_on_every_argument(tiny_unet, make_batches):
    (batch,) = make_batches([4])
    losses = denoising_losses(tiny_unet, *batch)
    changed = (batch[0] + 1, (batch[1] + 500) % 1000, (batch[2] + 1) % 4, batch[3] + 1)
    for position, tensor in enumerate(changed):
        other = denoising_losses(tiny_unet, *batch[:position], tensor, *batch[position + 1 :])
        assert (other != losses).all(), f"argument {position}"


def test_losses_of_a_low_precision_model_are_float32(tiny_unet, make_batches):
    (batch,) = make_batches([4])
    tiny_unet = tiny_unet.bfloat16()
    noisy_images, target = batch[0].bfloat16(), batch[3].bfloat16()
    losses = denoising_losses(tiny_unet, noisy_images, batch[1], batch[2], target)
    prediction = tiny_unet(noisy_images, batch[1], class_labels=batch[2]).sample
    assert prediction.dtype == torch.bfloat16 and losses.dtype == torch.float32
    expected = (prediction.double() - target.double()).square().mean(dim=(1, 2, 3))
    # Only the prediction is rounded to bfloat16 (4e-3), the squares and their mean are not.
    torch.testing.assert_close(losses.double(), expected, rtol=1e-6, atol=0)


@pytest.fixture
def clean_noise_timesteps(make_batches) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    noisy_images, timesteps, _, noise = make_batches([6])[0]
    timesteps[0], timesteps[1] = 0, 999
    return noisy_images.clamp(-1, 1), noise, timesteps


def test_epsilon_target_is_the_noise(clean_noise_timesteps):
    images, noise, timesteps = clean_noise_timesteps
    assert torch.equal(training_target(DDIMScheduler(prediction_type="epsilon"), images, noise, timesteps), noise)


def test_sample_target_is_the_clean_image(clean_noise_timesteps):
    images, noise, timesteps = clean_noise_timesteps
    assert torch.equal(training_target(DDIMScheduler(prediction_type="sample"), images, noise, timesteps), images)


def test_v_prediction_target_by_hand(clean_noise_timesteps):
    images, noise, timesteps = clean_noise_timesteps
    target = training_target(DDIMScheduler(prediction_type="v_prediction"), images, noise, timesteps)
    # Salimans and Ho, arXiv 2202.00512: v = alpha * epsilon - sigma * x, with the default schedule written out.
    alpha_bar = torch.cumprod(1 - torch.linspace(1e-4, 0.02, 1000, dtype=torch.float64), dim=0)[timesteps]
    alpha_bar = alpha_bar[:, None, None, None]
    expected = alpha_bar.sqrt() * noise - (1 - alpha_bar).sqrt() * images
    # The scheduler's product of a thousand float32 factors: 1e-6 or so each way.
    torch.testing.assert_close(target.double(), expected, rtol=0, atol=1e-5)


def test_unknown_prediction_type_is_an_error(clean_noise_timesteps):
    with pytest.raises(ValueError, match="'flow' is not one of epsilon, sample, v_prediction"):
        training_target(DDIMScheduler(prediction_type="flow"), *clean_noise_timesteps)
