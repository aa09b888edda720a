"""
What is compared with, written from published descriptions: the Fisher by one backward pass an image, the penalty on flat
vectors (both as arXiv 2509.23593's authors describe them), and the training step of diffusers' train_unconditional.py.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F


def rows_of(batches: list[tuple[torch.Tensor, ...]]):
    """Yields the rows of batches as batches of one."""
    for batch in batches:
        for index in range(len(batch[0])):
            yield tuple(tensor[index : index + 1] for tensor in batch)


def flat_gradient(model: torch.nn.Module, losses: Callable, batch: tuple[torch.Tensor, ...]) -> torch.Tensor:
    """Returns the gradient of a batch's summed loss as one vector."""
    gradients = torch.autograd.grad(losses(model, batch).sum(), list(model.parameters()))
    return torch.cat([gradient.flatten() for gradient in gradients])


def rank1_loop(model: torch.nn.Module, losses: Callable, batches: list[tuple[torch.Tensor, ...]]) -> dict[str, float]:
    """Returns |mu| and m = E[(mu . g)^2] / |mu|^2 by two passes of one backward pass an image each."""
    total, count = 0, 0
    for row in rows_of(batches):
        total, count = total + flat_gradient(model, losses, row), count + 1
    mu = total / count
    moment = 0.0
    for row in rows_of(batches):
        moment = moment + (mu @ flat_gradient(model, losses, row)).square()
    squared = mu @ mu
    return {"norm": math.sqrt(squared.item()), "second_moment": (moment / count / squared).item()}


def diagonal_loop(model: torch.nn.Module, losses: Callable, batches: list[tuple[torch.Tensor, ...]]) -> torch.Tensor:
    """Returns E[g * g] as one vector, by one backward pass an image."""
    total, count = 0, 0
    for row in rows_of(batches):
        total, count = total + flat_gradient(model, losses, row).square(), count + 1
    return total / count


class FlatPenalty:
    """`lambda / 2 sum_k c_k (mu_k . (theta - theta*_k))^2`: two vectors a task, and autograd through a flat copy for each."""

    def __init__(self, model: torch.nn.Module, num_tasks: int):
        size = sum(parameter.numel() for parameter in model.parameters())
        device = next(model.parameters()).device
        self.tasks = [(torch.randn(size, device=device), torch.randn(size, device=device)) for _ in range(num_tasks)]

    def __call__(self, model: torch.nn.Module) -> torch.Tensor:
        total = 0.0
        for mu, anchor in self.tasks:
            theta = torch.cat([parameter.flatten() for parameter in model.parameters()])
            total = total + 1e-12 * (mu @ (theta - anchor)).square()
        return 0.5 * total


class PlainStep:
    """
    A training step of diffusers' `examples/unconditional_image_generation/train_unconditional.py` without its logging, with
    class labels: noise, forward, loss, backward, clipping, optimizer, EMA.
    """

    def __init__(self, model: torch.nn.Module, noise_scheduler, learning_rate: float, ema_model=None, optimizer=None):
        self.model, self.noise_scheduler, self.ema_model = model, noise_scheduler, ema_model
        self.optimizer = optimizer or torch.optim.AdamW(model.parameters(), lr=learning_rate, fused=True)

    def __call__(self, clean_images: torch.Tensor, class_labels: torch.Tensor) -> None:
        noise = torch.randn_like(clean_images)
        num_timesteps = self.noise_scheduler.config.num_train_timesteps
        timesteps = torch.randint(0, num_timesteps, (len(clean_images),), device=clean_images.device)
        noisy_images = self.noise_scheduler.add_noise(clean_images, noise, timesteps)
        prediction = self.model(noisy_images, timesteps, class_labels=class_labels).sample
        F.mse_loss(prediction.float(), noise.float()).backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.ema_model is not None:
            self.ema_model.step(self.model.parameters())
