"""Measuring in several processes, and with what was measured before: the same numbers as in one process, in one go."""

import json
from collections.abc import Callable

import pytest
import torch
from process_helpers import in_processes
from script_helpers import arguments

from diffusers_cl import classifier, features
from diffusers_cl.arguments import parse_config
from diffusers_cl.classifier import SmallClassifier
from diffusers_cl.data import load_splits
from diffusers_cl.errors import CheckpointError, DataError
from diffusers_cl.evaluation import create_evaluation, create_extractors
from diffusers_cl.features import FeatureExtractor, load_classifier, save_extractor
from diffusers_cl.files import publish_folder
from diffusers_cl.folders import CONSOLIDATION
from diffusers_cl.randomness import starting_noise
from diffusers_cl.start import Start


CPU = torch.device("cpu")
NAMES = [str(digit) for digit in range(10)]
TASKS = [["0", "1"], ["2", "3"]]
CLASS_IDS = {"0": 0, "1": 1, "2": 2, "3": 3}


@pytest.fixture(scope="module")
def splits(files, tmp_path_factory):
    return load_splits(parse_config(arguments(files, tmp_path_factory.mktemp("run"))))


def small_extractor(seed: int = 0) -> FeatureExtractor:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return FeatureExtractor("classifier", SmallClassifier(1, 10, 8), CPU, NAMES)


def noise_images(count: int) -> torch.Tensor:
    return torch.randint(256, (count, 1, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


# 23 images in batches of 5 are five, the last of three: it is in a full round, in one with an idle process, or alone.
@pytest.mark.parametrize("num_images", [23, 20, 3])
@pytest.mark.parametrize("num_processes", [2, 3, 4])
def test_features_are_bit_equal_for_any_number_of_processes(monkeypatch, num_processes, num_images):
    monkeypatch.setattr(features, "BATCH_SIZE", 5)
    images = noise_images(num_images)
    expected, names = small_extractor()(images)
    assert len(expected) == len(names) == num_images and (len(set(names)) > 1 or num_images == 3)
    forwards = []

    def work(rank, gather):
        # Trained on another machine, it would not be the same; all take the first process's.
        extractor = extractors[rank]
        extractor.share_out(rank, num_processes, gather)
        extractor.network.register_forward_pre_hook(lambda *_: forwards.append(rank))
        return *extractor(images), extractor.info

    extractors = [small_extractor(rank) for rank in range(num_processes)]
    assert len({extractor.info["sha256"] for extractor in extractors}) == num_processes
    for found, found_names, info in in_processes(num_processes, work):
        assert found.dtype == torch.float64 and torch.equal(found, expected) and found_names == names
        assert info == small_extractor().info
    # Each has its part of the work.
    num_rounds = -(-num_images // (5 * num_processes))
    assert sorted(forwards) == sorted(list(range(num_processes)) * num_rounds)


def test_other_networks_share_features_alone(monkeypatch, files, splits):
    monkeypatch.setattr(features, "BATCH_SIZE", 5)
    images = splits[1].decode(range(12))
    # It does not know all of these classes.
    alone, *extractors = (
        load_classifier("feature_extractor", f"{files / 'extractor'}", ["owl"], CPU) for _ in range(3)
    )
    expected, names = alone(images)
    assert names is None

    def work(rank, gather):
        extractors[rank].share_out(rank, 2, gather)
        return extractors[rank](images)

    for found, names in in_processes(2, work):
        assert torch.equal(found, expected) and names is None


@pytest.mark.parametrize("layer", ["body", "head"])
@pytest.mark.parametrize("num_processes", [1, 2])
def test_features_that_are_not_finite_stop_all_processes(monkeypatch, num_processes, layer):
    monkeypatch.setattr(features, "BATCH_SIZE", 5)
    extractors = [small_extractor() for _ in range(num_processes)]
    for extractor in extractors:
        next(getattr(extractor.network, layer).parameters()).fill_(float("nan"))

    def work(rank, gather):
        extractors[rank].share_out(rank, num_processes, gather)
        with pytest.raises(DataError, match="'classifier' gives numbers that are not finite"):
            extractors[rank](noise_images(8))

    in_processes(num_processes, work)


# Real images


@pytest.mark.parametrize("recognises", [True, False])
def test_features_of_real_images_are_extracted_once(tmp_path, recognises):
    images, forwards = noise_images(7), []

    def extractor(seed: int = 0) -> FeatureExtractor:
        found = small_extractor(seed)
        found.class_names = NAMES if recognises else None
        found.network.register_forward_pre_hook(lambda *_: forwards.append(seed))
        return found

    expected, names = extractor()(images)
    for _ in range(3):
        # Of another start of a run each.
        features, predictions = extractor().of_real_images(images, tmp_path)
        assert features.dtype == torch.float64 and torch.equal(features, expected) and predictions == names
    assert forwards == [0, 0] and (names is None) is not recognises
    # What is not the same is not taken: weights, images, a damaged file.
    extractor(1).of_real_images(images, tmp_path)
    extractor().of_real_images(images[:6], tmp_path)
    assert forwards == [0, 0, 1, 0]
    for file in (tmp_path / "diffusers_cl").iterdir():
        file.write_bytes(file.read_bytes()[:-8] + bytes(8))
    assert torch.equal(extractor().of_real_images(images, tmp_path)[0], expected) and len(forwards) == 5


# A whole evaluation


def sample(class_ids: list[int], keys: list[tuple]) -> torch.Tensor:
    """Stands for a model: every image a function of its class and key."""
    noise = starting_noise(keys, (1, 8, 8), seed=0)
    return (noise * 40 + 60 * torch.tensor(class_ids)[:, None, None, None]).clamp(0, 255).to(torch.uint8)


@pytest.mark.parametrize("with_classifier", [False, True])
def test_metrics_are_bit_equal_for_any_number_of_processes(monkeypatch, files, splits, tmp_path, with_classifier):
    monkeypatch.setattr(features, "BATCH_SIZE", 6)
    settings = {"eval_classifier": files / "extractor"} if with_classifier else {}
    config = parse_config(arguments(files, tmp_path, **settings))

    def measure(extractors, *sharing):
        evaluation = create_evaluation(config, None, splits[1], TASKS, CLASS_IDS, *extractors, *sharing)
        rows, images = zip(*(evaluation(sample, num_tasks) for num_tasks in (1, 2)), strict=True)
        return evaluation.report(rows), images, evaluation.references

    def extractors():
        if not with_classifier:
            return small_extractor(), None
        return small_extractor(), load_classifier("eval_classifier", config.eval_classifier, list(CLASS_IDS), CPU)

    report, images, references = measure(extractors())
    assert report["metrics"]["accuracy"]["average"][-1] is not None
    assert ("eval_classifier" in report["feature_extractor_info"]) == with_classifier
    for num_processes in (2, 3):
        everyones = [extractors() for _ in range(num_processes)]
        for found in in_processes(
            num_processes, lambda rank, gather, e=everyones, n=num_processes: measure(e[rank], rank, n, gather)
        ):
            assert found[0] == report
            assert all(map(torch.equal, found[1], images))
            assert all(map(torch.equal, found[2].mean + found[2].covariance, references.mean + references.covariance))


# The extractor of a run that goes on


def write_task(folder, extractor: FeatureExtractor) -> None:
    """Writes of a task folder what measuring needs."""

    def write(partial):
        (partial / CONSOLIDATION).mkdir()
        state = {"schema": 1, "task": int(folder.name[-2:]), "feature_extractor_info": extractor.info}
        (partial / CONSOLIDATION / "state.json").write_text(json.dumps(state))
        save_extractor(extractor, partial / CONSOLIDATION)

    publish_folder(folder, write, CONSOLIDATION)


@pytest.fixture
def create(files, splits, tmp_path, monkeypatch) -> Callable:
    """Returns a function of settings that creates the extractors of a run in `tmp_path / "run"`, which has no cache."""
    monkeypatch.setattr(classifier, "CLASSIFIER_STEPS", 2)

    def run(start=None, **settings):
        settings = {"feature_extractor": "classifier", "cache_dir": tmp_path / "cache", **settings}
        config = parse_config(arguments(files, tmp_path / "run", **settings))
        return create_extractors(config, start, splits[0], CLASS_IDS, CPU, True)

    return run


def test_a_run_that_goes_on_has_the_extractor_of_its_tasks(create, tmp_path):
    kept = small_extractor(3)
    kept.known_classes = list(CLASS_IDS)
    write_task(tmp_path / "run" / "task-00", small_extractor(2))
    write_task(tmp_path / "run" / "task-01", kept)
    # What it was trained on, here or elsewhere, is not there any more.
    extractor, eval_classifier = create()
    assert extractor.info == kept.info and extractor.known_classes == list(CLASS_IDS) and eval_classifier is None
    assert not (tmp_path / "cache").exists()
    # The folder is deleted before the run begins.
    assert create(overwrite_output_dir="true")[0].info["sha256"] != kept.info["sha256"]
    assert (tmp_path / "cache").exists()


def test_a_run_from_a_model_has_the_extractor_of_that(create, tmp_path):
    write_task(tmp_path / "task-00", small_extractor(2))
    state = {"feature_extractor_info": small_extractor(2).info}
    start = Start(tmp_path / "task-00", state, "elsewhere", None, False)
    assert create(start)[0].info == small_extractor(2).info


def test_another_extractor_than_that_of_the_tasks_is_refused(create, files, tmp_path):
    other = load_classifier("feature_extractor", str(files / "extractor"), list(CLASS_IDS), CPU)
    write_task(tmp_path / "run" / "task-00", other)
    extractor, _ = create(feature_extractor=files / "extractor")
    assert extractor.info == other.info and extractor.class_names == other.class_names
    other.info["sha256"] = "0" * 64
    write_task(tmp_path / "run" / "task-00", other)
    with pytest.raises(DataError, match="feature_extractor: .* were measured with 0000"):
        create(feature_extractor=files / "extractor")


def test_a_damaged_task_is_one_sentence(create, tmp_path):
    write_task(tmp_path / "run" / "task-00", small_extractor())
    path = tmp_path / "run" / "task-00" / CONSOLIDATION / "extractor.safetensors"
    path.write_bytes(path.read_bytes()[:-4] + b"0000")
    with pytest.raises(CheckpointError, match="extractor.safetensors is damaged"):
        create()
