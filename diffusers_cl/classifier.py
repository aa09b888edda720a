"""A small classifier of the real images, whose features distances are taken on where Inception would be a download."""

import hashlib

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm.auto import tqdm

from .data import ImageSplit
from .pipeline import from_uint8
from .randomness import derive_seed


# The classifier is part of the measurement, not of the run: it does not depend on the run's seed.
CLASSIFIER_SEED = 0
CLASSIFIER_STEPS = 1000
CLASSIFIER_BATCH_SIZE = 128
CLASSIFIER_LEARNING_RATE = 2e-3
NUM_FEATURES = 32


class SmallClassifier(nn.Module):
    """
    A convolutional classifier of small images; its features are the `NUM_FEATURES` numbers before the last layer, fewer
    than there are test images in a task, so that their covariance has full rank, and normalised (LayerNorm), so that
    distances do not depend on the scale that training happened to give them.

    Args:
        channels (`int`): 1 or 3.
        num_classes (`int`).
        resolution (`int`): decides how often the image is halved, until it is 4 or 5 pixels wide.
    """

    def __init__(self, channels: int, num_classes: int, resolution: int):
        super().__init__()
        self.channels, self.resolution = channels, resolution
        layers: list[nn.Module] = []
        width, size = 32, resolution
        while True:
            layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            channels, width = width, min(2 * width, 128)
            if size < 8:
                break
            layers.append(nn.MaxPool2d(2))
            size //= 2
        self.body = nn.Sequential(
            *layers,
            nn.Flatten(),
            nn.Dropout(0.2),
            nn.Linear(channels * size * size, NUM_FEATURES),
            nn.LayerNorm(NUM_FEATURES, elementwise_affine=False),
        )
        self.head = nn.Linear(NUM_FEATURES, num_classes)

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Returns features `(batch, NUM_FEATURES)` and logits `(batch, num_classes)` of uint8 images."""
        features = self.body(from_uint8(images))
        return features, self.head(F.relu(features))


def train_classifier(
    train: ImageSplit, rows, device, disable_progress_bar: bool = False, seed: int = CLASSIFIER_SEED
) -> SmallClassifier:
    """
    Returns a [`SmallClassifier`] trained on real images, always in the same way: the seed is fixed, the global random
    state is put back.

    Args:
        train ([`ImageSplit`]): the real training split.
        rows (`np.ndarray`): the rows whose classes are in the stream.
        seed (`int`, *optional*): of its weights and batches. Every measurement of a run uses the default: distances on the
            features of another seed are not to be compared with these.
    """
    labels = torch.from_numpy(train.labels)
    with torch.random.fork_rng(devices=[device] if torch.device(device).type == "cuda" else []):
        torch.manual_seed(derive_seed(seed, "classifier"))
        classifier = SmallClassifier(train.channels, len(train.names), train.resolution).to(device)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=CLASSIFIER_LEARNING_RATE, weight_decay=1e-2)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, CLASSIFIER_LEARNING_RATE, CLASSIFIER_STEPS)
        # Small sets are decoded once, large ones batch by batch.
        fits = len(rows) * train.channels * train.resolution**2 <= 2**30
        cached = train.decode(rows) if fits else None
        for _ in tqdm(
            range(CLASSIFIER_STEPS), desc="Training the classifier", disable=disable_progress_bar, leave=False
        ):
            positions = torch.randint(len(rows), (min(CLASSIFIER_BATCH_SIZE, len(rows)),))
            images = cached[positions] if fits else train.decode(rows[positions.numpy()])
            _, logits = classifier(images.to(device))
            loss = F.cross_entropy(logits, labels[rows[positions.numpy()]].to(device), label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier


def weights_digest(network: nn.Module) -> str:
    """Returns the sha256 of a network's weights, by which results name it."""
    digest = hashlib.sha256()
    for tensor in network.state_dict().values():
        # NumPy has no bfloat16.
        digest.update((tensor.float() if tensor.is_floating_point() else tensor).cpu().numpy().tobytes())
    return digest.hexdigest()
