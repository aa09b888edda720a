"""The denoising loss: one definition for training, distillation and Fisher."""

import torch
import torch.nn.functional as F


def training_target(
    noise_scheduler, clean_images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """
    Returns what the network has to predict, by the scheduler's `prediction_type`.

    Args:
        noise_scheduler: a diffusers scheduler with `config.prediction_type` and `get_velocity`.
        clean_images (`torch.Tensor` of shape `(batch, channels, height, width)`): in [-1, 1].
        noise (`torch.Tensor` of the same shape): standard normal.
        timesteps (`torch.Tensor` of shape `(batch,)`): in [0, num_train_timesteps).

    Returns:
        `torch.Tensor` of the images' shape.

    Raises:
        ValueError: for a prediction type other than `epsilon`, `sample` and `v_prediction`.
    """
    prediction_type = noise_scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return clean_images
    if prediction_type == "v_prediction":
        return noise_scheduler.get_velocity(clean_images, noise, timesteps)
    raise ValueError(f"prediction_type {prediction_type!r} is not one of epsilon, sample, v_prediction")


def denoising_losses(
    model, noisy_images: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor, target: torch.Tensor
) -> torch.Tensor:
    """
    Returns the denoising loss of every row: the squared error, averaged over channels and pixels.

    The paper writes `1/2 |.|^2` (arXiv 2509.23593, Eq. 2); the mean over pixels without the half is what its authors'
    code computes, and `ewc_lambda = 15000` only means anything with that convention.

    Args:
        model: called as `model(noisy_images, timesteps, class_labels=class_labels).sample`; `UNet2DModel` and
            `DiTTransformer2DModel` fit.
        noisy_images (`torch.Tensor` of shape `(batch, channels, height, width)`).
        timesteps (`torch.Tensor` of shape `(batch,)`).
        class_labels (`torch.Tensor` of shape `(batch,)`): class ids.
        target (`torch.Tensor` of the images' shape): from [`training_target`], or a teacher's prediction.

    Returns:
        `torch.Tensor` of shape `(batch,)`, float32.
    """
    prediction = model(noisy_images, timesteps, class_labels=class_labels).sample
    return F.mse_loss(prediction.float(), target.float(), reduction="none").mean(dim=(1, 2, 3))
