"""What is taken for a class-conditional model, and what its classes are called."""

import re

import pytest
import torch
from adopt_helpers import NAMES, UNET, changed, plain_model
from safetensors.torch import load_file, save_file

from diffusers_cl.errors import CheckpointError, ConfigError, RunError
from diffusers_cl.pipeline import ClassConditionalPipeline
from diffusers_cl.source import open_source


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return plain_model(tmp_path_factory)


def test_names_come_from_the_file_or_the_pipeline_or_the_network_or_the_rows(model, tmp_path):
    assert open_source(str(model)).id2label == {0: "0", 1: "1", 2: "2"}
    network = changed(model, tmp_path / "network", unet={"id2label": {"0": "a", "2": "c"}})
    assert open_source(str(network)).class_ids == {"a": 0, "c": 2}
    both = changed(network, tmp_path / "both", index={"id2label": {"1": "b"}})
    assert open_source(str(both)).id2label == {1: "b"}
    # Our own pipeline too: that of a joint run, say.
    source = open_source(str(model))
    ClassConditionalPipeline(source.unet, source.scheduler, dict(enumerate(NAMES))).save_pretrained(tmp_path / "ours")
    assert open_source(str(tmp_path / "ours")).id2label == dict(enumerate(NAMES))
    for name, text in {"list.json": '["x", "7", "z"]', "map.yaml": "2: z\n0: x\n1: 7\n"}.items():
        (tmp_path / name).write_text(text)
        source = open_source(str(both), labels=str(tmp_path / name))
        assert source.class_ids == {"x": 0, "7": 1, "z": 2} and list(source.class_ids) == ["x", "7", "z"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[a, b, c, d]", "row 3; allowed: whole numbers from 0 to 2"),
        ("{-1: a}", "row -1; allowed"),
        ("{a: 0}", "row 'a'; allowed"),
        ("{0: a, '0': b}", "row 0, 'b': that row or name stands there twice"),
        ("[a, a]", "row 1, 'a': that row or name stands there twice"),
        ("[a, yes]", "row 1 is named True; allowed: text, in quotes"),
        ("[a, ' ']", "row 1 is named ' '"),
        ('[a, "b\\e[2J"]', r"row 1 is named 'b\\x1b\[2J'"),
        ("[]", "a list of class names, or a mapping"),
        ("cat", "a list of class names, or a mapping"),
        ("[a", "labels.yaml: while parsing"),
    ],
)
def test_labels_that_are_none(model, tmp_path, text, message):
    (tmp_path / "labels.yaml").write_text(text)
    with pytest.raises(ConfigError, match=f"^--labels .*{message}"):
        open_source(str(model), labels=str(tmp_path / "labels.yaml"))


FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "beta_schedule": None}


@pytest.mark.parametrize(
    ("files", "exit_code", "message"),
    [
        ({"unet": {"_class_name": "UNet2DConditionModel"}}, 2, "has a UNet2DConditionModel; allowed: a UNet2DModel"),
        ({"unet": {"num_class_embeds": None}}, 2, "has no class embedding"),
        ({"unet": {"class_embed_type": "timestep"}}, 2, "class_embed_type is 'timestep'; allowed: null"),
        ({"unet": {"sample_size": [8, 16]}}, 2, r"sample_size is \[8, 16\]; allowed"),
        ({"unet": {"out_channels": 2}}, 2, "in_channels and out_channels are 1 and 2"),
        ({"unet": {"in_channels": 4, "out_channels": 4}}, 2, "are 4 and 4; allowed: 1 and 1, or 3 and 3"),
        ({"unet": {"quantization_config": {"quant_method": "x"}}}, 2, "is quantized"),
        ({"unet": {"block_out_channels": [8, 24]}}, 4, "unet cannot be loaded|do not fit its config"),
        (
            {"scheduler": FLOW | {"_class_name": "FlowMatchLCMScheduler"}},
            2,
            "FlowMatchLCMScheduler has no schedule of",
        ),
        (
            {"scheduler": FLOW | {"use_dynamic_shifting": True}},
            2,
            "use_dynamic_shifting of the scheduler Flow.* is set",
        ),
        ({"scheduler": FLOW | {"invert_sigmas": True}}, 2, "invert_sigmas of the scheduler FlowMatchEuler.* is set"),
        ({"scheduler": FLOW | {"shift": "x"}}, 2, "FlowMatchEulerDiscreteScheduler cannot have its settings"),
        ({"scheduler": FLOW | {"num_train_timesteps": 500}}, 2, "num_train_timesteps is 500; allowed: 1000"),
        ({"scheduler": {"num_train_timesteps": 500}}, 2, "num_train_timesteps is 500; allowed: 1000"),
        ({"scheduler": {"prediction_type": "x"}}, 2, "prediction_type is 'x'; allowed: epsilon, sample, v_prediction"),
        ({"scheduler": {"use_flow_sigmas": True}}, 2, "is set to flow matching"),
        ({"scheduler": {"prediction_type": "flow_prediction"}}, 2, "is set to flow matching"),
        (
            {"scheduler": {"beta_schedule": "sigmoid"}},
            2,
            "DDIMScheduler cannot have the scheduler's settings: sigmoid",
        ),
        ({"scheduler": {"trained_betas": [0.1, 0.2]}}, 2, "trained_betas are not 1000"),
    ],
)
def test_models_of_another_kind(model, tmp_path, files, exit_code, message):
    copy = changed(model, tmp_path / "model", **files)
    with pytest.raises(RunError, match=f"^--model {re.escape(str(copy))}.*({message})") as caught:
        open_source(str(copy))
    assert caught.value.exit_code == exit_code and "\n" not in str(caught.value)


def with_weights(model, copy, edit) -> str:
    changed(model, copy)
    tensors = load_file(copy / UNET)
    edit(tensors)
    save_file(tensors, copy / UNET, {"format": "pt"})
    return str(copy)


def test_weights_are_loaded_whole_in_float32_and_from_safetensors_alone(model, tmp_path):
    def halve(tensors):
        tensors.update({name: tensor.half() for name, tensor in tensors.items()})

    half = open_source(with_weights(model, tmp_path / "half", halve)).unet
    assert {parameter.dtype for parameter in half.parameters()} == {torch.float32}
    whole = load_file(model / UNET)
    for name, parameter in half.named_parameters():
        assert parameter.equal(whole[name].half().float()) and parameter.requires_grad

    faults = {
        "weights of unet do not fit its config: conv_out.bias": lambda tensors: tensors.pop("conv_out.bias"),
        "weights of unet do not fit its config: more": lambda tensors: tensors.update(more=torch.zeros(1)),
        "weights of unet are not finite: conv_in.weight": lambda tensors: tensors["conv_in.weight"].fill_(
            float("nan")
        ),
    }
    for number, (message, edit) in enumerate(faults.items()):
        with pytest.raises(CheckpointError, match=message):
            open_source(with_weights(model, tmp_path / str(number), edit))
    cut = changed(model, tmp_path / "cut")
    (cut / UNET).write_bytes((cut / UNET).read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="diffusion_pytorch_model.safetensors is damaged"):
        open_source(str(cut))
    # A pickle in its place is left alone.
    (cut / UNET).rename(cut / "unet" / "diffusion_pytorch_model.bin")
    with pytest.raises(CheckpointError, match="unet cannot be loaded .from safetensors only."):
        open_source(str(cut))
    (cut / "unet" / "config.json").write_text("[]")
    with pytest.raises(CheckpointError, match="config.json cannot be read: it holds no mapping"):
        open_source(str(cut))


def test_a_unet_and_a_scheduler_are_enough(model, tmp_path):
    bare = changed(
        model, tmp_path / "bare", unet={"sample_size": [8, 8]}, scheduler={"beta_schedule": "squaredcos_cap_v2"}
    )
    (bare / "model_index.json").unlink()
    source = open_source(str(bare))
    assert source.unet.config.sample_size == 8 and source.scheduler.config.beta_schedule == "squaredcos_cap_v2"
    (bare / "scheduler" / "scheduler_config.json").unlink()
    with pytest.raises(ConfigError, match="has no scheduler/scheduler_config.json; allowed: a pipeline with a unet"):
        open_source(str(bare))
