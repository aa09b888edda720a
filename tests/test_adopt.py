"""scripts/adopt.py: a model that never heard of this package becomes a task folder, and learns a new class."""

import json
import runpy
import subprocess
import sys

import numpy as np
import pytest
import torch
from adopt_helpers import CPU, NAMES, UNET, adopted, config_for, names_file, plain_model, write_real_images
from diffusers import DDIMScheduler, UNet2DModel
from hub_server import HubServer
from safetensors.torch import load_file
from script_helpers import ROOT, run, write_images

from diffusers_cl import classifier
from diffusers_cl.adopt import adopt, as_split
from diffusers_cl.config import TrainingConfig
from diffusers_cl.data import load_splits
from diffusers_cl.errors import DataError, StorageError
from diffusers_cl.ewc import DiagonalEWC, Rank1EWC
from diffusers_cl.features import load_extractor
from diffusers_cl.files import verify_folder
from diffusers_cl.pipeline import ClassConditionalPipeline
from diffusers_cl.references import References
from diffusers_cl.sampling import sample_images
from diffusers_cl.source import open_source


SCRIPT = ROOT / "scripts" / "adopt.py"
# Adoption by the script in few steps.
FAST = ["--num_images_per_class", "8", "--num_inference_steps", "3", "--batch_size", "24", "--device", "cpu"]
# A user's process: what else lies in the repo is uploaded, and never asked for again.
UPLOAD_AND_ADOPT = """
import runpy, sys
from huggingface_hub import HfApi
model, script, *arguments = sys.argv[1:]
api = HfApi()
api.create_repo("me/plain")
api.upload_folder(repo_id="me/plain", folder_path=model)
api.create_tag("me/plain", tag="v1")
for name in ("pipeline.py", "unet/diffusion_pytorch_model.bin", "consolidation.py"):
    api.upload_file(repo_id="me/plain", path_or_fileobj=b"raise SystemExit(99)", path_in_repo=name)
sys.argv = [script, "--model", "me/plain", *arguments]
runpy.run_path(script, run_name="__main__")
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return plain_model(tmp_path_factory)


@pytest.fixture(scope="module")
def own(model, files, tmp_path_factory):
    """A task folder from a model's own samples, with a penalty."""
    folder = tmp_path_factory.mktemp("own")
    settings = {"penalty": "rank1_ewc", "ewc_lambda": "auto", "fisher_samples": 12}
    return adopted(model, files, folder / "own", names_file(folder), **settings)


@pytest.fixture
def adopt_script(monkeypatch):
    """Returns a function of the command line that runs the script, and gives its exit code."""

    def call(*arguments) -> int:
        monkeypatch.setattr(sys, "argv", ["adopt.py", *FAST, *map(str, arguments)])
        try:
            runpy.run_path(str(SCRIPT), run_name="__main__")
        except SystemExit as error:
            return error.code
        return 0

    return call


def state_of(folder) -> dict:
    return json.loads((folder / "consolidation" / "state.json").read_text())


def test_from_the_hub_to_a_new_class(model, files, tmp_path):
    """Adopts a repo in one process and goes on from it in another, with one new class and no old data."""
    labels = names_file(tmp_path)
    command = ["--output_dir", tmp_path / "adopted", "--labels", labels, "--revision", "v1", *FAST]
    command += ["--feature_extractor", files / "extractor", "--penalty", "ewc", "--fisher_samples", "8"]
    with HubServer(tmp_path / "hub") as hub:
        done = subprocess.run(
            [sys.executable, "-c", UPLOAD_AND_ADOPT, str(model), str(SCRIPT), *map(str, command)],
            env=hub.environment(tmp_path / "home") | {"CUDA_VISIBLE_DEVICES": ""},
            cwd=ROOT,
            text=True,
            capture_output=True,
        )
        assert done.returncode == 0, done.stderr
        fetched = {request.path.partition("/resolve/")[2].partition("/")[2] for request in hub.sent("GET .*/resolve/")}
        repo = hub.store.repos["me/plain"]
        commit = hub.store.resolve(repo, "v1")
    assert f"{tmp_path / 'adopted'}: 3 classes (cat, dog, bird)" in done.stdout
    assert fetched == {"model_index.json", "unet/config.json", UNET, "scheduler/scheduler_config.json"}

    before = state_of(tmp_path / "adopted")
    assert before["lineage"] == {"previous": {"model": "me/plain", "revision": commit}}
    assert before["references"] == "own samples" and before["dataset"] == "samples of me/plain"
    assert before["config"]["replay"] == "generative_distillation" and before["config"]["license"] == "unknown"

    data = write_images(tmp_path / "data", {"fox": 24})
    start = ["--pretrained_model_name_or_path", tmp_path / "adopted", "--train_data_dir", data]
    # The bare command but for how long it takes.
    short = {"max_train_steps": 2, "replay_images_per_class": 2, "report_to": "none", "num_threads": 1}
    options = [part for key, value in short.items() for part in (f"--{key}", value)]
    assert run([*map(str, start), "--output_dir", str(tmp_path / "run"), *map(str, options)]) == 0

    after = state_of(tmp_path / "run" / "task-01")
    assert after["task"] == 1 and after["tasks"] == [NAMES, ["fox"]]
    assert after["class_ids"] == {"cat": 0, "dog": 1, "bird": 2, "fox": 3}
    assert after["rows"][0] == before["rows"][0] and after["rows"][1]["num_images"] == [24, 5]
    assert after["config"]["penalty"] == "ewc" and after["config"]["prediction_type"] == "sample"
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    first, second = metrics["metrics"]["fd_features"]["matrix"]
    assert first == before["rows"][0]["metrics"]["fd_features"] and len(second) == 2 and second[0] > 0
    replay = load_file(tmp_path / "run" / "replay" / "task-01" / "images.safetensors")
    assert replay["class_labels"].tolist() == [0, 0, 1, 1, 2, 2]
    assert DiagonalEWC.from_pretrained(tmp_path / "run" / "task-01" / "consolidation").num_tasks == 2
    report = (tmp_path / "run" / "report.md").read_text()
    assert "task-01" in report
    pipeline = ClassConditionalPipeline.from_pretrained(tmp_path / "run" / "task-01")
    assert list(pipeline.known_classes.values()) == [*NAMES, "fox"]


def test_the_folder_is_like_any_other(model, own):
    verify_folder(own, "consolidation")
    found = {str(path.relative_to(own)) for path in own.rglob("*") if path.is_file()}
    kept = {
        f"consolidation/{name}"
        for name in ("state.json", "manifest.json", "references.safetensors", "ewc.safetensors")
    }
    assert found == {
        "model_index.json",
        "pipeline.py",
        "unet/config.json",
        UNET,
        "scheduler/scheduler_config.json",
    } | kept | {
        "README.md",
        "samples.png",
    }
    # The weights are the model's own, to the bit, and so are the images.
    theirs, ours = load_file(model / UNET), load_file(own / UNET)
    assert theirs.keys() == ours.keys() and all(theirs[name].equal(ours[name]) for name in theirs)
    pipeline = ClassConditionalPipeline.from_pretrained(own)
    pipeline.set_progress_bar_config(disable=True)
    unet = UNet2DModel.from_pretrained(model, subfolder="unet")
    scheduler = DDIMScheduler.from_pretrained(model, subfolder="scheduler")
    assert scheduler.config.prediction_type == pipeline.scheduler.config.prediction_type == "sample"
    assert scheduler.alphas_cumprod.equal(pipeline.scheduler.alphas_cumprod)
    plain = ClassConditionalPipeline(unet, scheduler, {2: "bird"})
    plain.set_progress_bar_config(disable=True)
    drawn = [
        one("bird", num_inference_steps=3, generator=torch.Generator().manual_seed(0), output_type="latent").images
        for one in (pipeline, plain)
    ]
    assert drawn[0].equal(drawn[1])

    state = state_of(own)
    assert state["task"] == 0 and state["tasks"] == [NAMES] and state["seen_classes"] == NAMES
    assert state["class_ids"] == {"cat": 0, "dog": 1, "bird": 2}
    assert state["rows"][0]["num_images"] == [60] and state["fisher"][0]["num_samples"] == 12
    assert state["lineage"]["previous"] == {"model": model.name, "revision": None}
    card = (own / "README.md").read_text()
    assert f"samples of {model.name}" in card and "`cat` (0), `dog` (1), `bird` (2)" in card


def test_references_are_of_the_models_own_samples(model, own, files):
    source, state = open_source(str(model)), state_of(own)
    pipeline = ClassConditionalPipeline(source.unet, source.scheduler)
    keys = [("adopt", "test", name, index) for name in NAMES for index in range(20)]
    images = sample_images(pipeline, [0] * 20 + [1] * 20 + [2] * 20, keys, 0, 3, 60, disable_progress_bar=True)
    config = TrainingConfig(feature_extractor=str(files / "extractor"))
    features, _ = load_extractor(own / "consolidation", state["feature_extractor_info"], config, CPU)(images)
    references = References.load(own / "consolidation")
    assert references.labels == [{"cat": 20, "dog": 20, "bird": 20}] and state["references"] == "own samples"
    torch.testing.assert_close(references.mean[0], features.mean(dim=0))
    torch.testing.assert_close(references.covariance[0], features.T.cov())
    torch.testing.assert_close(references.class_mean["dog"], features[20:40].mean(dim=0))
    torch.testing.assert_close(references.class_variance["bird"], features[40:].var(dim=0))


def test_the_penalty_is_zero_at_the_adopted_weights(own):
    penalty = Rank1EWC.from_pretrained(own / "consolidation")
    unet = UNet2DModel.from_pretrained(own, subfolder="unet")
    assert penalty.num_tasks == 1 and penalty.strengths()[0] > 0
    # The direction was measured on the model itself: along it the penalty grows.
    assert penalty(unet).item() == pytest.approx(0, abs=1e-8)
    with torch.no_grad():
        for name, parameter in unet.named_parameters():
            parameter += 0.1 * penalty.tensors["direction"][name][0]
    assert penalty(unet).item() == pytest.approx(0.5 * penalty.strengths()[0] * 0.01, rel=1e-3)


def test_data_takes_the_place_of_samples(model, files, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "CLASSIFIER_STEPS", 30)
    # One class more than the model's, and another order.
    data = write_real_images(tmp_path / "data", 20)
    write_images(data, {"ant": 20})
    settings = {"train_data_dir": str(data), "eval_images_per_class": None, "feature_extractor": "classifier"}
    settings |= {"replay": "memory", "memory_images_per_class": 3, "cache_dir": str(tmp_path / "cache")}
    folder = adopted(model, files, tmp_path / "adopted", names_file(tmp_path), **settings)
    state, kept = state_of(folder), folder / "consolidation"
    assert state["references"] == "data" and state["dataset"] == "data"
    info = state["feature_extractor_info"]
    assert info["name"] == "classifier" and info["trained_on"] == "data" and (kept / "extractor.safetensors").exists()

    _, test = load_splits(TrainingConfig(train_data_dir=str(data), resolution=8, cache_dir=settings["cache_dir"]))
    extractor = load_extractor(kept, info, TrainingConfig(), CPU)
    references = References.load(kept)
    for name in NAMES:
        features, _ = extractor(test.decode(test.rows_of([name])))
        torch.testing.assert_close(references.class_mean[name], features.mean(dim=0), rtol=1e-5, atol=1e-5)
    assert references.labels == [{"cat": 4, "dog": 4, "bird": 4}]
    assert "ant" in extractor.class_names and list(extractor.known_classes) == NAMES
    # Patterns of light, which the classifier and the model were both taught.
    assert state["rows"][0]["metrics"]["accuracy"][0] >= 0.9
    memory = load_file(kept / "memory.safetensors")
    assert memory["class_labels"].tolist() == [0] * 3 + [1] * 3 + [2] * 3 and memory["images"].dtype == torch.uint8


def test_data_without_the_models_classes(model, files, tmp_path):
    data = str(write_real_images(tmp_path / "data", 10, ["cat", "dog"]))
    with pytest.raises(DataError, match="the data has no class 'bird'.* it has cat, dog.*--labels"):
        adopted(model, files, tmp_path / "adopted", names_file(tmp_path), train_data_dir=data)
    # Those of its classes that are there.
    folder = adopted(
        model, files, tmp_path / "two", names_file(tmp_path, {"0": "cat", "1": "dog"}), train_data_dir=data
    )
    state = state_of(folder)
    assert state["class_ids"] == {"cat": 0, "dog": 1}
    assert ClassConditionalPipeline.from_pretrained(folder).known_classes == {0: "cat", 1: "dog"}


def test_a_classifier_without_data_learns_the_models_samples(model, files, tmp_path, monkeypatch):
    monkeypatch.setattr(classifier, "CLASSIFIER_STEPS", 30)
    settings = {"feature_extractor": "classifier", "cache_dir": str(tmp_path / "cache")}
    folder = adopted(model, files, tmp_path / "adopted", names_file(tmp_path), **settings)
    info = state_of(folder)["feature_extractor_info"]
    assert info["trained_on"] == "own samples" and info["test_accuracy"] >= 0.9
    extractor = load_extractor(folder / "consolidation", info, TrainingConfig(), CPU)
    assert extractor.class_names == NAMES


def test_images_survive_as_a_split():
    images = torch.randint(256, (5, 3, 8, 8), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    for part in (images, images[:, :1]):
        split = as_split(part, ["a", "b", "b", "a", "b"], ["b", "a"], "a split")
        assert split.decode(range(5)).equal(part) and split.labels.tolist() == [1, 0, 0, 1, 0]
        assert split.rows_of(["a"]).tolist() == [0, 3] and split.select(np.array([4])).decode([0]).equal(part[4:])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--revision", "main"], "--revision is 'main'; allowed: nothing for a folder"),
        (["--model", "no such/model/there"], "--model: no such/model/there: no such folder here"),
        (["--model", "RUN"], "is the folder of a run; allowed: one of its tasks"),
        (["--output_dir", "MODEL"], "which is there already; allowed: a new folder"),
        (["--replay", "memory"], "replay is 'memory', which keeps real images"),
        (["--penalty", "ewc", "--ewc_lambda", "-1"], "ewc_lambda is -1.0; allowed: positive numbers"),
        (["--dataset_name", "digits", "--train_data_dir", "x"], "give exactly one of dataset_name"),
        (["--num_inference_steps", "1001"], "--num_inference_steps 1001: the model has 1000"),
        (["--device", "warp"], "--device warp cannot be used"),
    ],
)
def test_options_that_do_not_go(model, tmp_path, capsys, adopt_script, options, message):
    (tmp_path / "run" / "task-00").mkdir(parents=True)
    places = {"MODEL": str(model), "RUN": str(tmp_path / "run")}
    options = [places.get(option, option) for option in options]
    assert adopt_script("--model", model, "--output_dir", tmp_path / "out", *options) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("adopt.py: error: ") and message in error, error
    assert not (tmp_path / "out").exists()


def test_nothing_is_left_where_the_folder_cannot_be_written(model, files, tmp_path):
    source = open_source(str(model))
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write .*adopted"):
        adopt(source, config_for(source, files), tmp_path / "file" / "adopted", CPU, say=lambda text: None)
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
