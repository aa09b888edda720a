"""Image features for the metrics: Inception, a transformers classifier, or a small CNN trained on the real images."""

import contextlib
import hashlib
import json
import os
import pickle
import urllib.error
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from tqdm.auto import tqdm

from .config import TrainingConfig
from .data import ImageSplit
from .errors import DataError, first_line
from .pipeline import from_uint8
from .randomness import derive_seed


# The classifier is part of the measurement, not of the run: it does not depend on the run's seed.
CLASSIFIER_SEED = 0
CLASSIFIER_STEPS = 1000
CLASSIFIER_BATCH_SIZE = 128
CLASSIFIER_LEARNING_RATE = 2e-3
NUM_FEATURES = 32
# Of the digits, so that their distances are measured with one and the same network on every machine.
ASSETS = Path(__file__).parent / "assets"
BATCH_SIZE = 256


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


class FeatureExtractor:
    """
    Turns uint8 images into features and, where the network is a classifier of the stream's classes, predictions.

    Args:
        name (`str`): names the features: distances on `inception` are FID and KID, on anything else fd and kd.
        network (`nn.Module`): maps a uint8 batch to `(features, logits or None)`.
        device (`torch.device`).
        class_names (`list[str]` or `None`): of the logits' columns.
        info (`dict`): what to record about it.
    """

    def __init__(self, name: str, network: nn.Module, device, class_names: list[str] | None = None, info=None):
        self.name, self.network, self.device = name, network.to(device).eval().requires_grad_(False), device
        self.class_names, self.info = class_names, {"name": name, **(info or {})}

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, list[str] | None]:
        """
        Returns features of shape `(num_images, dimension)` (float64, CPU) and the predicted class names or `None`.

        Args:
            images (`torch.Tensor` of shape `(num_images, channels, height, width)`): uint8.
        """
        features, predictions = [], []
        for batch in images.split(BATCH_SIZE):
            feature, logits = self.network(batch.to(self.device))
            features.append(feature.double().cpu())
            if self.class_names is not None:
                predictions += [self.class_names[i] for i in logits.argmax(dim=1).tolist()]
        return torch.cat(features), predictions if self.class_names is not None else None


class _Inception(nn.Module):
    def __init__(self, weights_path: str | None):
        super().__init__()
        from torch_fidelity.utils import create_feature_extractor

        self.inception = create_feature_extractor(
            "inception-v3-compat", ["2048"], cuda=False, feature_extractor_weights_path=weights_path, verbose=False
        )

    def forward(self, images):
        return self.inception(images.expand(-1, 3, -1, -1))[0].flatten(1), None


class _Transformers(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        self.model = AutoModelForImageClassification.from_pretrained(name)
        self.processor = AutoImageProcessor.from_pretrained(name)
        self.class_names = [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]

    def forward(self, images):
        inputs = self.processor(list(images.expand(-1, 3, -1, -1).cpu()), return_tensors="pt").to(images.device)
        logits = self.model(**inputs).logits
        outputs = self.model.base_model(**inputs)
        pooled = getattr(outputs, "pooler_output", None)
        return (outputs.last_hidden_state[:, 0] if pooled is None else pooled).flatten(1), logits


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
    """Returns the sha256 of a network's weights, on the CPU, by which results name it."""
    return hashlib.sha256(b"".join(t.numpy().tobytes() for t in network.state_dict().values())).hexdigest()


def _key(recipe: dict) -> str:
    return hashlib.sha256(json.dumps(recipe).encode()).hexdigest()[:16]


def _classifier(config: TrainingConfig, train: ImageSplit, class_names: list[str], device, quiet: bool) -> nn.Module:
    """The classifier that is shipped for this data and recipe, or else one trained here, from the cache if it was before."""
    rows = train.rows_of(class_names)
    with torch.random.fork_rng(devices=[]):
        classifier = SmallClassifier(train.channels, len(train.names), train.resolution)
    recipe = {
        "network": repr(classifier),
        "dataset": train.dataset._fingerprint if config.dataset_name != "digits" else "digits",
        "rows": hashlib.sha256(rows.tobytes()).hexdigest(),
        "names": train.names,
        "resolution": [train.resolution, train.resize_mode, train.channels],
        "training": [CLASSIFIER_SEED, CLASSIFIER_STEPS, CLASSIFIER_BATCH_SIZE, CLASSIFIER_LEARNING_RATE, NUM_FEATURES],
    }
    shipped = ASSETS / f"classifier-{_key(recipe)}.safetensors"
    if shipped.exists():
        classifier.load_state_dict(load_file(shipped))
        return classifier
    # Trained elsewhere the same recipe gives other last digits, and distances that differ by 1 % or so.
    recipe["torch"] = [torch.__version__, str(device), torch.get_num_threads()]
    folder = Path(config.cache_dir or constants.HF_HOME) / "diffusers_cl"
    file = folder / f"classifier-{_key(recipe)}.safetensors"
    if file.exists():
        classifier.load_state_dict(load_file(file))
        return classifier
    classifier = train_classifier(train, rows, device, quiet).cpu()
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f".{file.name}.{os.getpid()}"
    save_file(classifier.state_dict(), partial)
    partial.rename(file)
    return classifier


def resolve_feature_extractor(
    config: TrainingConfig, train: ImageSplit, class_names: list[str], device, quiet: bool = False
) -> FeatureExtractor:
    """
    Returns the extractor that `config.feature_extractor` names, ready to use: before training starts.

    Raises:
        DataError: when it cannot be had, with the ways out.
    """
    if config.feature_extractor == "classifier":
        network = _classifier(config, train, class_names, device, quiet)
        return FeatureExtractor("classifier", network, device, train.names, {"sha256": weights_digest(network)})
    if config.feature_extractor == "inception":
        path = config.feature_extractor_weights_path
        try:
            if path is not None:
                # torch-fidelity unpickles the file; this refuses anything in it but tensors.
                torch.load(path, map_location="cpu", weights_only=True)
            with contextlib.redirect_stdout(None):
                return FeatureExtractor("inception", _Inception(path), device)
        except (OSError, urllib.error.URLError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
            raise DataError(
                f"cannot get the Inception weights ({first_line(error)}). Give a file with"
                " feature_extractor_weights_path, or set feature_extractor: classifier"
            ) from error
    try:
        network = _Transformers(config.feature_extractor)
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f"feature_extractor: cannot load {config.feature_extractor!r}: {first_line(error)}; allowed:"
            " inception, classifier, a transformers image classifier (Hub id or folder)"
        ) from error
    names = network.class_names if set(class_names) <= set(network.class_names) else None
    return FeatureExtractor(config.feature_extractor, network, device, names)
