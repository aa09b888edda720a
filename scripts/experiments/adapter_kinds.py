"""
The adapters that the paper of FunLoRA compares with (Enescu and Sahbi, arXiv 2510.02631, Sec. 5.2): parameters of single classes
beside a frozen network, called as [`FunLoRA`] is. They are for measuring: nothing saves or publishes them.

A class is computed in a pass of its own, and so are all rows of classes without parameters. Where the paper does not say:
LoRA's product is not scaled (`lora_alpha = r`), and a class's embedding row is the one that FunLoRA's classes have.
"""

import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import partial

import torch
import torch.nn as nn
from diffusers.models.unets.unet_2d import UNet2DOutput
from torch.func import functional_call

from diffusers_cl.config import TrainingConfig
from diffusers_cl.errors import ConfigError
from diffusers_cl.filters import EMBEDDING, find_layers, group_rows


KINDS = ("scale_shift", "lora_attention", "lora_conv_v1", "lora_conv_v2", "vanilla_conditioning")
# The bottleneck r. With 2, six attention blocks of 192 channels have the 18,432 parameters of the paper's Table V.
RANKS = {"lora_attention": 2, "lora_conv_v1": 1, "lora_conv_v2": 1}
ATTENTION_LAYERS = ("to_q", "to_k", "to_v", "to_out.0")


class ClassAdapters(nn.Module):
    """
    An embedding row for every later class, and with it the kind `vanilla_conditioning`; what other kinds have beside it,
    subclasses add. The network is frozen.

    Args:
        unet (`UNet2DModel`): with a class embedding.
        first_class_ids (`list[int]`): of the classes that it was trained on.
        train_class_embedding (`bool`): whether the rows are trained; the mean of the first classes' rows otherwise.
    """

    def __init__(self, unet: nn.Module, first_class_ids: Sequence[int], train_class_embedding: bool = False):
        super().__init__()
        unet.requires_grad_(False)
        self.first_class_ids, self.train_class_embedding = list(first_class_ids), train_class_embedding
        self.rows, self.classes = nn.ParameterDict(), nn.ModuleDict()
        self.in_training: list[int] = []

    def new_parameters(self, unet: nn.Module, class_id: int, seed: int) -> list[nn.Parameter]:
        """Returns what a class has beside its embedding row, with which the network computes what it did."""
        return []

    def changed(self, unet: nn.Module, class_id: int) -> dict[str, torch.Tensor]:
        """Returns the weights, by name, that a class has in place of the network's."""
        return {}

    def select(self, unet: nn.Module, class_id: int | None) -> None:
        """Lets layers that know the classes compute for one of them, or for none."""

    @property
    def class_ids(self) -> list[int]:
        """Of the classes that have parameters."""
        return [int(class_id) for class_id in self.rows]

    @property
    def device(self) -> torch.device:
        """Where it computes, which a pipeline asks its parts for."""
        return next(self.parameters()).device

    @property
    def parameters_per_class(self) -> int:
        """How many parameters are trained for a class (the paper's PPC)."""
        own = next(iter(self.classes.values()))
        row = self.train_class_embedding * next(iter(self.rows.values())).numel()
        return row + sum(parameter.numel() for parameter in own)

    def add_class(self, class_id: int, unet: nn.Module, seed: int) -> None:
        """Adds a class, whose parameters are a function of the seed; for one of the first classes with its own row."""
        rows, first = getattr(unet, EMBEDDING).weight.detach(), self.first_class_ids
        row = rows[class_id].clone() if class_id in first else rows[first].mean(dim=0)
        own = nn.ParameterList(self.new_parameters(unet, class_id, seed))
        self.rows[str(class_id)], self.classes[str(class_id)] = nn.Parameter(row), own
        self.train_only(self.in_training)

    def train_only(self, class_ids: Sequence[int]) -> None:
        """Lets the parameters of these classes require gradients, and of no others."""
        self.in_training = list(class_ids)
        for class_id in self.class_ids:
            is_trained = class_id in self.in_training
            self.classes[str(class_id)].requires_grad_(is_trained)
            self.rows[str(class_id)].requires_grad_(is_trained and self.train_class_embedding)

    def for_rows(self, unet: nn.Module, class_ids: Sequence[int]):
        """Returns the network with its adapters, called like it, as [`FunLoRA.for_rows`]; rows are grouped in every pass."""
        return partial(self, unet)

    def forward(self, unet: nn.Module, sample: torch.Tensor, timestep: torch.Tensor, class_labels: torch.Tensor):
        """
        Returns what the network predicts, every row with its class's parameters.

        Args:
            unet (`UNet2DModel`).
            sample (`torch.Tensor` of shape `(batch, channels, height, width)`).
            timestep (`torch.Tensor` of shape `(batch,)`), class_labels (`torch.Tensor` of shape `(batch,)`): class ids.
        """
        order, groups = group_rows(class_labels.tolist(), self.class_ids)
        order = torch.tensor(list(range(len(class_labels))) if order is None else order, device=sample.device)
        parts = []
        try:
            for (class_id, _), rows in zip(groups, order.split([size for _, size in groups]), strict=True):
                self.select(unet, class_id)
                tensors, labels = {}, class_labels[rows]
                if class_id is not None:
                    # The only row of its embedding.
                    tensors = {f"{EMBEDDING}.weight": self.rows[str(class_id)][None], **self.changed(unet, class_id)}
                    labels = torch.zeros_like(labels)
                inputs = (sample[rows], timestep[rows])
                parts.append(functional_call(unet, tensors, inputs, {"class_labels": labels}).sample)
        finally:
            self.select(unet, None)
        return UNet2DOutput(sample=torch.cat(parts)[order.argsort()])


class WeightAdapters(ClassAdapters, ABC):
    """
    Convolutions whose weight and bias are, for a class, a function of the network's and of tensors of the class.

    Args:
        unet (`UNet2DModel`).
        layers (`list[str]`): names of the convolutions.
        options: as in [`ClassAdapters`].
    """

    def __init__(self, unet: nn.Module, layers: Sequence[str], *options):
        super().__init__(unet, *options)
        self.layers = list(layers)

    @abstractmethod
    def start(self, convolution: nn.Conv2d, draws: torch.Generator) -> tuple[torch.Tensor, ...]:
        """Returns the tensors of a class that hasn't trained yet."""

    @abstractmethod
    def change(self, convolution: nn.Conv2d, *tensors: torch.Tensor) -> dict[str, torch.Tensor]:
        """Returns `weight` and `bias`, or one of them."""

    def new_parameters(self, unet: nn.Module, class_id: int, seed: int) -> list[nn.Parameter]:
        draws = torch.Generator().manual_seed(seed)
        convolutions = map(unet.get_submodule, self.layers)
        return [nn.Parameter(tensor.to(c.weight)) for c in convolutions for tensor in self.start(c, draws)]

    def changed(self, unet: nn.Module, class_id: int) -> dict[str, torch.Tensor]:
        tensors, result = list(self.classes[str(class_id)]), {}
        pairs = zip(tensors[::2], tensors[1::2], strict=True)
        for name, pair in zip(self.layers, pairs, strict=True):
            found = self.change(unet.get_submodule(name), *pair)
            result |= {f"{name}.{key}": tensor for key, tensor in found.items()}
        return result


class ScaleShift(WeightAdapters):
    """
    A scale and a shift for every feature map of a convolution (Comparative Method 1; Lian et al., "Scaling & Shifting Your
    Features", NeurIPS 2022), merged into its weight and bias, as they may be: `s (W * x + b) + t = (s W) * x + (s b + t)`.
    """

    def start(self, convolution, draws):
        return torch.ones(convolution.out_channels), torch.zeros(convolution.out_channels)

    def change(self, convolution, scale, shift):
        return {"weight": scale[:, None, None, None] * convolution.weight, "bias": scale * convolution.bias + shift}


class LoRAConv(WeightAdapters):
    """
    LoRA with the kernel's size in the bottleneck (Comparative Method 3), as in `ConvLoRA` of loralib, the code of the paper
    of LoRA (arXiv 2106.09685): to the weight of shape `(out, in, k, k)` is added `B A` in that shape, of `A` of shape
    `(r k, in k)`, drawn, and `B` of shape `(out k, r k)`, zeros. PEFT does not have it.
    """

    def start(self, convolution, draws):
        (k, other), bottleneck = convolution.kernel_size, RANKS["lora_conv_v1"]
        assert k == other
        A = torch.empty(bottleneck * k, convolution.in_channels * k)
        nn.init.kaiming_uniform_(A, a=math.sqrt(5), generator=draws)
        return A, torch.zeros(convolution.out_channels * k, bottleneck * k)

    def change(self, convolution, A, B):
        return {"weight": convolution.weight + (B @ A).view(convolution.weight.shape)}


class PeftAdapters(ClassAdapters):
    """
    LoRA of PEFT, an adapter a class. Of linear layers it is the usual one. Of a convolution, `A` is one of the same size
    to r channels and `B` a 1x1 convolution from these: the nearest that PEFT has to Comparative Method 4.

    Args:
        unet (`UNet2DModel`): whose layers PEFT wraps, from the first class on.
        layers (`list[str]`): their names.
        rank (`int`): r.
        options: as in [`ClassAdapters`].
    """

    def __init__(self, unet: nn.Module, layers: Sequence[str], rank: int, *options):
        super().__init__(unet, *options)
        self.layers, self.rank = list(layers), rank

    def new_parameters(self, unet: nn.Module, class_id: int, seed: int) -> list[nn.Parameter]:
        # Optional: no other kind needs it.
        from peft import LoraConfig, inject_adapter_in_model

        device = getattr(unet, EMBEDDING).weight.device
        config = LoraConfig(r=self.rank, lora_alpha=self.rank, target_modules=self.layers)
        # PEFT draws from the global generator.
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="Already found a `peft_config`")
            torch.manual_seed(seed)
            inject_adapter_in_model(config, unet, str(class_id))
        layers = map(unet.get_submodule, self.layers)
        return [side[str(class_id)].weight for layer in layers for side in (layer.lora_A, layer.lora_B)]

    def select(self, unet: nn.Module, class_id: int | None) -> None:
        for layer in map(unet.get_submodule, self.layers) if len(self.classes) else []:
            if class_id is not None:
                layer.set_adapter(str(class_id))
            layer.enable_adapters(class_id is not None)
        # For PEFT, the parameters in training are those of the class that is selected.
        self.train_only(self.in_training)


def attention_layers(unet: nn.Module) -> list[str]:
    """Returns the names of the linear layers in the attention blocks of a network; raises a `ConfigError` without any."""
    ends = tuple(f".{name}" for name in ATTENTION_LAYERS)
    names = [name for name, module in unet.named_modules() if isinstance(module, nn.Linear) and name.endswith(ends)]
    if not names:
        raise ConfigError("lora_attention: the network of the run has no attention blocks; the other kinds need none")
    return names


def create_adapters(
    kind: str, unet: nn.Module, first_class_ids: Sequence[int], config: TrainingConfig
) -> ClassAdapters:
    """
    Returns adapters without classes, of the layers that FunLoRA adapts where the kind is of convolutions.

    Args:
        kind (`str`): one of `KINDS`.
        unet (`UNet2DModel`): which is frozen.
        first_class_ids (`list[int]`): of the classes that it was trained on.
        config ([`TrainingConfig`]): `adapter_layers`, `train_class_embedding`.

    Raises:
        ConfigError: for LoRA on attention layers in a network without them.
    """
    options = (first_class_ids, config.train_class_embedding)
    if kind == "vanilla_conditioning":
        return ClassAdapters(unet, first_class_ids, True)
    if kind == "lora_attention":
        return PeftAdapters(unet, attention_layers(unet), RANKS[kind], *options)
    layers = list(find_layers(unet, config.adapter_layers))
    if kind == "lora_conv_v2":
        return PeftAdapters(unet, layers, RANKS[kind], *options)
    return {"scale_shift": ScaleShift, "lora_conv_v1": LoRAConv}[kind](unet, layers, *options)
