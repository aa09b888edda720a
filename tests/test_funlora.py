"""FunLoRA: its formulas, its parameter counts as the paper has them, and its files."""

import copy
import math

import pytest
import torch
from conftest import TINY_SIZES
from diffusers import UNet2DModel
from funlora_helpers import adapted, made_of, move, predict, rows
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from diffusers_cl.adapters import importance
from diffusers_cl.config import FUNLORA_LAYERS
from diffusers_cl.filters import FUNCTIONS, find_layers, functional_matrix, read_class, starting_terms
from diffusers_cl.funlora import FunLoRA
from diffusers_cl.models import PAPER_UNET as DEFAULT_UNET


# The network of arXiv 2510.02631 with diffusers' blocks (35.75 million parameters; the paper's 35.84).
PAPER_UNET = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 256, 256),
    "layers_per_block": 2,
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "num_class_embeds": 10,
}


def by_hand(function: str, A, B, w, omega) -> torch.Tensor:
    """The factor of every filter, one number at a time."""
    A, B, w, omega = (vector.tolist() for vector in (A, B, w, omega))
    n, out, channels = len(w), len(A), len(B)
    result = torch.zeros(out, channels)
    for o in range(out):
        for c in range(channels):
            m = A[o] * B[c]
            if function == "vanilla":
                result[o, c] = m
            for i in range(n) if function != "vanilla" else ():
                result[o, c] += {
                    "cosine": w[i] * math.cos(omega[i] * m),
                    "power": w[i] * math.copysign(abs(m) ** omega[i], m),
                    "shift": w[i] * A[(o - i) % out] * B[(c - i) % channels],
                }[function]
    return result


@pytest.mark.parametrize("function", FUNCTIONS)
def test_functional_matrix_by_hand(function):
    generator = torch.Generator().manual_seed(0)
    A, B, w = (torch.randn(2, size, generator=generator) for size in (4, 6, 3))
    omega = 1 + torch.rand(2, 3, generator=generator)
    found = functional_matrix(function, A, B, None if function == "vanilla" else w, omega)
    expected = torch.stack([by_hand(function, A[k], B[k], w[k], omega[k]) for k in range(2)])
    assert torch.allclose(found, expected, atol=1e-6)
    # A number for every two neighbours, in both directions.
    wide = functional_matrix(function, A, B, None if function == "vanilla" else w, omega, ratio=2)
    assert torch.equal(wide, found.repeat_interleave(2, 1).repeat_interleave(2, 2))


def test_ranks_as_the_paper_says():
    """Sec. 5.3: vanilla 1; shifts as many as there are; powers few; the cosine more than it has functions."""
    generator = torch.Generator().manual_seed(0)
    A, B = (1 + 0.5 * torch.randn(1, size, generator=generator, dtype=torch.float64) for size in (64, 48))
    w = torch.ones(1, 10, dtype=torch.float64)
    omega = torch.arange(1, 11, dtype=torch.float64)[None]
    rank = {f: torch.linalg.matrix_rank(functional_matrix(f, A, B, w, omega), rtol=1e-7).item() for f in FUNCTIONS}
    assert rank["vanilla"] == 1 and rank["shift"] == 10 and rank["power"] <= 10 < rank["cosine"]


@pytest.mark.parametrize("num_terms", [2, 3, 10, 30])
def test_the_cosine_starts_at_one_with_slope_one(num_terms):
    terms = {key: value.double() for key, value in starting_terms("cosine", num_terms).items()}
    w, omega = terms["w"], terms["omega"]
    assert (w * omega.cos()).sum().item() == pytest.approx(1, abs=1e-5)
    assert -(w * omega * omega.sin()).sum().item() == pytest.approx(1, abs=1e-4)
    # No other such w is shorter: it has nothing in the directions that the two conditions leave free.
    conditions = torch.stack([omega.cos(), -omega * omega.sin()])
    free = torch.eye(num_terms).double() - torch.linalg.pinv(conditions) @ conditions
    assert (free @ w).abs().max() < 1e-5


@pytest.mark.parametrize("function", FUNCTIONS)
def test_a_new_class_starts_as_the_frozen_network(tiny_unet, function):
    images, timesteps, class_labels = rows()
    expected = copy.deepcopy(tiny_unet)
    mean = expected.class_embedding.weight[[0, 1]].mean(dim=0)
    with torch.no_grad():
        expected.class_embedding.weight[2:4] = mean
        target = expected(images, timesteps, class_labels=class_labels).sample
    adapters = adapted(tiny_unet, function)
    assert (predict(adapters, tiny_unet, images, timesteps, class_labels) - target).abs().max() < 1e-5


def test_a_batch_of_several_classes_is_what_each_row_gives_alone(tiny_unet):
    images, timesteps, class_labels = rows()
    adapters = adapted(tiny_unet)
    move(adapters, 2, 3)
    together = predict(adapters, tiny_unet, images, timesteps, class_labels)
    for i in range(len(images)):
        part = slice(i, i + 1)
        alone = predict(adapters, tiny_unet, images[part], timesteps[part], class_labels[part])
        assert (together[part] - alone).abs().max() < 1e-5
        # The filters of a class, written into the network.
        class_id = class_labels[i].item()
        if class_id > 1:
            written = copy.deepcopy(tiny_unet)
            for name in adapters.config.layers:
                layer = adapters.classes[str(class_id)].get_submodule(name)
                factor = by_hand("cosine", layer.A, layer.B, layer.w, layer.omega)
                written.get_submodule(name).weight.data *= factor[:, :, None, None]
            written.class_embedding.weight.data[class_id] = adapters.classes[str(class_id)].class_embedding
            with torch.no_grad():
                plain = written(images[part], timesteps[part], class_labels=class_labels[part]).sample
            assert (plain - alone).abs().max() < 1e-4
    # One timestep for all rows, too.
    one = predict(adapters, tiny_unet, images, 500, class_labels)
    assert torch.equal(one, predict(adapters, tiny_unet, images, torch.full((7,), 500), class_labels))


def test_parameters_per_class_as_the_paper_counts_them():
    """Sec. 5.3, Tables I, II and IV; the paper's 5.284 K for a ratio of 2 is no 9728 / 2 + 300."""
    with torch.device("meta"):
        unet = UNet2DModel(**PAPER_UNET)
    assert sum(parameter.numel() for parameter in unet.parameters()) == 35_751_427
    # Of 65 convolutions, 0 to 64, those from 40 to 54.
    assert len(find_layers(unet, ["*"])) == 65
    with torch.device("meta"):
        own = UNet2DModel(**{**PAPER_UNET, **DEFAULT_UNET})
    assert (len(find_layers(own, FUNLORA_LAYERS)), len(find_layers(own, ["*"]))) == (16, 67)
    layers = find_layers(unet, FUNLORA_LAYERS)
    assert len(layers) == 15 and sum(map(sum, layers.values())) == 9728

    def count(**options) -> int:
        return FunLoRA(layers, 512, [0, 1], "", **options).parameters_per_class

    assert count(function="vanilla") == 9728
    assert count(function="shift") == count(learn_terms=False) == count(function="power", learn_terms=False) == 9878
    assert count() == count(function="power") == 10028
    assert [count(ratio=ratio) for ratio in (2, 4, 8, 16)] == [5164, 2732, 1516, 908]
    assert count(train_class_embedding=True) == 10028 + 512


def test_importance_is_the_mean_distance_from_one(tiny_unet):
    adapters = adapted(tiny_unet, "vanilla")
    assert {value for layers in importance(adapters).values() for value in layers.values()} == {0.0}
    name = next(iter(adapters.config.layers))
    layer = adapters.classes["3"].get_submodule(name)
    with torch.no_grad():
        layer.A += 0.5
        layer.B[0] -= 2.0
    expected = (0.5 * len(layer.A) + 2.0) / (len(layer.A) + len(layer.B))
    assert importance(adapters)[3][name] == pytest.approx(expected)
    assert importance(adapters)[2][name] == 0


def test_a_class_goes_from_one_model_to_another_in_one_file(tiny_unet, tmp_path):
    adapters, other = adapted(tiny_unet), adapted(tiny_unet, classes=[2])
    move(adapters, 3)
    expected = predict(adapters, tiny_unet, *rows())
    adapters.remove_class(2)
    adapters.add_class(2, tiny_unet, "dog")
    adapters.save_class(2, tmp_path / "named.safetensors")
    assert (read_class(tmp_path / "named.safetensors")["name"], adapters.config.names["3"]) == ("dog", "3")
    adapters.save_class(3, tmp_path / "dog.safetensors")
    other.load_class(tmp_path / "dog.safetensors")
    assert torch.equal(predict(other, tiny_unet, *rows()), expected)
    with pytest.raises(ValueError, match="class 3 has adapters already"):
        other.load_class(tmp_path / "dog.safetensors")
    other.remove_class(3)
    assert other.class_ids == [2]
    with pytest.raises(ValueError, match="class 3 has no adapters"):
        other.remove_class(3)
    broken = load_file(tmp_path / "dog.safetensors")
    about = safe_open(tmp_path / "dog.safetensors", "pt").metadata()
    first = next(iter(broken))
    for wrong in (broken[first].double(), broken[first] * torch.nan):
        save_file({**broken, first: wrong}, tmp_path / "broken.safetensors", about)
        with pytest.raises(ValueError, match="not finite float32"):
            other.load_class(tmp_path / "broken.safetensors")
    assert other.class_ids == [2]
    with torch.no_grad():
        tiny_unet.conv_in.weight[0] += 1
    for unfit, key in ((adapted(tiny_unet), "base"), (FunLoRA(**{**made_of(adapters), "ratio": 2}), "ratio")):
        with pytest.raises(ValueError, match=f"was made with {key}"):
            unfit.load_class(tmp_path / "dog.safetensors", 9)


def test_saved_and_loaded(tiny_unet, tmp_path):
    adapters = adapted(tiny_unet, "power", learn_terms=False, ratio=2)
    move(adapters, 2, 3)
    adapters.save_pretrained(tmp_path)
    loaded = FunLoRA.from_pretrained(tmp_path)
    assert loaded.class_ids == [2, 3] and made_of(loaded) == made_of(adapters)
    assert torch.equal(predict(loaded, tiny_unet, *rows()), predict(adapters, tiny_unet, *rows()))
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("config.json", "diffusion_pytorch_model.safetensors", "funlora.py")
    ]


def test_wrong_arguments(tiny_unet):
    with pytest.raises(ValueError, match="no convolution of the network is named nowhere.*; it has conv_in, "):
        FunLoRA.from_unet(tiny_unet, [0], ["nowhere.*"])
    linear = torch.nn.Sequential(torch.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="it has none, so that there is nothing to adapt"):
        FunLoRA.from_unet(linear, [0])
    with pytest.raises(ValueError, match=r"ratio is 3, which does not divide the 16 and 32 channels of up_blocks"):
        adapted(tiny_unet, ratio=3)
    with pytest.raises(ValueError, match="ratio is 0; allowed: whole numbers from 1"):
        adapted(tiny_unet, ratio=0)
    with pytest.raises(ValueError, match=r"first_class_ids is \[\]"):
        FunLoRA.from_unet(tiny_unet, [])
    with pytest.raises(ValueError, match="function 'sine' is not one of cosine, power, shift, vanilla"):
        adapted(tiny_unet, "sine")
    with pytest.raises(ValueError, match="num_terms is 1; allowed: 2 to 1000 for cosine"):
        adapted(tiny_unet, num_terms=1)
    adapters = adapted(tiny_unet)
    with pytest.raises(ValueError, match="class 2 has adapters already"):
        adapters.add_class(2, tiny_unet)
    sizes = {**TINY_SIZES, "block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
    small = UNet2DModel(down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2, **sizes)
    with pytest.raises(ValueError, match="as the adapters have"):
        predict(adapters, small, *rows())
