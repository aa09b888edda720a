"""The draws that a task's Fisher is estimated from, each a function of the seed, the task and its index."""

import copy
from collections.abc import Iterator

import torch

from .losses import add_noise, first_timestep, training_target
from .pipeline import from_uint8
from .randomness import generator, permutation
from .tasks import TaskImages


class FisherBatches:
    """
    Re-iterable batches `(noisy_images, timesteps, class_labels, target)` over the images of a task, the same tensors
    every time.

    Batch `s` is the draws `[s * batch_size, (s + 1) * batch_size)`, however many processes there are: they share out whole
    batches, so that the sums over batches agree to float64 (a curvature is 1e-3 off where batches are cut otherwise).

    Args:
        images ([`TaskImages`]): without flips.
        noise_scheduler: a diffusers scheduler.
        num_samples (`int` or `None`): draws over all processes; by default one for every image. Fewer take images at
            random, more go round again with new noise.
        timesteps (`tuple[int, int]`): `[start, end)`, counted from the least noisy one: 0 is a flow's timestep 1.
        batch_size, seed, task (`int`), device.
        process_index, num_processes (`int`): this process takes the batches `process_index`, `process_index +
            num_processes`, and so on; there may be none.
    """

    def __init__(
        self,
        images: TaskImages,
        noise_scheduler,
        num_samples: int | None,
        timesteps: tuple[int, int],
        batch_size: int,
        seed: int,
        task: int,
        device,
        process_index: int = 0,
        num_processes: int = 1,
    ):
        self.images, self.noise_scheduler, self.timesteps = images, noise_scheduler, timesteps
        self.batch_size, self.seed, self.task, self.device = batch_size, seed, task, device
        self.order = permutation(len(images), seed, "fisher", task).tolist()
        self.num_samples = num_samples or len(images)
        self.process_index, self.num_processes = process_index, num_processes

    def first(self, num_samples: int) -> "FisherBatches":
        """Returns this process's batches of the first draws over all processes; the last of them may be cut."""
        part = copy.copy(self)
        part.num_samples = min(num_samples, self.num_samples)
        return part

    def __iter__(self) -> Iterator[tuple[torch.Tensor, ...]]:
        start, step = (self.batch_size * number for number in (self.process_index, self.num_processes))
        for begin in range(start, self.num_samples, step):
            indices = range(begin, min(begin + self.batch_size, self.num_samples))
            images, class_labels = self.images.__getitems__([(0, self.order[i % len(self.order)]) for i in indices])
            clean_images = from_uint8(images.to(self.device))
            generators = [generator(self.seed, "fisher", self.task, index) for index in indices]
            timesteps = torch.cat([torch.randint(*self.timesteps, (1,), generator=g) for g in generators])
            noise = torch.stack([torch.randn(clean_images.shape[1:], generator=g) for g in generators])
            timesteps = timesteps + first_timestep(self.noise_scheduler)
            timesteps, noise, class_labels = (x.to(self.device) for x in (timesteps, noise, class_labels))
            noisy_images = add_noise(self.noise_scheduler, clean_images, noise, timesteps)
            yield (
                noisy_images,
                timesteps,
                class_labels,
                training_target(self.noise_scheduler, clean_images, noise, timesteps),
            )
