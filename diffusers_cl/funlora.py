"""
FunLoRA (Enescu and Sahbi, arXiv 2510.02631): a few parameters a class, that scale the filters of a frozen network. This file,
with filters.py in it, is part of diffusers-cl (Apache-2.0) and is published with every adapted model, so that it can be sampled
where diffusers-cl is not installed: it needs torch, diffusers, and the safetensors that diffusers needs.
"""

import ast
import json
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.nn as nn
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.unets.unet_2d import UNet2DOutput
from safetensors.torch import load_file, save_file

from .filters import (
    EMBEDDING,
    FUNCTIONS,
    adapted_modules,
    find_layers,
    frozen_digest,
    functional_matrix,
    group_rows,
    read_class,
    starting_terms,
)


MAX_TERMS = 1000


def _published_source() -> str:
    """This file with filters.py in place of its import: diffusers fetches one file of code for a part of a pipeline."""
    source = Path(__file__).read_text()
    found = re.search(r"^from \.filters import \([^)]*\)\n", source, re.MULTILINE)
    if found is None:
        return source
    filters = (Path(__file__).parent / "filters.py").read_text()
    code = "".join(filters.splitlines(keepends=True)[ast.parse(filters).body[0].end_lineno :])
    return source[: found.start()] + code + source[found.end() :]


class FunLoRA(ModelMixin, ConfigMixin):
    r"""
    The adapters of a class-conditional network, one for each class that is learned after it was frozen: every filter
    `W[o, i]` of an adapted convolution becomes `W[o, i] F(A B^T)[o, i]` (arXiv 2510.02631, Eq. 5 to 8), with vectors `A`
    and `B` of the class and the layer that start as ones. A class's parameters touch no other class: what the network draws
    of old classes stays as it is, bit by bit.

    ```python
    adapters = FunLoRA.from_unet(unet, first_class_ids=[0, 1])   # freezes it
    adapters.add_class(2, unet)                                  # its parameters are all that trains
    prediction = adapters(unet, noisy_images, timesteps, class_labels=class_labels).sample
    ```

    Args:
        layers (`dict[str, list[int]]`): the adapted convolutions, by name in the network: output and input channels.
        embedding_dim (`int`): of the class embedding.
        first_class_ids (`list[int]`): of the classes that the network was trained on as a whole.
        base (`str`): [`frozen_digest`] of the network.
        function (`str`), num_terms (`int`): see [`functional_matrix`]; `vanilla` has no terms.
        learn_terms (`bool`): whether frequencies or powers are trained; they are 1, 2, ... otherwise.
        ratio (`int`): vectors are shorter by this, and each entry of `F` stands for `ratio x ratio` filters (Sec. 5.3,
            "Reduced Parameters": for neighbours, which the text leaves open).
        train_class_embedding (`bool`): whether a class's embedding row is trained; the mean of the first classes' rows
            otherwise.
        names (`dict[str, str]`, *optional*): by id, of classes whose parameters are still to be loaded.

    Raises:
        ValueError: for an unknown function, a number of terms out of range, and a ratio that does not divide the channels
            of a layer.
    """

    config_name = "config.json"
    # Read while the class is made: when it is saved, the file may be another model's (as with the pipeline's own).
    _source = _published_source()

    @register_to_config
    def __init__(
        self,
        layers: dict[str, list[int]],
        embedding_dim: int,
        first_class_ids: list[int],
        base: str,
        function: str = "cosine",
        num_terms: int = 10,
        learn_terms: bool = True,
        ratio: int = 1,
        train_class_embedding: bool = False,
        names: dict[str, str] | None = None,
    ):
        super().__init__()
        if function not in FUNCTIONS:
            raise ValueError(f"function {function!r} is not one of {', '.join(FUNCTIONS)}")
        fewest = 2 if function == "cosine" else 1
        if not fewest <= num_terms <= MAX_TERMS:
            raise ValueError(f"num_terms is {num_terms}; allowed: {fewest} to {MAX_TERMS} for {function}")
        if type(ratio) is not int or ratio < 1:
            raise ValueError(f"ratio is {ratio!r}; allowed: whole numbers from 1")
        if not first_class_ids or not all(type(class_id) is int and class_id >= 0 for class_id in first_class_ids):
            raise ValueError(f"first_class_ids is {first_class_ids!r:.80}; allowed: ids of one class at least")
        if unfit := [name for name, sizes in layers.items() if any(size % ratio for size in sizes)]:
            sizes = " and ".join(map(str, layers[unfit[0]]))
            raise ValueError(
                f"ratio is {ratio}, which does not divide the {sizes} channels of {unfit[0]}, nor those of"
                f" {len(unfit) - 1} of the {len(layers) - 1} other layers; allowed: what divides all"
            )
        self.classes = nn.ModuleDict()
        for class_id, name in (names or {}).items():
            self._add(int(class_id), {key: torch.empty(length) for key, length in self._shapes().items()}, name)

    @classmethod
    def from_unet(cls, unet: nn.Module, first_class_ids: Sequence[int], patterns: Sequence[str] = ("*",), **options):
        """
        Returns adapters without classes for a network, which is frozen.

        Args:
            unet (`UNet2DModel`): with a class embedding.
            first_class_ids (`list[int]`): of the classes that it was trained on.
            patterns (`list[str]`): names of the convolutions to adapt, with `*` for any text.
            options: as in the class.

        Raises:
            ValueError: as [`find_layers`] and the class.
        """
        layers = find_layers(unet, patterns)
        dim = getattr(unet, EMBEDDING).embedding_dim
        adapters = cls(layers, dim, list(first_class_ids), frozen_digest(unet), **options)
        unet.requires_grad_(False)
        return adapters

    @property
    def class_ids(self) -> list[int]:
        """Of the classes that have adapters."""
        return sorted(map(int, self.classes))

    def _shapes(self) -> dict[str, int]:
        """The lengths of all vectors of a class by name."""
        lengths = {EMBEDDING: self.config.embedding_dim}
        for name, sizes in self.config.layers.items():
            lengths |= {
                f"{name}.{vector}": size // self.config.ratio for vector, size in zip("AB", sizes, strict=True)
            }
            if self.config.function != "vanilla":
                lengths[f"{name}.w"] = self.config.num_terms
            if self.config.function in ("cosine", "power") and self.config.learn_terms:
                lengths[f"{name}.omega"] = self.config.num_terms
        return lengths

    @property
    def parameters_per_class(self) -> int:
        """How many parameters are trained for a class (the paper's PPC)."""
        lengths = self._shapes()
        return sum(lengths.values()) - (not self.config.train_class_embedding) * lengths[EMBEDDING]

    def _add(self, class_id: int, tensors: dict[str, torch.Tensor], name: str | None) -> None:
        """A class with these parameters, in modules of the layers' names."""
        if class_id in self.class_ids:
            raise ValueError(f"class {class_id} has adapters already")
        module = self.classes[str(class_id)] = nn.Module()
        self.register_to_config(names={**(self.config.names or {}), str(class_id): name or str(class_id)})
        for key, tensor in tensors.items():
            *path, vector = key.split(".")
            layer = module
            for part in path:
                if part not in layer._modules:
                    layer.add_module(part, nn.Module())
                layer = layer._modules[part]
            layer.register_parameter(vector, nn.Parameter(tensor))

    def add_class(self, class_id: int, unet: nn.Module, name: str | None = None) -> None:
        """
        Adds a class, whose output is at first that of the frozen network with the mean of the first classes' rows as class
        embedding; or, for one of the first classes, with its own.

        Args:
            class_id (`int`), unet (`UNet2DModel`): the frozen network.
            name (`str`, *optional*): of the class.

        Raises:
            ValueError: when the class has adapters already.
        """
        rows, first = getattr(unet, EMBEDDING).weight.detach(), self.config.first_class_ids
        start = starting_terms(self.config.function, self.config.num_terms)
        tensors = {}
        for key, length in self._shapes().items():
            vector = key.rpartition(".")[2]
            tensors[key] = start[vector].clone() if vector in start else torch.ones(length)
        tensors[EMBEDDING] = rows[class_id].clone() if class_id in first else rows[first].mean(dim=0)
        self._add(class_id, {key: tensor.to(rows.device) for key, tensor in tensors.items()}, name)

    def remove_class(self, class_id: int) -> None:
        """Takes a class's adapters away; raises a `ValueError` where it has none."""
        if class_id not in self.class_ids:
            raise ValueError(f"class {class_id} has no adapters; {self.class_ids} have")
        del self.classes[str(class_id)]
        self.register_to_config(names={key: name for key, name in self.config.names.items() if key != str(class_id)})

    def train_only(self, class_ids: Sequence[int]) -> None:
        """Lets the parameters of these classes (`list[int]`, ids) require gradients, and of no others."""
        self.requires_grad_(False)
        for class_id in class_ids:
            module = self.classes[str(class_id)].requires_grad_(True)
            getattr(module, EMBEDDING).requires_grad_(self.config.train_class_embedding)

    def _factors(self, name: str, class_ids: list[int]) -> list[torch.Tensor]:
        """`F` of a layer for each class, in the parameters' precision."""
        layers = [self.classes[str(class_id)].get_submodule(name) for class_id in class_ids]
        keys = [key for key, _ in layers[0].named_parameters()]
        stacked = {key: torch.stack([getattr(layer, key) for layer in layers]) for key in keys}
        with torch.autocast(stacked["A"].device.type, enabled=False):
            return list(functional_matrix(self.config.function, **stacked, ratio=self.config.ratio))

    def for_rows(self, unet: nn.Module, class_ids: Sequence[int]) -> Callable[..., UNet2DOutput]:
        """
        Returns the adapted network for batches whose rows are of these classes, called like the network. What depends on the
        classes alone is done once: rows of one class are taken together, and the factors of a class are computed. It is of the
        parameters as they are now.

        An adapted convolution runs once for every class in the batch, on its rows, and once for all rows of classes without
        adapters. Classes in training that are not in the batch get a gradient of zero, for whoever expects one of all.

        Args:
            unet (`UNet2DModel`): the frozen network.
            class_ids (`list[int]`): of the rows.

        Raises:
            ValueError: when the network is not one that the adapters fit.
        """
        order, groups = group_rows(class_ids, self.class_ids)
        adapted = [class_id for class_id, _ in groups if class_id is not None]
        others = [self.classes[str(class_id)] for class_id in self.class_ids if class_id not in adapted]
        absent = [p for module in others for p in module.parameters() if p.requires_grad and torch.is_grad_enabled()]
        modules = adapted_modules(unet, self.config.layers, self.config.embedding_dim)
        sizes, frozen, parts = [size for _, size in groups], [None] * (len(groups) - len(adapted)), {}
        if adapted:
            parts[EMBEDDING] = [getattr(self.classes[str(class_id)], EMBEDDING) for class_id in adapted]
            parts |= {name: self._factors(name, adapted) for name in self.config.layers}
        grouped = {name: list(zip(sizes, [*frozen, *found], strict=True)) for name, found in parts.items()}
        if order is not None:
            order = torch.tensor(order, device=unet.class_embedding.weight.device)

        def predict(sample: torch.Tensor, timestep, class_labels: torch.Tensor) -> UNet2DOutput:
            if order is not None:
                sample, class_labels = sample[order], class_labels[order]
                if isinstance(timestep, torch.Tensor) and timestep.shape == class_labels.shape:
                    timestep = timestep[order]
            try:
                for name, groups_of_rows in grouped.items():
                    modules[name].groups_of_rows = groups_of_rows
                predicted = unet(sample, timestep, class_labels=class_labels).sample
            finally:
                for module in modules.values():
                    module.groups_of_rows = None
            predicted = predicted if order is None else predicted[order.argsort()]
            return UNet2DOutput(sample=predicted + 0 * sum(p.sum() for p in absent) if absent else predicted)

        return predict

    def forward(self, unet: nn.Module, sample: torch.Tensor, timestep, class_labels: torch.Tensor) -> UNet2DOutput:
        """
        Returns what the adapted network predicts ([`for_rows`]); on a GPU it waits for the labels.

        Args:
            unet (`UNet2DModel`): the frozen network.
            sample (`torch.Tensor` of shape `(batch, channels, height, width)`).
            timestep (`torch.Tensor` of shape `(batch,)`, or one for all rows).
            class_labels (`torch.Tensor` of shape `(batch,)`): class ids.

        Raises:
            ValueError: as [`for_rows`].
        """
        return self.for_rows(unet, class_labels.tolist())(sample, timestep, class_labels)

    def save_class(self, class_id: int, path: str | os.PathLike) -> None:
        """Saves all that there is of a class in one safetensors file, which [`load_class`] takes."""
        about = {key: value for key, value in self.config.items() if not key.startswith("_") and key != "names"}
        about |= {"class_id": class_id, "name": self.config.names[str(class_id)]}
        tensors = {key: tensor.detach().cpu() for key, tensor in self.classes[str(class_id)].state_dict().items()}
        save_file(tensors, path, {"funlora": json.dumps(about, sort_keys=True)})

    def load_class(self, path: str | os.PathLike, class_id: int | None = None) -> None:
        """
        Adds the class of a file.

        Args:
            path (`Path`).
            class_id (`int`, *optional*): to have in place of its own.

        Raises:
            ValueError: when it was made for another frozen network or with other settings, when its parameters do not fit,
                or the id is taken.
        """
        about = read_class(path)
        for key in ("base", "layers", "function", "num_terms", "learn_terms", "ratio"):
            ours, theirs = (json.dumps(config.get(key), sort_keys=True) for config in (self.config, about))
            if ours != theirs:
                raise ValueError(
                    f"{path} was made with {key} {theirs:.80}; allowed: {ours:.80}, which these adapters have"
                )
        class_id = about["class_id"] if class_id is None else class_id
        tensors = load_file(path)
        if {key: list(tensor.shape) for key, tensor in tensors.items()} != {k: [n] for k, n in self._shapes().items()}:
            raise ValueError(f"{path} has other parameters than its settings say")
        if any(tensor.dtype != torch.float32 or not tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError(f"{path} has parameters that are not finite float32")
        device = self.device if self.class_ids else torch.device("cpu")
        self._add(class_id, {key: tensor.to(device) for key, tensor in tensors.items()}, about.get("name"))

    def save_pretrained(self, save_directory: str | os.PathLike, **kwargs) -> None:
        """As [`~ModelMixin.save_pretrained`], with the code that `DiffusionPipeline` loads the adapters with."""
        super().save_pretrained(save_directory, **kwargs)
        (Path(save_directory) / "funlora.py").write_text(self._source)
