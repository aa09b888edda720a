"""Replay: rows of earlier classes that are appended to a batch, and the target that they get."""

import torch


class GenerativeReplay:
    """
    Plain generative replay (Shin et al., arXiv 1705.08690): images that the model of the previous task generated,
    trained on as if they were data. The target of a replayed row is the noise that was added to it.

    ```python
    replay = GenerativeDistillation()
    replay.update(images, class_labels, teacher=frozen_unet)     # before every task but the first
    replayed_images, replayed_labels = replay.sample(new_images)
    target[num_new:] = replay.target(noisy_images[num_new:], timesteps[num_new:], replayed_labels, target[num_new:])
    ```

    `source` says where the rows come from: `generated` by the teacher, a `memory` of real images, or the `current` batch.
    """

    source = "generated"

    def __init__(self):
        self.images: torch.Tensor | None = None
        self.class_labels: torch.Tensor | None = None
        self.teacher = None

    def __len__(self) -> int:
        return 0 if self.class_labels is None else len(self.class_labels)

    def update(self, images: torch.Tensor | None, class_labels: torch.Tensor, teacher=None) -> None:
        """
        Replaces what is replayed.

        Args:
            images (`torch.Tensor` of shape `(num_images, channels, height, width)`): in any type and on any device,
                memory-mapped ones too; rows are handed out as they are.
            class_labels (`torch.Tensor` of shape `(num_images,)`): equally many rows of every class, so that uniform
                draws are balanced.
            teacher: the frozen model of the previous task, called like the student.

        Raises:
            ValueError: when there are no images or not one label an image.
        """
        if len(images) == 0 or len(images) != len(class_labels):
            raise ValueError(f"replay needs one label an image, got {len(images)} images, {len(class_labels)} labels")
        self.images, self.class_labels, self.teacher = images, class_labels, teacher

    def sample(
        self, new_images: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """
        Returns as many replayed rows as the batch has new ones, drawn uniformly with replacement.

        Args:
            new_images (`torch.Tensor` of shape `(num_new, channels, height, width)`): of the current task.
            generator (`torch.Generator`, *optional*): a CPU generator; the global one by default.

        Returns:
            images of shape `(num_new, channels, height, width)` and labels of shape `(num_new,)`.
        """
        indices = torch.randint(len(self), (len(new_images),), generator=generator).to(self.images.device)
        return self.images[indices], self.class_labels[indices]

    def target(
        self, noisy_images: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        """Returns the target of the replayed rows: `target`, what any other row would get."""
        return target


class GenerativeDistillation(GenerativeReplay):
    """
    Generative distillation (Masip et al., arXiv 2311.14028; the L_GD of arXiv 2509.23593, Sec. 3.4): a replayed row's
    target is the teacher's prediction on the same noisy image, timestep and label. It gets no denoising loss.
    """

    @torch.no_grad()
    def target(
        self, noisy_images: torch.Tensor, timesteps: torch.Tensor, class_labels: torch.Tensor, target: torch.Tensor
    ) -> torch.Tensor:
        """Returns the teacher's prediction, of the images' shape; `target` is not used."""
        return self.teacher(noisy_images, timesteps, class_labels=class_labels).sample


class MemoryReplay(GenerativeReplay):
    """
    Experience replay (Chaudhry et al., arXiv 1902.10486): a few real images of every earlier class are kept, and trained
    on as what they are. Not data-free: the images count in every table, under stored bytes.
    """

    source = "memory"


class LearningWithoutForgetting(GenerativeDistillation):
    """
    Learning without forgetting (Li and Hoiem, arXiv 1606.09282), on a denoiser: the new images once more, under labels of
    earlier classes drawn uniformly, with the teacher's prediction on them as target. Nothing is generated or kept.

    `update(None, class_ids, teacher)` takes the ids of the earlier classes.
    """

    source = "current"

    def update(self, images: None, class_labels: torch.Tensor, teacher=None) -> None:
        """Replaces the earlier classes and their teacher; raises a `ValueError` for images or without classes."""
        if images is not None or len(class_labels) == 0:
            raise ValueError("lwf takes the ids of the earlier classes and no images")
        self.class_labels, self.teacher = class_labels, teacher

    def sample(
        self, new_images: torch.Tensor, generator: torch.Generator | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns the new images and, for each, the id of an earlier class; arguments as [`GenerativeReplay.sample`]."""
        indices = torch.randint(len(self), (len(new_images),), generator=generator).to(self.class_labels.device)
        return new_images, self.class_labels[indices]


def replay_weights(weighting: str, task: int, distillation_weight: float) -> tuple[float, float]:
    """
    Returns the weights `(w_new, w_old)` of the mean losses of new and replayed rows.

    Args:
        weighting (`str`): `sum`: 1 and `distillation_weight` (arXiv 2509.23593, Eq. 7, has 1 and 1); `by_task`: 1/k and
            1 - 1/k in task k = 1, 2, ... (Masip et al., arXiv 2311.14028).
        task (`int`): counted from 0.
        distillation_weight (`float`): for `sum`.

    Raises:
        ValueError: for another weighting.
    """
    if weighting == "sum":
        return 1.0, distillation_weight
    if weighting == "by_task":
        return 1 / (task + 1), 1 - 1 / (task + 1)
    raise ValueError(f"replay_weighting {weighting!r} is not one of sum, by_task")
