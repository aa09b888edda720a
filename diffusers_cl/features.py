"""Image features for the metrics: Inception, a transformers classifier, or a small CNN trained on the real images."""

import contextlib
import hashlib
import json
import pickle
import urllib.error
import warnings
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn as nn
from huggingface_hub import constants
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file

from .classifier import (
    CLASSIFIER_BATCH_SIZE,
    CLASSIFIER_LEARNING_RATE,
    CLASSIFIER_SEED,
    CLASSIFIER_STEPS,
    NUM_FEATURES,
    SmallClassifier,
    train_classifier,
    weights_digest,
)
from .config import TrainingConfig
from .data import ImageSplit
from .errors import CheckpointError, DataError, RunError, StorageError, first_line
from .fetch import CLASSIFIER_FILES, model_folder
from .files import replacing
from .inception import published_weights, tensors_alone
from .shards import load_tensors, save_tensors, tensors_digest


# Of the digits, so that their distances are measured with one and the same network on every machine.
ASSETS = Path(__file__).parent / "assets"
BATCH_SIZE = 256
PACKAGES = ("torch", "torch-fidelity", "torchvision", "transformers", "pillow")
# In the consolidation folder of a task.
EXTRACTOR_NAME = "extractor.safetensors"


class FeatureExtractor:
    """
    Turns uint8 images into features and, where the network is a classifier of the stream's classes, predictions. It works in
    fixed batches, which processes can share out ([`share_out`]): what it returns is bit-equal for any number of them.

    Args:
        name (`str`): names the features: distances on `inception` are FID and KID, on anything else fd and kd.
        network (`nn.Module`): maps a uint8 batch to `(features, logits or None)`.
        device (`torch.device`).
        class_names (`list[str]` or `None`): of the logits' columns.
        known_classes (`list[str]`, *optional*): those of them that it has learned; by default all.
    """

    def __init__(
        self, name: str, network: nn.Module, device, class_names: list[str] | None = None, known_classes=None
    ):
        self.info = {"name": name, "sha256": weights_digest(network)}
        self.name, self.network, self.device = name, network.to(device).eval().requires_grad_(False), device
        self.class_names, self.known_classes = class_names, known_classes or class_names or []
        self.share_out()

    def share_out(
        self,
        process_index: int = 0,
        num_processes: int = 1,
        gather: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> None:
        """
        From now on batch `b` is taken by process `b mod num_processes`, and all processes have to call the extractor, with
        the same images. All of them call this too.

        Args:
            process_index (`int`), num_processes (`int`), gather: of this process; `gather` concatenates a tensor of every
                process along the first dimension.
        """
        self.process_index, self.num_processes, self.gather = process_index, num_processes, gather
        if gather is not None and isinstance(self.network, SmallClassifier):
            # Trained on another machine its last digits are others.
            for tensor in self.network.state_dict().values():
                tensor.copy_(gather(tensor.reshape(-1))[: tensor.numel()].reshape(tensor.shape))
            self.info["sha256"] = weights_digest(self.network)

    @torch.no_grad()
    def __call__(self, images: torch.Tensor) -> tuple[torch.Tensor, list[str] | None]:
        """
        Returns features of shape `(num_images, dimension)` (float64, CPU) and the predicted class names or `None`, the same
        on every process.

        Args:
            images (`torch.Tensor` of shape `(num_images, channels, height, width)`): uint8.

        Raises:
            DataError: when the network gives numbers that are not finite.
        """
        outputs: tuple[list, list] = [], []
        batches = images.split(BATCH_SIZE)
        for first in range(0, len(batches), self.num_processes):
            # Without a batch in the last round, a process repeats the last one for the gather, which nobody reads.
            batch = batches[min(first + self.process_index, len(batches) - 1)]
            found = self.network(batch.to(self.device))[: 1 if self.class_names is None else 2]
            for rows, output in zip(outputs, found, strict=False):
                if self.gather is not None:
                    padding = output.new_zeros(BATCH_SIZE - len(output), *output.shape[1:])
                    output = self.gather(torch.cat([output, padding]))
                rows.append(output.cpu())
        # All batches but the last are full, so the padding comes last.
        features, *logits = (torch.cat(rows)[: len(images)] for rows in outputs if rows)
        if not all(output.isfinite().all() for output in (features, *logits)):
            raise DataError(
                f"the feature extractor {self.name!r} gives numbers that are not finite of images that are: its weights"
                " cannot be used"
            )
        predictions = [self.class_names[i] for i in logits[0].argmax(dim=1).tolist()] if logits else None
        return features.double(), predictions

    def of_real_images(self, images: torch.Tensor, cache_dir: str | None) -> tuple[torch.Tensor, list[str] | None]:
        """
        Returns what a call does, and keeps it in `cache_dir` (by default the Hugging Face cache) for the next start of this or
        another run: of real images nothing ever changes, and Inception takes minutes. Processes that share the work do it anew.
        """
        if self.gather is not None:
            return self(images)
        device, processor = torch.device(self.device), getattr(self.network, "processor", None)
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else torch.get_num_threads()
        precision = [torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision]
        inputs = {"images": tensors_digest({"images": images}), "extractor": self.info, "classes": self.class_names}
        inputs |= {"device": [device.type, name, *precision], "versions": list(map(version, PACKAGES))}
        inputs["processor"] = processor and json.loads(processor.to_json_string())
        file = Path(cache_dir or constants.HF_HOME) / "diffusers_cl" / f"features-{_key(inputs)}.safetensors"
        if (saved := load_tensors(file, inputs)) is None:
            features, predictions = self(images)
            saved = {"features": features}
            if predictions is not None:
                saved["predictions"] = torch.tensor([self.class_names.index(found) for found in predictions])
            try:
                with replacing(file) as own:
                    save_tensors(own, saved, inputs)
            except (StorageError, OSError) as error:
                warnings.warn(f"features of real images are not kept: {first_line(error)}", stacklevel=2)
        predictions = saved.get("predictions")
        return saved["features"], None if predictions is None else [self.class_names[i] for i in predictions]


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

        # Said outright: else somebody at a terminal is asked.
        self.model = AutoModelForImageClassification.from_pretrained(
            name, use_safetensors=True, trust_remote_code=False
        )
        self.processor = AutoImageProcessor.from_pretrained(name, trust_remote_code=False)
        self.class_names = [self.model.config.id2label[i] for i in range(self.model.config.num_labels)]

    def forward(self, images):
        inputs = self.processor(list(images.expand(-1, 3, -1, -1).cpu()), return_tensors="pt").to(images.device)
        logits = self.model(**inputs).logits
        outputs = self.model.base_model(**inputs)
        pooled = getattr(outputs, "pooler_output", None)
        return (outputs.last_hidden_state[:, 0] if pooled is None else pooled).flatten(1), logits


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
    recipe["torch"] = [torch.__version__, torch.device(device).type, torch.get_num_threads()]
    folder = Path(config.cache_dir or constants.HF_HOME) / "diffusers_cl"
    file = folder / f"classifier-{_key(recipe)}.safetensors"
    if (saved := load_tensors(file, recipe)) is not None:
        classifier.load_state_dict(saved)
        return classifier
    classifier = train_classifier(train, rows, device, quiet).cpu()
    with replacing(file) as own:
        save_tensors(own, classifier.state_dict(), recipe)
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
        return FeatureExtractor("classifier", network, device, train.names, class_names)
    if config.feature_extractor == "inception":
        return _inception(config.feature_extractor_weights_path, device)
    return load_classifier("feature_extractor", config.feature_extractor, class_names, device)


def _inception(weights_path: str | None, device) -> FeatureExtractor:
    try:
        weights_path = weights_path or str(published_weights())
        with contextlib.redirect_stdout(None), tensors_alone():
            return FeatureExtractor("inception", _Inception(weights_path), device)
    except (OSError, urllib.error.URLError, pickle.UnpicklingError, RuntimeError, ValueError, EOFError) as error:
        raise DataError(
            f"cannot get the Inception weights ({first_line(error)}). Give a file with"
            " feature_extractor_weights_path, or set feature_extractor: classifier"
        ) from error


def load_classifier(key: str, name: str, class_names: Sequence[str], device) -> FeatureExtractor:
    """
    Returns a transformers image classifier; its predictions count where it knows all of the classes.

    Args:
        key (`str`): the configuration's, for messages.
        name (`str`): a Hub id or folder.
        class_names (`list[str]`): of the stream.
    """
    try:
        folder, _ = model_folder(name, None, CLASSIFIER_FILES)
        network = _Transformers(str(folder))
    except (RunError, OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise DataError(
            f"{key}: cannot load {name!r}: {first_line(error)}; allowed:"
            f" {'inception, classifier, ' * (key == 'feature_extractor')}a transformers image classifier (Hub id or folder)"
        ) from error
    names = network.class_names if set(class_names) <= set(network.class_names) else None
    return FeatureExtractor(name, network, device, names)


def save_extractor(extractor: FeatureExtractor, folder: str | Path) -> None:
    """Writes `extractor.safetensors` into a folder, if it is the small classifier; the others have names to get them by."""
    if isinstance(extractor.network, SmallClassifier):
        description = {
            "channels": extractor.network.channels,
            "resolution": extractor.network.resolution,
            "class_names": extractor.class_names,
            "known_classes": list(extractor.known_classes),
        }
        tensors = {name: t.cpu().contiguous() for name, t in extractor.network.state_dict().items()}
        save_file(tensors, Path(folder) / EXTRACTOR_NAME, {"classifier": json.dumps(description)})


def load_extractor(
    folder: str | Path, info: dict, config: TrainingConfig, device, class_names: Sequence[str] = ()
) -> FeatureExtractor:
    """
    Returns the extractor that a task folder was measured with.

    Args:
        folder (`Path`): the task's consolidation folder; the small classifier lies in it.
        info (`dict`): the extractor's name and sha256 in the task's state.
        config ([`TrainingConfig`]): where another is found.
        device (`torch.device`).
        class_names (list of `str`, *optional*): another's predictions count where it knows all of these.

    Raises:
        CheckpointError: when the classifier's file is missing or damaged.
        DataError: when another extractor cannot be had, or is not the one that the task was measured with.
    """
    path = Path(folder) / EXTRACTOR_NAME
    if info["name"] == "classifier":
        try:
            with safe_open(path, framework="pt") as file:
                description = json.loads((file.metadata() or {})["classifier"])
            names, known = list(map(str, description["class_names"])), list(map(str, description["known_classes"]))
            # Without memory, until the file's weights are known to fit.
            with torch.device("meta"):
                network = SmallClassifier(description["channels"], len(names), description["resolution"])
            network.load_state_dict(load_file(path), assign=True)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
            raise CheckpointError(f"{path} cannot be read as a classifier: {first_line(error)}") from error
        extractor = FeatureExtractor("classifier", network.float(), device, names, known)
    elif info["name"] == "inception":
        extractor = _inception(config.feature_extractor_weights_path, device)
    else:
        extractor = load_classifier("feature_extractor", config.feature_extractor, class_names, device)
    if extractor.info["sha256"] != info["sha256"]:
        raise DataError(
            f"feature_extractor: {extractor.name!r} has weights of sha256 {extractor.info['sha256'][:12]}, the old classes"
            f" were measured with {info['sha256'][:12]}: distances would not compare"
        )
    if "trained_on" in info:
        extractor.info["trained_on"] = info["trained_on"]
    return extractor
