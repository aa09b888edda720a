"""
The denoising loss: one definition for training, distillation and Fisher, of diffusion and of flow matching.

A flow's paths are straight, from the image at sigma 0 to noise at sigma 1: `x = (1 - sigma) image + sigma noise`, of which
the velocity `noise - image` is the derivative by sigma (Lipman et al., arXiv 2210.02747, with time running from image to
noise). Timesteps are 1000 sigma. That is the convention of diffusers' `FlowMatchEulerDiscreteScheduler`.
"""

import torch
import torch.nn.functional as F


def is_flow(noise_scheduler) -> bool:
    """Returns whether a diffusers scheduler is of flow matching (`FlowMatchEulerDiscreteScheduler` and its kin)."""
    return type(noise_scheduler).__name__.startswith("FlowMatch")


def first_timestep(noise_scheduler) -> int:
    """Returns the least noisy timestep that is trained on: 0 of [0, 999] for diffusion, 1 of [1, 1000] for a flow."""
    return int(is_flow(noise_scheduler))


def add_noise(
    noise_scheduler, clean_images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """
    Returns the noisy images of timesteps, by the scheduler's `add_noise` or on a flow's path.

    A flow's own `scale_noise` is not used: it looks timesteps up in a schedule that sampling replaces.

    Args:
        noise_scheduler: a diffusers scheduler.
        clean_images (`torch.Tensor` of shape `(batch, channels, height, width)`): in [-1, 1].
        noise (`torch.Tensor` of the same shape): standard normal.
        timesteps (`torch.Tensor` of shape `(batch,)`): `num_train_timesteps` of them, from [`first_timestep`] on.

    Returns:
        `torch.Tensor` of the images' shape.
    """
    if not is_flow(noise_scheduler):
        return noise_scheduler.add_noise(clean_images, noise, timesteps)
    sigmas = (timesteps / noise_scheduler.config.num_train_timesteps).to(clean_images.dtype).view(-1, 1, 1, 1)
    return (1 - sigmas) * clean_images + sigmas * noise


def training_target(
    noise_scheduler, clean_images: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """
    Returns what the network has to predict: by the scheduler's `prediction_type`, or a flow's velocity.

    Args:
        noise_scheduler: a diffusers scheduler, of flow matching or with `config.prediction_type` and `get_velocity`.
        clean_images, noise, timesteps (`torch.Tensor`): as for [`add_noise`].

    Returns:
        `torch.Tensor` of the images' shape.

    Raises:
        ValueError: for a prediction type other than `epsilon`, `sample` and `v_prediction`.
    """
    if is_flow(noise_scheduler):
        return noise - clean_images
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
