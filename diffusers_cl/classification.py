"""Classifiers that are trained on a model's generated images alone, and what they make of the real held-out ones."""

from collections.abc import Callable
from contextlib import AbstractContextManager

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from accelerate import Accelerator
from torchvision.models.resnet import BasicBlock, ResNet
from tqdm.auto import tqdm

from .config import TrainingConfig
from .data import ImageSplit, cap_per_class
from .errors import NonFiniteError
from .memory import place_for
from .pipeline import from_uint8
from .randomness import derive_seed, generator
from .start import Start


# arXiv 2510.02631, Sec. 5.1, Implementation Details.
EPOCHS = 30
BATCH_SIZE = 100
MOMENTUM = 0.9
WEIGHT_DECAY = 5e-4
# Not the paper's, which is lost in the copy that this follows.
MAX_LEARNING_RATE = 0.1
# From this resolution on the paper's ResNet-18, below it the ResNet-8.
RESNET18_RESOLUTION = 32
RESNET8_WIDTHS = (16, 32, 64)


class ResNet8(nn.Sequential):
    """
    The smallest of He et al.'s residual networks for small images (arXiv 1512.03385, Sec. 4.2, n = 1): a 3x3 convolution and
    one block of two at each of three sizes, with 16, 32 and 64 channels. 78 thousand parameters.

    Args:
        channels (`int`): 1 or 3.
        num_classes (`int`).
    """

    def __init__(self, channels: int, num_classes: int):
        width = RESNET8_WIDTHS[0]
        layers = [nn.Conv2d(channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.ReLU()]
        for planes in RESNET8_WIDTHS:
            stride, shortcut = planes // width, None
            if stride > 1:
                shortcut = nn.Sequential(nn.Conv2d(width, planes, 1, stride, bias=False), nn.BatchNorm2d(planes))
            layers.append(BasicBlock(width, planes, stride, shortcut))
            width = planes
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, num_classes))
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def network_name(resolution: int) -> str:
    """Returns the name of the classifier of images of a resolution: `resnet18`, below 32 pixels `resnet8`."""
    return "resnet18" if resolution >= RESNET18_RESOLUTION else "resnet8"


def create_network(channels: int, num_classes: int, resolution: int) -> nn.Module:
    """Returns an untrained classifier: torchvision's ResNet-18 with the stem of small images, or a [`ResNet8`]."""
    if network_name(resolution) == "resnet8":
        return ResNet8(channels, num_classes)
    network = ResNet(BasicBlock, [2, 2, 2, 2], num_classes=num_classes)
    network.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    nn.init.kaiming_normal_(network.conv1.weight, mode="fan_out", nonlinearity="relu")
    network.maxpool = nn.Identity()
    return network


def shift_and_flip(images: torch.Tensor, shifts: torch.Tensor, flips: torch.Tensor, padding: int) -> torch.Tensor:
    """
    Returns images cut out of ones with a black border, and mirrored.

    Args:
        images (`torch.Tensor` of shape `(batch, channels, height, width)`): uint8.
        shifts (`torch.Tensor` of shape `(2, batch)`): of the upper left corner, down and to the right, in [0, 2 padding].
        flips (`torch.Tensor` of `bool`, of shape `(batch,)`): which are mirrored.
        padding (`int`): width of the border, in pixels.
    """
    padded = F.pad(images, [padding] * 4)
    down, right = (
        shift[:, None] + torch.arange(size, device=images.device)
        for shift, size in zip(shifts, images.shape[-2:], strict=True)
    )
    batch = torch.arange(len(images), device=images.device)[:, None, None]
    # Of shape (batch, height, width, channels): the two index tensors stand on both sides of a slice.
    cut = padded[batch, :, down[:, :, None], right[:, None, :]].permute(0, 3, 1, 2)
    return torch.where(flips[:, None, None, None], cut.flip(-1), cut)


def train_on(
    images: torch.Tensor,
    labels: torch.Tensor,
    num_classes: int,
    seed: int,
    device: torch.device,
    random_flip: bool = False,
    description: str = "Training a classifier",
    disable_progress_bar: bool = False,
) -> nn.Module:
    """
    Returns a classifier trained from scratch on these images alone, in eval mode, as arXiv 2510.02631 trains it (Sec. 5.1):
    SGD with momentum, a one-cycle learning rate, 30 epochs of batches of 100, cut out of a border at random.

    Where the paper does not say: the border is an eighth of the resolution wide; images are mirrored only where the
    generative model's training images are, because a mirrored 3 is none; an epoch is cut into batches of nearly equal size;
    the momentum is 0.9 throughout. It does not depend on the global random state, which is put back.

    Args:
        images (`torch.Tensor` of shape `(num_images, channels, height, width)`): uint8.
        labels (`torch.Tensor` of shape `(num_images,)`): in [0, `num_classes`).
        num_classes (`int`).
        seed (`int`): weights, order and augmentation are functions of it.
        device (`torch.device`).
        random_flip (`bool`): mirror images at random.
        description (`str`): for the progress bar and errors.
        disable_progress_bar (`bool`).

    Raises:
        NonFiniteError: when the loss ends as no number.
    """
    count, resolution = len(images), images.shape[-1]
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(derive_seed(seed, "weights"))
        network = create_network(images.shape[1], num_classes, resolution).to(device)
    images = images.to(place_for(images.nbytes, device) or "cpu")
    num_batches, rate = -(-count // BATCH_SIZE), MAX_LEARNING_RATE
    optimizer = torch.optim.SGD(network.parameters(), rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, EPOCHS * num_batches, cycle_momentum=False)
    padding = resolution // 8
    for epoch in tqdm(range(EPOCHS), desc=description, unit="epoch", leave=False, disable=disable_progress_bar):
        draws = generator(seed, "epoch", epoch)
        order = torch.randperm(count, generator=draws)
        shifts = torch.randint(2 * padding + 1, (2, count), generator=draws)
        flips = (torch.rand(count, generator=draws) < 0.5) & random_flip
        for rows in order.tensor_split(num_batches):
            batch = images[rows.to(images.device)].to(device)
            batch = shift_and_flip(batch, shifts[:, rows].to(device), flips[rows].to(device), padding)
            loss = F.cross_entropy(network(from_uint8(batch)), labels[rows].to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    if not torch.isfinite(loss):
        raise NonFiniteError(f"{description}: the loss is {loss.item()}")
    return network.eval()


@torch.no_grad()
def predict(network: nn.Module, images: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Returns the class, of shape `(num_images,)`, that a classifier gives each of these uint8 images."""
    batches = images.split(10 * BATCH_SIZE)
    return torch.cat([network(from_uint8(batch.to(device))).argmax(dim=1).cpu() for batch in batches])


class Classification:
    """
    Measures models by what can be learned from their images (arXiv 2510.02631, Sec. 5.1): after every task a classifier is
    trained on generated images of every class so far, and tested on the real held-out ones.

    The same one is trained on as many real images, or all where there are fewer, after the first task, whose value enters
    AIA, and after the last, the upper bound ("classifier multitask"); not after the others, to save its time.

    Args:
        train, test ([`ImageSplit`]): the real images.
        tasks (`list[list[str]]`): the classes of every task.
        class_ids (`dict[str, int]`): the model's id of every class.
        config ([`TrainingConfig`]): `generated_classifier_images`, `eval_images_per_class`, `random_flip` and `seed`.
        device (`torch.device`).
        first_task (`int`): tasks before it, if any, have no images here: none is tested on, and no classifier of real ones
            trained.
        gather (*optional*): concatenates a tensor of every process. Each trains the same classifier; the first one's counts.
        quiet (`bool`): show no progress.
    """

    def __init__(
        self,
        train: ImageSplit,
        test: ImageSplit,
        tasks: list[list[str]],
        class_ids: dict[str, int],
        config: TrainingConfig,
        device: torch.device,
        first_task: int = 0,
        gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
        quiet: bool = False,
    ):
        self.train, self.tasks, self.class_ids, self.config = train, tasks, class_ids, config
        self.device, self.first_task, self.gather, self.quiet = device, first_task, gather, quiet
        # The held-out images of every task, and their classes.
        self.held_out: list[tuple[torch.Tensor, list[str]] | None] = [None] * first_task
        for names in tasks[first_task:] if config.generated_classifier_images is not None else []:
            split = cap_per_class(test, names, config.eval_images_per_class)
            images = split.decode(range(len(split.labels)))
            self.held_out.append((images, [split.names[label] for label in split.labels]))

    def __call__(
        self,
        sample: Callable[[list[int], list[tuple]], torch.Tensor],
        num_tasks: int,
        phase: Callable[[str], AbstractContextManager],
    ) -> dict:
        """
        Returns `{"classification": {...}}`, a part of a model's metric row; `{}` where the configuration asks for none.

        Args:
            sample: maps class ids and noise keys to uint8 images.
            num_tasks (`int`): the tasks that the model has seen, from the first.
            phase: a context for the seconds of the parts: `classify_generate`, `classify_train`.

        Returns:
            `images_per_class`; `network`, its name; `generated`, the accuracy on every task's real test images, `None` where
            they are not here; `real`, the same of the classifier of real images; `real_images`, its fewest and most a class.
        """
        count = self.config.generated_classifier_images
        if count is None:
            return {}
        names = list(dict.fromkeys(name for names in self.tasks[:num_tasks] for name in names))
        with phase("classify_generate"):
            keys = [("classify", name, index) for name in names for index in range(count)]
            images = sample([self.class_ids[name] for _, name, _ in keys], keys)
        with phase("classify_train"):
            labels = torch.arange(len(names)).repeat_interleave(count)
            row = {
                "images_per_class": count,
                "network": network_name(self.train.resolution),
                "generated": self._accuracies("generated", images, labels, names, num_tasks),
                "real": None,
                "real_images": None,
            }
            if self.first_task == 0 and num_tasks in (1, len(self.tasks)):
                real = cap_per_class(self.train, names, count)
                counts = np.bincount(real.labels)[[real.names.index(name) for name in names]]
                labels = torch.arange(len(names)).repeat_interleave(torch.from_numpy(counts))
                images = real.decode(range(len(real.labels)))
                row["real"] = self._accuracies("real", images, labels, names, num_tasks)
                row["real_images"] = [int(counts.min()), int(counts.max())]
        return {"classification": row}

    def _accuracies(self, kind: str, images, labels, names: list[str], num_tasks: int) -> list[float | None]:
        """The accuracy on every task's held-out images of a classifier that is trained on these ones."""
        network = train_on(
            images,
            labels,
            len(names),
            derive_seed(self.config.seed, "classify", kind, num_tasks),
            self.device,
            self.config.random_flip,
            f"Training a classifier on {kind} images",
            self.quiet,
        )
        found = torch.full((num_tasks,), torch.nan, dtype=torch.float64)
        for task, held_out in enumerate(self.held_out[:num_tasks]):
            if held_out is not None:
                expected = torch.tensor([names.index(name) for name in held_out[1]])
                found[task] = (predict(network, held_out[0], self.device) == expected).double().mean()
        if self.gather is not None:
            found = self.gather(found.to(self.device)).view(-1, num_tasks)[0].cpu()
        return [None if np.isnan(value) else value for value in found.tolist()]


def create_classification(
    config: TrainingConfig,
    start: Start | None,
    train: ImageSplit,
    test: ImageSplit,
    tasks: list[list[str]],
    class_ids: dict[str, int],
    accelerator: Accelerator,
) -> Classification:
    """Returns the [`Classification`] of a run; one that went on from `start` has the images of its own tasks alone."""
    first_task = 0 if start is None else start.task + 1
    gather = accelerator.gather if accelerator.num_processes > 1 else None
    quiet = not accelerator.is_local_main_process
    return Classification(train, test, tasks, class_ids, config, accelerator.device, first_task, gather, quiet)
