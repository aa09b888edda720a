"""Feature extractors: what they return, what they cache, what they refuse."""

import json
import pickle

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from script_helpers import arguments
from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

from diffusers_cl import classifier
from diffusers_cl.arguments import parse_config
from diffusers_cl.classifier import SmallClassifier, train_classifier
from diffusers_cl.config import TrainingConfig
from diffusers_cl.data import load_splits
from diffusers_cl.errors import CheckpointError, DataError
from diffusers_cl.features import (
    FeatureExtractor,
    load_classifier,
    load_extractor,
    resolve_feature_extractor,
    save_extractor,
)
from diffusers_cl.metrics import task_metrics


CPU = torch.device("cpu")
CLASSES = ["0", "1", "2"]


@pytest.fixture(scope="module")
def splits(files, tmp_path_factory):
    return load_splits(parse_config(arguments(files, tmp_path_factory.mktemp("run"))))


def resolve(files, output_dir, splits, class_names=CLASSES, **settings):
    config = parse_config(arguments(files, output_dir, **settings))
    return resolve_feature_extractor(config, splits[0], class_names, CPU, True)


def test_classifier_is_trained_once_and_leaves_the_random_state_alone(files, splits, tmp_path):
    state = torch.random.get_rng_state()
    settings = {"feature_extractor": "classifier", "cache_dir": tmp_path}
    extractor = resolve(files, tmp_path, splits, seed=0, **settings)
    assert torch.random.get_rng_state().equal(state)

    test = splits[1].select(splits[1].rows_of(CLASSES))
    images = test.decode(range(len(test.labels)))
    features, predictions = extractor(images)
    assert features.dtype == torch.float64 and len(features) == len(predictions) == len(images)
    # The classes that it saw are easy; the issue asks 97 % of a classifier of all ten.
    names = [test.names[label] for label in test.labels]
    assert sum(map(str.__eq__, predictions, names)) >= 0.97 * len(names)
    assert extractor.name == "classifier" and extractor.class_names == splits[0].names

    # Another seed of the run uses the same file, which is not written again.
    (file,) = tmp_path.rglob("classifier-*.safetensors")
    content, written = file.read_bytes(), file.stat().st_mtime_ns
    again = resolve(files, tmp_path, splits, seed=1, **settings)
    assert file.stat().st_mtime_ns == written and file.read_bytes() == content
    assert again.info == extractor.info and again(images)[0].equal(features)
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and path != file]


def test_digits_are_measured_with_the_network_that_is_shipped(files, splits, tmp_path):
    """If this fails because the recipe was changed: train it anew, ship it, and say that no result before compares."""
    settings = {"feature_extractor": "classifier", "cache_dir": tmp_path / "cache"}
    extractor = resolve(files, tmp_path, splits, class_names=splits[0].names, **settings)
    assert extractor.info["sha256"] == "0e0484f1c5df79f01e267f81f63fdc59d17aec1b5aee203c102ce26e8f763df9"
    assert not (tmp_path / "cache").exists()
    _, predictions = extractor(splits[1].decode(range(len(splits[1].labels))))
    names = [splits[1].names[label] for label in splits[1].labels]
    assert sum(map(str.__eq__, predictions, names)) >= 0.97 * len(names)


@pytest.mark.parametrize("kind", ["empty", "truncated", "flipped", "swapped"])
def test_a_damaged_classifier_in_the_cache_is_trained_again(files, splits, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(classifier, "CLASSIFIER_STEPS", 3)
    settings = {"feature_extractor": "classifier", "cache_dir": tmp_path}
    whole = resolve(files, tmp_path, splits, **settings)
    (file,) = tmp_path.rglob("classifier-*.safetensors")
    content = file.read_bytes()
    flipped = bytearray(content)
    flipped[-9] ^= 1
    resolve(files, tmp_path, splits, class_names=["4", "5"], **settings)
    (other,) = set(tmp_path.rglob("classifier-*.safetensors")) - {file}
    damaged = {"empty": b"", "truncated": content[:-8], "flipped": flipped, "swapped": other.read_bytes()}
    file.write_bytes(damaged[kind])
    assert resolve(files, tmp_path, splits, **settings).info == whole.info
    assert file.read_bytes() == content


def test_the_classifier_is_a_function_of_its_seed(splits, monkeypatch):
    monkeypatch.setattr(classifier, "CLASSIFIER_STEPS", 5)
    rows = splits[0].rows_of(CLASSES)
    state = torch.random.get_rng_state()
    default, zero, one = (
        train_classifier(splits[0], rows, CPU, True, **seed).state_dict() for seed in ({}, {"seed": 0}, {"seed": 1})
    )
    assert torch.random.get_rng_state().equal(state)
    # Every measurement so far was made with the default.
    assert all(default[name].equal(zero[name]) for name in default)
    assert not default["head.weight"].equal(one["head.weight"])


def test_transformers_classifier(files, splits, tmp_path):
    extractor = resolve(files, tmp_path, splits)
    state = torch.random.get_rng_state()
    images = splits[1].decode(range(300))
    features, predictions = extractor(images)
    assert torch.random.get_rng_state().equal(state)
    assert features.shape == (300, 8) and set(predictions) <= set(splits[0].names)
    # Batches of another size, images of another kind.
    torch.testing.assert_close(extractor(images[:7])[0], features[:7], rtol=1e-4, atol=1e-6)
    assert extractor(images[:7].expand(-1, 3, -1, -1))[0].equal(extractor(images[:7])[0])


def test_transformers_classifier_of_other_classes_gives_features_alone(files, splits, tmp_path):
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=3)
    ResNetForImageClassification(config).save_pretrained(tmp_path / "extractor")
    ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=1.0).save_pretrained(tmp_path / "extractor")
    extractor = resolve(files, tmp_path, splits, feature_extractor=tmp_path / "extractor")
    features, predictions = extractor(splits[1].decode(range(5)))
    assert features.shape == (5, 8) and predictions is None


class Malicious:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return open, (str(self.file), "w")


@pytest.mark.parametrize("kind", ["pickle", "torch"])
def test_weights_with_code_in_them_are_refused(files, splits, tmp_path, kind):
    weights = {"weight": torch.zeros(2), "code": Malicious(tmp_path / "executed")}
    if kind == "torch":
        torch.save(weights, tmp_path / "inception.pth")
    else:
        (tmp_path / "inception.pth").write_bytes(pickle.dumps(weights))
    settings = {"feature_extractor": "inception", "feature_extractor_weights_path": tmp_path / "inception.pth"}
    with pytest.raises(DataError, match="feature_extractor_weights_path"):
        resolve(files, tmp_path, splits, **settings)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [None, b"", b"no weights"])
def test_weights_that_are_none(files, splits, tmp_path, content):
    if content is not None:
        (tmp_path / "inception.pth").write_bytes(content)
    settings = {"feature_extractor": "inception", "feature_extractor_weights_path": tmp_path / "inception.pth"}
    with pytest.raises(DataError, match="inception.pth|feature_extractor_weights_path"):
        resolve(files, tmp_path, splits, **settings)


def test_weights_of_another_network(files, splits, tmp_path):
    torch.save({"weight": torch.zeros(2)}, tmp_path / "inception.pth")
    settings = {"feature_extractor": "inception", "feature_extractor_weights_path": tmp_path / "inception.pth"}
    with pytest.raises(DataError, match="feature_extractor_weights_path"):
        resolve(files, tmp_path, splits, **settings)


def test_inception_features_from_a_file(files, tmp_path, splits, monkeypatch):
    # The real network with random weights: its own are a download.
    from torch_fidelity import feature_extractor_inceptionv3 as inception

    with monkeypatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(inception.FeatureExtractorInceptionV3, "load_state_dict", lambda *args, **kwargs: None)
        network = inception.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    settings = {"feature_extractor": "inception", "feature_extractor_weights_path": tmp_path / "weights.pth"}
    extractor = resolve(files, tmp_path / "run", splits, **settings)
    images = splits[1].decode(range(4))
    features, predictions = extractor(images)
    assert features.shape == (4, 2048) and features.dtype == torch.float64 and predictions is None
    # Grey images are repeated to RGB as they are, in uint8.
    expected = network(images.repeat(1, 3, 1, 1))[0].double()
    assert torch.allclose(features, expected)
    assert set(task_metrics(features, features, extractor.name)) == {"fid", "kid", "precision", "recall"}


def test_the_small_classifier_travels(splits, files, tmp_path):
    config = parse_config(arguments(files, tmp_path / "run", feature_extractor="classifier"))
    extractor = resolve_feature_extractor(config, splits[0], [str(digit) for digit in range(10)], CPU, True)
    save_extractor(extractor, tmp_path)
    loaded = load_extractor(tmp_path, extractor.info, config, CPU)
    images = splits[1].decode(range(20))
    features, predictions = extractor(images)
    again, same = loaded(images)
    assert torch.equal(features, again) and predictions == same
    assert loaded.known_classes == extractor.known_classes == [str(digit) for digit in range(10)]
    with pytest.raises(DataError, match="sha256 .* were measured with 0000"):
        load_extractor(tmp_path, {**extractor.info, "sha256": "0" * 64}, config, CPU)
    path = tmp_path / "extractor.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="cannot be read as a classifier"):
        load_extractor(tmp_path, extractor.info, config, CPU)


@pytest.mark.parametrize(
    "change",
    [
        {"channels": 10**9},
        {"resolution": 10**6},
        {"resolution": "8"},
        {"channels": None},
        {"class_names": 3},
        {"class_names": ["0"]},
        {"known_classes": None},
    ],
    ids=str,
)
def test_a_classifier_that_is_described_wrongly_takes_no_memory(tmp_path, change):
    extractor = FeatureExtractor("classifier", SmallClassifier(1, 10, 8), CPU, [str(digit) for digit in range(10)])
    save_extractor(extractor, tmp_path)
    path = tmp_path / "extractor.safetensors"
    with safe_open(path, "pt") as file:
        description = json.loads(file.metadata()["classifier"])
    save_file(load_file(path), path, {"classifier": json.dumps({**description, **change})})
    with pytest.raises(CheckpointError, match="cannot be read as a classifier"):
        load_extractor(tmp_path, extractor.info, TrainingConfig(), CPU)


def test_another_network_is_not_the_extractor(files, tmp_path):
    config = parse_config(arguments(files, tmp_path / "run"))
    extractor = load_extractor(tmp_path, {"name": "elsewhere", "sha256": sha256_of(files)}, config, CPU)
    assert extractor.name == str(files / "extractor")
    with pytest.raises(DataError, match="feature_extractor: .* were measured with"):
        load_extractor(tmp_path, {"name": "elsewhere", "sha256": "0" * 64}, config, CPU)
    # It has its own names of classes and a file of its own is not kept.
    save_extractor(extractor, tmp_path)
    assert not list(tmp_path.glob("extractor*"))


def sha256_of(files) -> str:
    return load_classifier("feature_extractor", str(files / "extractor"), [], CPU).info["sha256"]
