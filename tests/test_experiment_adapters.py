"""scripts/experiments/adapters.py: the adapters that FunLoRA is compared with, and that README says what the results do."""

import importlib.util
import json
import re
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState, GradientState
from diffusers import UNet2DModel
from script_helpers import ROOT, finished_run

from diffusers_cl.config import TrainingConfig
from diffusers_cl.errors import ConfigError
from diffusers_cl.filters import EMBEDDING


FOLDER = ROOT / "scripts" / "experiments"
README = (ROOT / "README.md").read_text()
RESULTS = sorted((ROOT / "results" / "funlora" / "adapters").glob("*.json"))


def load(name: str, as_name: str):
    """A script by name; what it imports from its folder stays."""
    sys.path.insert(0, str(FOLDER))
    try:
        spec = importlib.util.spec_from_file_location(as_name, FOLDER / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally:
        sys.path.remove(str(FOLDER))
    return module


experiment = load("adapters", "experiment_adapters")
kinds = sys.modules["adapter_kinds"]
CONFIG = TrainingConfig(adapter="funlora", adapter_layers=["mid_block.*", "up_blocks.*", "conv_in"])
ADAPTED = {
    "adapter": "funlora",
    "adapter_layers": '["up_blocks.*", "mid_block.*"]',
    "adapter_learning_rate": 0.01,
    "replay": "none",
    "penalty": "none",
    "use_ema": "true",
    "max_grad_norm": 1.0,
    "gradient_accumulation_steps": 2,
    "random_flip": "true",
    "generated_classifier_images": 2,
    "checkpointing_steps": 100,
    "max_train_steps": 3,
}


@pytest.fixture(scope="module")
def adapted_run(tmp_path_factory):
    return finished_run(tmp_path_factory, "compared", tasks="[[0, 1], [2, 3], [4]]", **ADAPTED)


@pytest.fixture(autouse=True)
def process():
    """Threads and Accelerate's state are put back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def inputs(*class_ids: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    draws = torch.Generator().manual_seed(1)
    noisy = torch.randn(len(class_ids), 1, 8, 8, generator=draws)
    return noisy, torch.randint(1000, (len(class_ids),), generator=draws), torch.tensor(class_ids)


def trained(kind: str, unet, class_ids=(2, 3)):
    """Adapters of two classes, with numbers in the place of training."""
    adapters = kinds.create_adapters(kind, unet, [0, 1], CONFIG)
    for class_id in class_ids:
        adapters.add_class(class_id, unet, seed=class_id)
    adapters.train_only(class_ids)
    draws = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapters.classes.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=draws)
    return adapters


def with_hooks(unet, names, hook, batch) -> torch.Tensor:
    """What the network predicts with the mean of the first classes' rows, every named layer's output changed."""
    noisy, timesteps, class_labels = batch
    handles = [
        unet.get_submodule(name).register_forward_hook(
            lambda module, arguments, output, i=i: hook(i, module, arguments[0], output)
        )
        for i, name in enumerate(names)
    ]
    mean = getattr(unet, EMBEDDING).weight[:2].mean(dim=0)
    embedding = getattr(unet, EMBEDDING).register_forward_hook(lambda *_: mean.expand(len(class_labels), -1))
    try:
        return unet(noisy, timesteps, class_labels=class_labels).sample
    finally:
        for handle in (*handles, embedding):
            handle.remove()


@torch.no_grad()
def test_scale_and_shift_of_every_feature_map(tiny_unet):
    adapters, batch = trained("scale_shift", tiny_unet), inputs(3, 3, 3)
    tensors = list(adapters.classes["3"])

    def hook(i, module, arguments, output):
        return tensors[2 * i][:, None, None] * output + tensors[2 * i + 1][:, None, None]

    expected = with_hooks(tiny_unet, adapters.layers, hook, batch)
    assert len(tensors) == 2 * len(adapters.layers) > 10 and "conv_in" in adapters.layers
    # The same sums in another order, in float32.
    torch.testing.assert_close(adapters(tiny_unet, *batch).sample, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_lora_with_the_kernel_in_the_bottleneck(tiny_unet):
    adapters, batch = trained("lora_conv_v1", tiny_unet), inputs(2, 2)
    tensors = list(adapters.classes["2"])

    def hook(i, module, arguments, output):
        A, B = tensors[2 * i : 2 * i + 2]
        (out, into, k, _), flat = module.weight.shape, []
        for row in range(out * k):
            for column in range(into * k):
                flat.append(sum(B[row, rank] * A[rank, column] for rank in range(k)))
        added = torch.stack(flat).reshape(out, into, k, k)
        return output + F.conv2d(arguments, added, None, module.stride, module.padding)

    # One small layer by hand, element by element; the others have the same formula.
    adapters.layers, tensors = ["conv_in"], tensors[2 * adapters.layers.index("conv_in") :][:2]
    adapters.classes["2"] = torch.nn.ParameterList(tensors)
    assert [tuple(tensor.shape) for tensor in tensors] == [(3, 3), (24, 3)]
    expected = with_hooks(tiny_unet, adapters.layers, hook, batch)
    torch.testing.assert_close(adapters(tiny_unet, *batch).sample, expected, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_lora_of_peft(tiny_unet):
    adapters, batch = trained("lora_conv_v2", tiny_unet), inputs(2, 2)
    tensors = list(adapters.classes["2"])
    layers = [tiny_unet.get_submodule(name) for name in adapters.layers]
    bases = [f"{name}.base_layer" for name in adapters.layers]

    def hook(i, module, arguments, output):
        A, B = tensors[2 * i : 2 * i + 2]
        assert A.shape == (1, *module.weight.shape[1:]) and B.shape == (module.out_channels, 1, 1, 1)
        return output + F.conv2d(F.conv2d(arguments, A, None, module.stride, module.padding), B)

    found = adapters(tiny_unet, *batch).sample
    assert all(layer.disable_adapters for layer in layers)
    torch.testing.assert_close(found, with_hooks(tiny_unet, bases, hook, batch), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_a_new_class_starts_at_the_frozen_network(tiny_unet, kind):
    batch = inputs(3, 3)
    expected = with_hooks(tiny_unet, [], None, batch)
    adapters = kinds.create_adapters(kind, tiny_unet, [0, 1], CONFIG)
    adapters.add_class(3, tiny_unet, seed=0)
    assert torch.equal(adapters(tiny_unet, *batch).sample, expected)


def test_parameters_per_class(tiny_unet):
    convolutions = {
        name: module.weight.shape
        for name, module in tiny_unet.named_modules()
        if isinstance(module, torch.nn.Conv2d) and name.startswith(("mid_block", "up_blocks", "conv_in"))
    }
    linear = [weight.shape for name, weight in tiny_unet.named_parameters() if ".to_" in name and weight.dim() == 2]
    # One block in the second resolution, and one in the middle; four layers of 16 x 16 each.
    assert linear == [torch.Size([16, 16])] * 8
    counts = {
        "scale_shift": sum(2 * out for out, *_ in convolutions.values()),
        "lora_attention": 2 * (16 + 16) * 8,
        "lora_conv_v1": sum(k * k * (into + out) for out, into, k, _ in convolutions.values()),
        "lora_conv_v2": sum(k * k * into + out for out, into, k, _ in convolutions.values()),
        "vanilla_conditioning": 32,
    }
    for kind, count in counts.items():
        unet = UNet2DModel.from_config(tiny_unet.config)
        adapters = trained(kind, unet)
        assert adapters.parameters_per_class == count, kind
        in_training = [p for p in torch.nn.ModuleList([unet, adapters]).parameters() if p.requires_grad]
        assert sum(parameter.numel() for parameter in in_training) == 2 * count
        unet = UNet2DModel.from_config(tiny_unet.config)
        with_row = kinds.create_adapters(kind, unet, [0, 1], replace(CONFIG, train_class_embedding=True))
        with_row.add_class(4, unet, seed=0)
        assert with_row.parameters_per_class == count + 32 * (kind != "vanilla_conditioning")


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_every_class_of_a_batch_has_its_own_gradient(tiny_unet, kind):
    adapters = trained(kind, tiny_unet, (2, 3, 4))
    adapters.train_only([2, 3])
    noisy, timesteps, class_labels = batch = inputs(3, 0, 2, 4, 3)
    output = adapters(tiny_unet, *batch).sample
    weights = torch.arange(1.0, 6.0)
    (output.flatten(1).mean(dim=1) * weights).sum().backward()
    parameters = [*adapters.rows.items(), *adapters.classes.named_parameters()]
    found = {name: parameter.grad for name, parameter in parameters if parameter.grad is not None}
    assert {name.split(".")[0] for name in found} == {"2", "3"}
    adapters.zero_grad()
    for row in range(5):
        alone = adapters(tiny_unet, *(part[row : row + 1] for part in batch)).sample
        # A batch of another size may sum in another order.
        torch.testing.assert_close(alone, output[row : row + 1], rtol=1e-4, atol=1e-5)
        if class_labels[row] in (2, 3):
            (alone.mean() * weights[row]).backward()
    for name, parameter in parameters:
        if name in found:
            torch.testing.assert_close(parameter.grad, found[name], rtol=1e-4, atol=1e-6)


@torch.no_grad()
def test_old_classes_stay_bit_by_bit(tiny_unet):
    old, mixed = inputs(0, 1, 1), inputs(0, 1, 1, 3, 2)
    old = tuple(part[:3] for part in mixed)
    before = tiny_unet(old[0], old[1], class_labels=old[2]).sample
    adapters = trained("lora_conv_v2", tiny_unet)
    assert torch.equal(adapters(tiny_unet, *old).sample, before)
    assert torch.equal(adapters(tiny_unet, *mixed).sample[:3], before)
    second = adapters(tiny_unet, *inputs(2, 2)).sample
    adapters.add_class(4, tiny_unet, seed=4)
    assert torch.equal(adapters(tiny_unet, *inputs(2, 2)).sample, second)
    assert torch.equal(tiny_unet(old[0], old[1], class_labels=old[2]).sample, before)


def test_attention_is_needed_for_its_adapters(tiny_unet):
    config = {key: value for key, value in tiny_unet.config.items() if key != "_use_default_values"}
    config |= {"down_block_types": ["DownBlock2D"] * 2, "add_attention": False}
    with pytest.raises(ConfigError, match="lora_attention: the network of the run has no attention blocks"):
        kinds.create_adapters("lora_attention", UNet2DModel.from_config(config), [0, 1], CONFIG)


def test_a_run_and_its_table(adapted_run, tmp_path, capsys):
    compared = ("scale_shift", "lora_attention")
    output = tmp_path / "file.json"
    command = [str(adapted_run), "--output", str(output), "--kinds"]
    assert experiment.main([*command, "funlora", *compared]) == 0
    content = json.loads(output.read_text())
    run, rows = content["run"], {row["kind"]: row for row in content["rows"]}
    # The loop is that of the run: its own adapters come out bit by bit, and are measured the same.
    again = rows["funlora"]
    assert again["that_of_the_run"] and again["per_task"] == run["per_task"]
    assert again["classification"] == run["classification"]
    assert again["parameters_per_class"] == run["parameters"]["per_class"]
    for kind in compared:
        assert rows[kind]["first_task_unchanged"] and rows[kind]["steps"] == [3, 3]
        assert rows[kind]["per_task"] != run["per_task"] and rows[kind]["learning_rate"] == 0.01
        assert len(rows[kind]["classification"]["matrix"]) == 3
        assert rows[kind]["classification"]["matrix"][0] == run["classification"]["matrix"][0]
        assert ("peft" in rows[kind]["versions"]) == (kind in ("lora_attention", "lora_conv_v2"))
    assert str(tmp_path) not in output.read_text() and str(adapted_run) not in output.read_text()
    # What is there stays; another learning rate is another row.
    text = output.read_text()
    assert experiment.main([*command, "scale_shift"]) == 0 and output.read_text() == text
    assert experiment.main([*command, "scale_shift", "--learning_rate", "0.1"]) == 0
    capsys.readouterr()
    assert experiment.main(["--table", str(output)]) == 0
    lines = capsys.readouterr().out.splitlines()
    heads = "method | learning rate | seeds | PPC | fd_classifier | recall"
    assert len(lines) == 2 + 1 + len(compared) + 1 and lines[0].startswith(f"| {heads.split(' | fd')[0]} |")
    assert lines[2].startswith("| FunLoRA (cosine) | 0.01 | 0 |") and lines[-1].startswith(
        "| scale and shift | 0.1 | 0 |"
    )
    assert any(line.startswith("| LoRA, attention (r = 2) | 0.01 |") for line in lines)


def test_what_cannot_be_compared(adapted_run, tmp_path, capsys):
    output = tmp_path / "file.json"
    assert experiment.main([str(tmp_path), "--output", str(output)]) == 2
    metrics = json.loads((adapted_run / "metrics.json").read_text())
    metrics["config"]["adapter"] = "none"
    (tmp_path / "metrics.json").write_text(json.dumps(metrics))
    assert experiment.main([str(tmp_path), "--output", str(output)]) == 2
    assert "a run of --adapter funlora" in capsys.readouterr().err and not output.exists()
    output.write_text(json.dumps({"run": {"name": "another"}, "rows": []}))
    assert experiment.main([str(adapted_run), "--output", str(output)]) == 2
    assert "is of another run" in capsys.readouterr().err


def content(seed: int, distance: float, la: float, seconds: float) -> dict:
    classification = {"la": la, "aia": la}
    measured = {"per_task": {"fd": [distance, 2.0]}, "classification": classification, "learning_rate": 0.1}
    run = {"name": f"run{seed}", "method": "FunLoRA (cosine)", "seed": seed, "tasks": [["0"]], "metric": "fd"}
    run |= {"config": {"seed": seed, "steps": 5}, "parameters": {"per_class": 3254}, "device": "cpu", **measured}
    row = {"kind": "lora_conv_v1", "rank": 1, "parameters_per_class": 900, **measured}
    row |= {"seconds": seconds, "cpu_seconds": seconds}
    return {"run": run, "rows": [row, {**row, "kind": "funlora", "cpu_seconds": 2 * seconds}]}


def test_means_over_seeds():
    contents = [content(0, 1.0, 0.5, 10.0), content(1, 3.0, 0.7, 12.0)]
    own, lora = experiment.summarize(contents)
    assert own["fd"] == [2.0, 0.5] and own["la"] == pytest.approx([0.6, 0.1]) and own["cpu_seconds"] == [22.0, 2.0]
    assert lora["seeds"] == [0, 1] and lora["recall"] is None
    assert experiment.table([own, lora]).splitlines() == [
        "| method | learning rate | seeds | PPC | fd | recall | accuracy | LA | AIA | CPU seconds |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- | --- |",
        "| FunLoRA (cosine) | 0.1 | 0, 1 | 3.25K | 2.00 \u00b1 0.50 | n/a | n/a | 0.600 \u00b1 0.100 | 0.600 \u00b1 0.100 | 22.0 \u00b1 2.0 |",
        "| LoRA, convolutions, v1 (r = 1) | 0.1 | 0, 1 | 900 | 2.00 \u00b1 0.50 | n/a | n/a | 0.600 \u00b1 0.100 | 0.600 \u00b1 0.100 | 11.0 \u00b1 1.0 |",
    ]
    with pytest.raises(ConfigError, match="each once"):
        experiment.summarize([contents[0]] * 2)
    contents[1]["run"]["config"]["steps"] = 6
    with pytest.raises(ConfigError, match="run1 and run0 cannot stand in one table: .'steps'"):
        experiment.summarize(contents)


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_results_are_of_the_runs_network(file):
    content = json.loads(file.read_text())
    (again,) = (row for row in content["rows"] if experiment.is_again(row, content["run"]))
    # Of another machine, it may end in other digits.
    assert again["that_of_the_run"] and again["classification"] == content["run"]["classification"]
    assert all(row["first_task_unchanged"] for row in content["rows"])
    assert {row["commit"].split("-")[0] for row in content["rows"]}


def test_the_table_in_readme_is_that_of_the_results():
    ((pattern, table),) = re.findall(r"<!-- adapters.py (.*?) -->\n\n(.*?)\n\n", README, re.DOTALL)
    contents = [json.loads(path.read_text()) for path in sorted(ROOT.glob(pattern))]
    assert table == experiment.table(experiment.summarize(contents))
    assert (RESULTS[0].parent / "table.md").read_text() == f"{table}\n" and len(contents) == len(RESULTS)
