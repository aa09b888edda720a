"""A stream with an adapter: what a run trains, keeps, saves and goes on from, and who can load it."""

import json
import re
import shutil
import subprocess
import sys

import pytest
import torch
from funlora_helpers import ADAPTED, STRANGER, draw
from hostile_helpers import sign
from safetensors.torch import load_file
from script_helpers import arguments, finished_run, interrupted_copy, run, start, write_images

from diffusers_cl.adapters import add_class, remove_class
from diffusers_cl.class_files import fetch_class
from diffusers_cl.config import FUNLORA_LAYERS
from diffusers_cl.errors import CheckpointError, ConfigError
from diffusers_cl.filters import read_class
from diffusers_cl.pipeline import ClassConditionalPipeline
from diffusers_cl.results import effective_config
from diffusers_cl.sampling import load_pipeline
from diffusers_cl.source import open_source


ADAPTERS = "task-02/adapters/diffusion_pytorch_model.safetensors"
UNET = "unet/diffusion_pytorch_model.safetensors"


@pytest.fixture(scope="module")
def adapted_run(tmp_path_factory):
    return finished_run(tmp_path_factory, "adapted", tasks="[[0, 1], [2, 3], [4]]", **ADAPTED)


def read_json(path):
    return json.loads(path.read_text())


def load(folder) -> ClassConditionalPipeline:
    return load_pipeline(folder, torch.device("cpu"), str(folder))


def test_the_network_is_frozen_after_the_first_task(adapted_run):
    first, second, third = (adapted_run / f"task-0{task}" for task in range(3))
    assert (first / UNET).read_bytes() == (second / UNET).read_bytes() == (third / UNET).read_bytes()
    assert not (first / "adapters").exists()
    names = ["config.json", "diffusion_pytorch_model.safetensors", "funlora.py"]
    assert sorted(path.name for path in (second / "adapters").iterdir()) == names
    vectors, later = (load_file(folder / "adapters" / names[1]) for folder in (second, third))
    assert all(torch.equal(later[name], vector) for name, vector in vectors.items())
    assert {name.split(".")[1] for name in later} == {"2", "3", "4"} and {n.split(".")[1] for n in vectors} == {
        "2",
        "3",
    }
    # They did train, from where they start.
    moved = [name for name, vector in vectors.items() if name.endswith(".A") and not (vector == 1).all()]
    assert len(moved) == sum(name.endswith(".A") for name in vectors)
    rows = load_file(first / UNET)["class_embedding.weight"]
    assert torch.equal(vectors["classes.2.class_embedding"], rows[:2].mean(dim=0))
    assert read_json(third / "adapters" / "config.json")["names"] == {"2": "2", "3": "3", "4": "4"}


def test_old_tasks_are_measured_the_same_bit_by_bit(adapted_run):
    metrics = read_json(adapted_run / "metrics.json")
    for values in metrics["metrics"].values():
        first, second, third = values["matrix"]
        assert first == second[:1] == third[:1] and second == third[:2]
    before, after = load(adapted_run / "task-00"), load(adapted_run / "task-02")
    assert torch.equal(draw(before, "0", "1", "1"), draw(after, "0", "1", "1"))
    assert torch.equal(draw(load(adapted_run / "task-01"), "3", "2"), draw(after, "3", "2"))


def test_what_the_metrics_say_of_parameters(adapted_run):
    found = read_json(adapted_run / "metrics.json")["parameters"]
    pipeline = load(adapted_run / "task-02")
    assert found["network"] == sum(parameter.numel() for parameter in pipeline.unet.parameters())
    vectors = load_file(adapted_run / ADAPTERS)
    own = [vector.numel() for name, vector in vectors.items() if name.startswith("classes.4.") and name[-1] in "ABwa"]
    assert found["per_class"] == sum(own) == pipeline.adapters.parameters_per_class
    assert set(found["importance"]) == {"2", "3", "4"}
    assert all(0 < value < 1 for layers in found["importance"].values() for value in layers.values())
    assert (adapted_run / "plots" / "importance.png").exists()


def test_a_run_that_was_interrupted_is_the_same(adapted_run, tmp_path):
    # Within the third task, of which the checkpoint of step 12 is the newest.
    copy = interrupted_copy(adapted_run, tmp_path / "copy", 12, 2, replay=True)
    shutil.rmtree(copy / "task-02")
    assert run(["--config", str(copy / "config.yaml"), "--output_dir", str(copy)]) == 0
    for name in ("metrics.json", ADAPTERS):
        assert (copy / name).read_bytes() == (adapted_run / name).read_bytes()


def test_two_processes_whose_batches_lack_classes(files, tmp_path):
    """A row each of three classes: no process ever sees all, and all have gradients to share."""
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    settings = {**ADAPTED, "tasks": "[[0, 1], [2, 3, 4]]", "train_batch_size": 1, "use_ema": "false"}
    process = start(files, arguments(files, tmp_path / "run", **settings), launcher)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-3000:]
    first, second = (tmp_path / "run" / f"task-0{task}" for task in range(2))
    assert (first / UNET).read_bytes() == (second / UNET).read_bytes()
    vectors = load_file(second / "adapters" / "diffusion_pytorch_model.safetensors")
    trained = {name.split(".")[1] for name, v in vectors.items() if name.endswith("conv1.A") and not (v == 1).all()}
    assert len(trained) >= 2


def test_going_on_from_an_adapted_task_and_from_a_plain_one(adapted_run, tmp_path):
    data = write_images(tmp_path / "data", {"apple": 24})
    values = {"pretrained_model_name_or_path": adapted_run / "task-02", "train_data_dir": data, "max_train_steps": 2}
    options = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    assert run([*options, "--output_dir", str(tmp_path / "run")]) == 0
    pipeline = load(tmp_path / "run/task-03")
    assert pipeline.adapters.class_ids == [2, 3, 4, 5]
    assert torch.equal(draw(pipeline, "0", "4"), draw(load(adapted_run / "task-02"), "0", "4"))
    # All classes of a plain model are its first.
    values["pretrained_model_name_or_path"] = adapted_run / "task-00"
    options = [part for key, value in values.items() for part in (f"--{key}", str(value))]
    assert run([*options, "--output_dir", str(tmp_path / "other")]) == 0
    assert read_json(tmp_path / "other/task-01/adapters/config.json")["first_class_ids"] == [0, 1]


@pytest.mark.parametrize(("key", "value"), [("adapter", "none"), ("adapter_ratio", 2), ("funlora_function", "power")])
def test_what_a_model_is_adapted_with_stays(adapted_run, tmp_path, capfd, key, value):
    data = write_images(tmp_path / "data", {"apple": 24})
    options = ["--pretrained_model_name_or_path", str(adapted_run / "task-02"), "--train_data_dir", str(data)]
    assert run([*options, "--output_dir", str(tmp_path / "run"), f"--{key}", str(value)]) == 2
    assert f"{key} is {value!r}" in capfd.readouterr().err


def test_adapters_that_are_not_what_the_state_says_are_refused(adapted_run, tmp_path, capfd):
    model = shutil.copytree(adapted_run / "task-02", tmp_path / "model")
    path = model / "adapters" / "config.json"
    names = {**read_json(path)["names"], "9": "ghost"}
    # Signed anew: a checksum is no secret.
    pipeline = load(model)
    pipeline.adapters.add_class(9, pipeline.unet, "ghost")
    pipeline.adapters.save_pretrained(model / "adapters")
    assert read_json(path)["names"] == names
    sign(model, {})
    data = write_images(tmp_path / "data", {"apple": 24})
    options = ["--pretrained_model_name_or_path", str(model), "--train_data_dir", str(data)]
    assert run([*options, "--output_dir", str(tmp_path / "run")]) == 4
    assert "class id 9, which its state does not know" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"adapter_layers": '["nowhere.*"]'}, ["adapter_layers", "nowhere.*", "conv_in"]),
        ({"adapter_ratio": 3}, ["adapter_ratio", "ratio is 3", "16 and 16"]),
        ({"funlora_terms": 1}, ["funlora_terms", "num_terms is 1"]),
        ({"replay": "lwf"}, ["replay", "'lwf'", "funlora"]),
        ({"penalty": "ewc"}, ["penalty", "'ewc'", "funlora"]),
        ({"stream": "joint"}, ["stream", "'joint'", "funlora"]),
        ({"adapter_layers": "[]"}, ["adapter_layers", "at least one"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_cannot_be_adapted_is_said_before_anything_is_trained(files, tmp_path, capfd, settings, words):
    assert run(arguments(files, tmp_path / "run", **{**ADAPTED, **settings})) == 2
    errors = capfd.readouterr().err
    assert [word for word in words if word not in errors] == [] and "Traceback" not in errors
    assert not (tmp_path / "run").exists()


def test_a_network_without_the_default_layers_is_refused(files, tmp_path, capfd):
    """The network of the digits has two blocks: nothing of it is called as in the paper's, but for a shortcut."""
    settings = {**ADAPTED, "adapter_layers": json.dumps(FUNLORA_LAYERS)}
    unet = {**json.loads((files / "unet.json").read_text()), "block_out_channels": [8]}
    unet |= {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"]}
    (tmp_path / "unet.json").write_text(json.dumps(unet))
    settings["model_config_name_or_path"] = tmp_path / "unet.json"
    assert run(arguments(files, tmp_path / "run", **settings)) == 2
    assert "no convolution of the network is named up_blocks.1" in capfd.readouterr().err


def test_a_class_alone_is_published_and_taken_in(adapted_run, tmp_path):
    whole, other = load(adapted_run / "task-02"), load(adapted_run / "task-01")
    file = fetch_class(adapted_run / "task-02", "4", cache_dir=tmp_path)
    assert read_class(file)["name"] == "4"
    assert add_class(other, file) == 4 and other.known_classes == whole.known_classes
    assert torch.equal(draw(other, "4", "2", "0"), draw(whole, "4", "2", "0"))
    # Once more under another name, and a copy saved again is still a model.
    assert add_class(other, file, name="another") == 5
    other.save_pretrained(tmp_path / "saved")
    saved = load(tmp_path / "saved")
    assert saved.known_classes == {**whole.known_classes, 5: "another"}
    assert torch.equal(draw(saved, "another"), draw(whole, "4"))
    remove_class(saved, "another")
    assert saved.known_classes == whole.known_classes
    for wrong, message in (
        (lambda: add_class(other, file, name="4"), "has a class '4' already"),
        (lambda: remove_class(other, "0"), "class 0 has no adapters"),
        (lambda: remove_class(other, "7"), "not known to this model"),
        (lambda: add_class(load(adapted_run / "task-00"), file), "has no adapters"),
        (lambda: add_class(other, adapted_run / "task-00" / UNET), "is not the file of a class"),
    ):
        with pytest.raises(ConfigError, match=message):
            wrong()


def test_round_trip_without_the_package(adapted_run, tmp_path):
    folder, again, results = adapted_run / "task-02", tmp_path / "again", tmp_path / "images.pt"
    command = [sys.executable, "-c", STRANGER, str(folder), str(again), str(results)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    images = torch.load(results, weights_only=True)
    assert torch.equal(images, draw(load(folder), "4", "2", "0"))
    assert torch.equal(images, draw(load(again), "4", "2", "0"))


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("config.json", lambda content: content.replace(b'"names"', b'"other"'), "cannot be loaded: .*names"),
        ("config.json", lambda content: content.replace(b'"cosine"', b'"vanilla"'), "do not fit its config"),
        ("config.json", lambda content: content.replace(b'"ratio": 1', b'"ratio": 3'), "ratio is 3"),
        ("config.json", lambda content: content.replace(b"up_blocks.0", b"up_blocks.7"), "no Conv2d up_blocks.7"),
        (
            "config.json",
            lambda content: content.replace(b'"num_terms": 10', b'"num_terms": 9'),
            "do not fit|cannot be",
        ),
        (
            "config.json",
            lambda content: re.sub(rb'"base": "...', b'"base": "123', content),
            "network of other weights",
        ),
        ("config.json", lambda content: re.sub(rb"\[\s*0,\s*1\s*\]", b"[]", content), "first_class_ids is"),
        ("diffusion_pytorch_model.safetensors", lambda content: content[:-8], "damaged"),
    ],
)
def test_damaged_adapters_are_one_sentence(adapted_run, tmp_path, name, change, message):
    shutil.copytree(adapted_run / "task-02", tmp_path / "model")
    path = tmp_path / "model" / "adapters" / name
    assert change(path.read_bytes()) != path.read_bytes()
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(CheckpointError, match=message):
        load(tmp_path / "model")


def test_what_is_of_one_network_refuses_an_adapted_one(adapted_run):
    with pytest.raises(ConfigError, match="task-02 has adapters"):
        open_source(str(adapted_run / "task-02"))
    assert open_source(str(adapted_run / "task-00")).unet is not None


def test_the_card_says_how_an_adapted_model_is_sampled(adapted_run):
    card = (adapted_run / "task-02" / "README.md").read_text()
    assert "ConsistencyModelPipeline" not in card and "load_pipeline" in card and "FunLoRA" in card
    assert "ConsistencyModelPipeline" in (adapted_run / "task-00" / "README.md").read_text()


def test_what_tells_two_methods_apart():
    one = effective_config({"adapter": "funlora", "replay": "none", "adapter_ratio": 1})
    assert "adapter_ratio" in one and "funlora_terms" in one
    assert "funlora_terms" not in effective_config({"adapter": "funlora", "funlora_function": "vanilla"})
    assert "funlora_learn_terms" not in effective_config({"adapter": "funlora", "funlora_function": "shift"})
    assert not any(key.startswith(("adapter_", "funlora_")) for key in effective_config({}))
