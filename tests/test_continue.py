"""Going on from a task folder: nothing that is old is lost, and nothing old is needed."""

import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file
from script_helpers import arguments, finished_run, run, write_images
from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

from diffusers_cl.arguments import parse_config
from diffusers_cl.config import SECRET_KEYS, TrainingConfig
from diffusers_cl.errors import ConfigError
from diffusers_cl.files import publish_folder
from diffusers_cl.start import FIXED_KEYS, OWN_KEYS, load_start


UNET = "unet/diffusion_pytorch_model.safetensors"
# Settings of a short run that goes on, and none of the method's.
SHORT = {"max_train_steps": 4, "checkpointing_steps": 2, "report_to": "none", "num_threads": 1}


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    return finished_run(tmp_path_factory, "plain")


def read_json(path):
    return json.loads(path.read_text())


def go_on(start, output_dir, *extra, **settings) -> list[str]:
    values = {"pretrained_model_name_or_path": start, "output_dir": output_dir, **SHORT, **settings}
    return [part for key, value in values.items() for part in (f"--{key}", str(value))] + list(extra)


@pytest.fixture(scope="module")
def continued(plain_run, tmp_path_factory):
    """A run that learned a folder of images after the last task of the plain run, of which the rest is gone."""
    folder = tmp_path_factory.mktemp("continued")
    shutil.copytree(plain_run / "task-01", folder / "model")
    # Sorted before, between and after the old names.
    data = write_images(folder / "data", {"10": 12, "apple": 12})
    assert run(go_on(folder / "model", folder / "run", train_data_dir=data)) == 0
    return folder


def test_the_bare_command_goes_on_with_method_and_settings(plain_run, continued):
    before = yaml.safe_load((plain_run / "config.yaml").read_text())
    after = yaml.safe_load((continued / "run" / "config.yaml").read_text())
    own = {*OWN_KEYS, "max_train_steps"}
    assert {k: v for k, v in after.items() if k not in own} == {k: v for k, v in before.items() if k not in own}
    assert after["penalty"] == "rank1_ewc" and after["replay"] == "generative_distillation"
    assert after["tasks"] is None and after["classes_per_task"] is None
    # Every key is either taken over or a run's own.
    assert set(OWN_KEYS) - set(SECRET_KEYS) <= set(before) and set(FIXED_KEYS) <= set(before) - own


def test_classes_keep_their_ids_and_new_ones_are_added(plain_run, continued):
    state = read_json(continued / "run" / "task-02" / "consolidation" / "state.json")
    assert state["task"] == 2 and state["tasks"] == [["0", "1"], ["2", "3"], ["10", "apple"]]
    assert state["class_ids"] == {"0": 0, "1": 1, "2": 2, "3": 3, "10": 4, "apple": 5}
    assert state["seen_classes"] == ["0", "1", "2", "3", "10", "apple"]
    assert state["lineage"]["previous"] == {"model": "model", "revision": None}
    assert load_file(continued / "run" / "task-02" / UNET)["class_embedding.weight"].shape[0] == 6
    # The task that it went on from is there as it was.
    for name in (UNET, "consolidation/state.json", "consolidation/ewc.safetensors"):
        assert (continued / "run" / "task-01" / name).read_bytes() == (plain_run / "task-01" / name).read_bytes()
    assert not (continued / "run" / "task-00").exists()


def test_old_columns_of_the_matrix_are_measured_without_old_data(plain_run, continued):
    before, after = read_json(plain_run / "metrics.json"), read_json(continued / "run" / "metrics.json")
    assert after["tasks"] == [*before["tasks"], ["10", "apple"]]
    assert after["num_images"] == [[8], [8, 8], [8, 8, 4]]
    for name, values in after["metrics"].items():
        assert values["matrix"][:2] == before["metrics"][name]["matrix"]
        row = values["matrix"][2]
        if name == "fd_features":
            assert all(value > 0 for value in row) and values["forgetting"] is not None
        elif name in ("kd_features", "precision", "recall"):
            assert row[:2] == [None, None] and row[2] is not None and values["average"][-1] is None
        else:
            # The extractor knows digits, and no apple.
            assert all(value is not None for value in row[:2]) and row[2] is None
    assert after["floor"]["fd_features"]["per_task"][:2] == before["floor"]["fd_features"]["per_task"]
    assert len(after["floor"]["fd_features"]["per_task"]) == 3
    assert set(after["class_accuracy"][-1]) == {"0", "1", "2", "3"}
    assert len(after["fisher"]) == 3 and after["fisher"][:2] == before["fisher"]
    report = (continued / "run" / "report.md").read_text()
    assert "n/a" in report and "None" not in report.split("<details><summary>Configuration")[0]


def test_a_classifier_of_all_classes_may_be_given_for_accuracy(continued, files, tmp_path):
    config = ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=12)
    names = [*map(str, range(10)), "10", "apple"]
    config.id2label, config.label2id = dict(enumerate(names)), {name: i for i, name in enumerate(names)}
    ResNetForImageClassification(config).save_pretrained(tmp_path / "judge")
    ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=1.0).save_pretrained(tmp_path / "judge")
    options = {"train_data_dir": continued / "data", "eval_classifier": tmp_path / "judge"}
    assert run(go_on(continued / "model", tmp_path / "run", **options)) == 0
    metrics, before = (read_json(folder / "run" / "metrics.json") for folder in (tmp_path, continued))
    # Distances are those of the extractor all the same.
    assert metrics["metrics"]["fd_features"] == before["metrics"]["fd_features"]
    assert None not in metrics["metrics"]["accuracy"]["matrix"][-1] and set(metrics["class_accuracy"][-1]) == {
        *("0", "1", "2", "3", "10", "apple")
    }
    # What it takes the old real images for is not known.
    assert [value is None for value in metrics["metrics"]["kld"]["matrix"][-1]] == [True, True, False]
    assert (
        metrics["feature_extractor_info"]["eval_classifier"]["sha256"] != metrics["feature_extractor_info"]["sha256"]
    )


def test_all_earlier_classes_are_replayed_from_the_loaded_model(continued):
    replay = load_file(continued / "run" / "replay" / "task-02" / "images.safetensors")
    assert replay["class_labels"].tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    penalty = load_file(continued / "run" / "task-02" / "consolidation" / "ewc.safetensors")
    rows = penalty["direction.class_embedding.weight"]
    assert rows.shape[:2] == (3, 6) and not rows[:2, 4:].any() and rows[2, 4:].any() and rows[0, :2].any()


def test_the_same_as_if_it_had_never_stopped(plain_run, files, tmp_path):
    # With the data still there and as much room, a stream in two runs learns what one run learns.
    more = {"tasks": "[[0, 1], [2, 3], [4, 5]]", "max_train_steps": "[5, 5, 4]", "num_class_embeds": 6}
    assert run(arguments(files, tmp_path / "whole", **more)) == 0
    shutil.copytree(tmp_path / "whole" / "task-01", tmp_path / "model")
    options = {"dataset_name": "digits", "tasks": "[[4, 5]]", "cache_dir": files / "cache"}
    assert run(go_on(tmp_path / "model", tmp_path / "parts", **options)) == 0
    whole, parts = (load_file(tmp_path / name / "task-02" / UNET) for name in ("whole", "parts"))
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor, rtol=0, atol=0)
    rows = [
        read_json(tmp_path / name / "metrics.json")["metrics"]["fd_features"]["matrix"] for name in ("whole", "parts")
    ]
    for one, other in zip(*rows, strict=True):
        assert one == pytest.approx(other, rel=1e-6)


def test_it_can_be_interrupted_and_gone_on_from(continued, tmp_path):
    # The model that it started from may be gone: the run has its own copy.
    whole = continued / "run"
    shutil.copytree(whole, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "task-02")
    for checkpoint in ("checkpoint-14",):
        shutil.rmtree(tmp_path / "run" / checkpoint)
    command = go_on(continued / "model", tmp_path / "run", train_data_dir=continued / "data")
    moved = continued / "model-moved"
    (continued / "model").rename(moved)
    try:
        assert run(command) == 0
    finally:
        moved.rename(continued / "model")
    for name in (UNET, "consolidation/ewc.safetensors", "consolidation/references.safetensors"):
        assert (tmp_path / "run" / "task-02" / name).read_bytes() == (whole / "task-02" / name).read_bytes()
    assert read_json(tmp_path / "run" / "metrics.json") == read_json(whole / "metrics.json")


def test_known_classes_are_refined_if_asked_and_replayed_all_the_same(plain_run, files, tmp_path, capsys):
    options = {"dataset_name": "digits", "tasks": "[[3, 4]]", "cache_dir": files / "cache"}
    command = go_on(plain_run / "task-01", tmp_path / "run", **options)
    assert run(command) == 3
    error = capsys.readouterr().err
    assert "knows 3 already" in error and "allow_known_classes" in error
    assert run([*command, "--allow_known_classes"]) == 0
    state = read_json(tmp_path / "run" / "task-02" / "consolidation" / "state.json")
    assert state["tasks"][-1] == ["3", "4"] and state["class_ids"]["3"] == 3 and state["class_ids"]["4"] == 4
    assert state["seen_classes"] == ["0", "1", "2", "3", "4"]
    assert set(load_file(tmp_path / "run" / "replay" / "task-02" / "images.safetensors")["class_labels"].tolist()) == {
        *range(4)
    }
    assert read_json(tmp_path / "run" / "metrics.json")["num_images"][-1] == [8, 8, 8]


def test_once_generates_old_classes_once(plain_run, files, tmp_path):
    options = {"dataset_name": "digits", "tasks": "[[4], [5]]", "replay_refresh": "once", "cache_dir": files / "cache"}
    assert run(go_on(plain_run / "task-01", tmp_path / "run", **options)) == 0
    record = read_json(tmp_path / "run" / "run.json")
    # 4 classes of 2 images from the loaded model, then 2 of the new one; 8, 8, 4 and 8, 8, 4, 4 evaluated.
    assert record["images"]["generated"] == 8 + 2 + 20 + 24


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"stream": "cumulative"}, ["stream", "'sequential'"]),
        ({"resolution": 16}, ["resolution is 16", "allowed: 8"]),
        ({"prediction_type": "sample"}, ["prediction_type", "'epsilon'"]),
        ({"feature_extractor": "classifier"}, ["feature_extractor", "measured with"]),
        ({"model_config_name_or_path": "configs/models/digits.json"}, ["model_config_name_or_path", "null"]),
        ({"replay": "memory"}, ["replay is 'memory'", "memory.safetensors"]),
        ({"penalty": "ewc"}, ["penalty", "rank1_ewc", "none"]),
        ({"pretrained_model_name_or_path": "RUN"}, ["folder of a run", "task-01"]),
        ({"pretrained_model_name_or_path": "RUN/task-01/unet"}, ["consolidation/state.json", "scripts/adopt.py"]),
        (
            {"pretrained_model_name_or_path": "no such/model/there"},
            ["pretrained_model_name_or_path", "no name of a repo"],
        ),
    ],
)
def test_what_cannot_go_on_is_one_sentence(plain_run, files, tmp_path, capsys, settings, words):
    settings = {key: str(value).replace("RUN", str(plain_run)) for key, value in settings.items()}
    options = {"dataset_name": "digits", "tasks": "[[4]]", "cache_dir": files / "cache", **settings}
    assert run(go_on(plain_run / "task-01", tmp_path / "run", **options)) in (2, 4)
    # Progress bars come before.
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("train_continual.py: error: ") and all(word in error for word in words), error


def test_damaged_and_newer_and_strange_folders(plain_run, tmp_path):
    def config(folder):
        return TrainingConfig(dataset_name="digits", pretrained_model_name_or_path=str(folder), output_dir="nowhere")

    def copy(name, change=lambda folder: None):
        source = plain_run / "task-01"

        def write(folder):
            shutil.copytree(source, folder, dirs_exist_ok=True)
            change(folder)

        publish_folder(tmp_path / name, write, "consolidation")
        return tmp_path / name

    def newer(folder):
        state = read_json(folder / "consolidation" / "state.json")
        (folder / "consolidation" / "state.json").write_text(json.dumps({**state, "schema": 99, "version": "9.9"}))

    def older(folder):
        state = read_json(folder / "consolidation" / "state.json")
        (folder / "consolidation" / "state.json").write_text(json.dumps({k: state[k] for k in state if k != "floor"}))

    faults = {
        "its state has no 'floor'": copy("older", older),
        "state.json cannot be read": copy("no state", lambda f: (f / "consolidation" / "state.json").write_text("[]")),
        "was written by diffusers-cl 9.9": copy("newer", newer),
        "'notes.pkl' is no file of a task folder": copy("strange", lambda f: (f / "notes.pkl").write_bytes(b"x")),
        "unet/diffusion_pytorch_model.safetensors is damaged": copy("tampered"),
        "samples.png is missing": copy("missing"),
    }
    weights = tmp_path / "tampered" / UNET
    weights.write_bytes(weights.read_bytes()[:-1] + b"\0")
    (tmp_path / "missing" / "samples.png").unlink()
    for words, folder in faults.items():
        with pytest.raises(Exception, match=words) as caught:
            load_start(config(folder))
        assert caught.value.exit_code == 4
    manifest = copy("outside") / "consolidation" / "manifest.json"
    sums = read_json(manifest)["sha256"]
    manifest.write_text(json.dumps({"sha256": {**sums, "../../etc/passwd": "0"}}))
    with pytest.raises(Exception, match="is no file of a task folder"):
        load_start(config(tmp_path / "outside"))


def test_a_damaged_start_is_one_sentence(continued, tmp_path, capsys):
    shutil.copytree(continued / "run", tmp_path / "run")
    (tmp_path / "run" / "start.json").write_text('{"task": ')
    assert run(go_on(continued / "model", tmp_path / "run", train_data_dir=continued / "data")) == 4
    assert "start.json cannot be read" in capsys.readouterr().err


def test_keys_of_going_on_need_a_start():
    for key, value in (("--revision", "main"), ("--allow_known_classes", "true"), ("--hub_model_id", "me/x")):
        with pytest.raises(ConfigError, match=key.removeprefix("--")):
            parse_config(["--dataset_name", "digits", "--classes_per_task", "2", key, value])
