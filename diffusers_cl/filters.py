"""
What FunLoRA (Enescu and Sahbi, arXiv 2510.02631) does to a layer: the factor of every filter, and layers that take rows of
different classes. It becomes a part of the funlora.py that is published with every adapted model, and needs torch and safetensors
and nothing else.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from fnmatch import fnmatchcase

import torch
import torch.nn as nn
from safetensors import safe_open


EMBEDDING = "class_embedding"
FUNCTIONS = ("cosine", "power", "shift", "vanilla")


def find_layers(unet: nn.Module, patterns: Sequence[str]) -> dict[str, list[int]]:
    """
    Returns the convolutions of a network that have such names: their output and input channels by name.

    Args:
        unet (`UNet2DModel`).
        patterns (`list[str]`): with `*` for any text.

    Raises:
        ValueError: when there are none, with the names that there are.
    """
    # A grouped convolution has no factor of its own for every pair of channels.
    found = {
        name: [module.out_channels, module.in_channels]
        for name, module in unet.named_modules()
        if isinstance(module, nn.Conv2d) and module.groups == 1
    }
    # By name: as JSON will have them.
    layers = {name: sizes for name, sizes in sorted(found.items()) if any(fnmatchcase(name, p) for p in patterns)}
    if not layers:
        names = f"it has {', '.join(found)}" if found else "it has none, so that there is nothing to adapt"
        raise ValueError(f"no convolution of the network is named {', '.join(patterns)}; {names}")
    return layers


def starting_terms(function: str, num_terms: int) -> dict[str, torch.Tensor]:
    """
    Returns what the terms of a sum start from: `omega` = 1, 2, ... (arXiv 2510.02631, Eq. 12 and 17), and `w`, which the paper
    does not say, so that `F(1) = 1`: the start is the frozen network. 1/n for `power` and `shift`; for `cosine`, of all `w`
    with `F(1) = sum_i w_i cos(i) = 1` and `F'(1) = -sum_i w_i i sin(i) = 1` the one of least norm, so that the first step is
    that of the plain product, too.

    Args:
        function (`str`): one of `FUNCTIONS`; `vanilla` has no terms.
        num_terms (`int`): at least 2 for `cosine`.
    """
    omega = torch.arange(1, num_terms + 1, dtype=torch.float64)
    w = torch.full((num_terms,), 1 / num_terms)
    if function == "cosine":
        conditions = torch.stack([omega.cos(), -omega * omega.sin()])
        w = torch.linalg.pinv(conditions) @ torch.ones(2, dtype=torch.float64)
    return {"w": w.float(), "omega": omega.float()}


def functional_matrix(
    function: str,
    A: torch.Tensor,
    B: torch.Tensor,
    w: torch.Tensor | None = None,
    omega: torch.Tensor | None = None,
    ratio: int = 1,
) -> torch.Tensor:
    """
    Returns `F(A B^T)`, the factor of every filter (arXiv 2510.02631, Sec. 4.3). The equations are lost in the copy that this
    was built from; they are put together from its text:

    - `cosine`: `sum_i w_i cos(omega_i A B^T)`, element by element (Eq. 16 to 19)
    - `power`: `sum_i w_i sign(A B^T) |A B^T|^omega_i`, element by element (Eq. 11 to 15)
    - `shift`: `sum_i w_i S^i(A) S^i(B)^T`, where `S^i` shifts a vector right by i = 0, 1, ... in a circle (Eq. 9 and 10)
    - `vanilla`: `A B^T` (Eq. 7)

    Args:
        function (`str`): one of these.
        A (`torch.Tensor` of shape `(classes, out / ratio)`), B (`torch.Tensor` of shape `(classes, in / ratio)`).
        w (`torch.Tensor` of shape `(classes, terms)`): not for `vanilla`.
        omega (`torch.Tensor` of shape `(classes, terms)`): the frequencies or powers; by default 1, 2, ...
        ratio (`int`): every entry stands for `ratio x ratio` neighbouring filters.

    Returns:
        `torch.Tensor` of shape `(classes, out, in)`.
    """
    if function == "shift":
        A, B = (torch.stack([x.roll(i, dims=1) for i in range(w.shape[1])], dim=1) for x in (A, B))
        factors = ((w[:, :, None] * A)[:, :, :, None] * B[:, :, None, :]).sum(dim=1)
    else:
        factors = A[:, :, None] * B[:, None, :]
    if function in ("cosine", "power"):
        if omega is None:
            omega = torch.arange(1, w.shape[1] + 1, dtype=w.dtype, device=w.device).expand_as(w)
        matrix, omega = factors[:, None], omega[:, :, None, None]
        terms = (omega * matrix).cos() if function == "cosine" else matrix.sign() * matrix.abs() ** omega
        factors = (w[:, :, None, None] * terms).sum(dim=1)
    if ratio > 1:
        factors = factors.repeat_interleave(ratio, dim=1).repeat_interleave(ratio, dim=2)
    return factors


class AdaptedConv2d(nn.Conv2d):
    """A convolution with the weight `W * F` for a group of rows of one class; as it was while there are no groups."""

    groups_of_rows: list[tuple[int, torch.Tensor | None]] | None = None

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        if self.groups_of_rows is None:
            return super().forward(rows)
        sizes, factors = zip(*self.groups_of_rows, strict=True)
        weights = [
            self.weight if f is None else self.weight * f[:, :, None, None].to(self.weight.dtype) for f in factors
        ]
        pairs = zip(rows.split(sizes), weights, strict=True)
        return torch.cat([self._conv_forward(part, weight, self.bias) for part, weight in pairs])


class AdaptedEmbedding(nn.Embedding):
    """A class embedding in which groups of rows have a row of their own."""

    groups_of_rows: list[tuple[int, torch.Tensor | None]] | None = None

    def forward(self, class_labels: torch.Tensor) -> torch.Tensor:
        if self.groups_of_rows is None:
            return super().forward(class_labels)
        sizes, rows = zip(*self.groups_of_rows, strict=True)
        parts = []
        for labels, row in zip(class_labels.split(sizes), rows, strict=True):
            own = row is not None
            parts.append(row.to(self.weight.dtype).expand(len(labels), -1) if own else super().forward(labels))
        return torch.cat(parts)


def group_rows(
    class_ids: Sequence[int], known: Sequence[int]
) -> tuple[list[int] | None, list[tuple[int | None, int]]]:
    """
    Returns the order in which the rows of a batch are grouped (`None` where they are already), and every group's class and
    number of rows: first all rows of unknown classes together, as class `None`, then a group for each known one.
    """
    keys = [class_id if class_id in known else -1 for class_id in class_ids]
    order = sorted(range(len(keys)), key=keys.__getitem__)
    groups = [(None if key == -1 else key, keys.count(key)) for key in sorted(set(keys))]
    return (None if order == list(range(len(keys))) else order), groups


def adapted_modules(unet: nn.Module, layers: dict[str, list[int]], embedding_dim: int) -> dict[str, nn.Module]:
    """
    Returns the class embedding and these convolutions of a network by name, able to take groups of rows. Their parameters
    stay, and so does what they compute for any other caller.

    Args:
        unet (`UNet2DModel`).
        layers (`dict[str, list[int]]`): output and input channels by name.
        embedding_dim (`int`).

    Raises:
        ValueError: when the network lacks one.
    """
    found = {}
    for name, expected in ((EMBEDDING, [embedding_dim]), *layers.items()):
        kind, own = (nn.Embedding, AdaptedEmbedding) if name == EMBEDDING else (nn.Conv2d, AdaptedConv2d)
        try:
            found[name] = unet.get_submodule(name)
            shape = list(found[name].weight.shape) if isinstance(found[name], kind) else None
        except AttributeError:
            shape = None
        if shape is None or (shape[1:] if name == EMBEDDING else shape[:2]) != list(expected):
            raise ValueError(f"the network has no {kind.__name__} {name} of {expected} channels, as the adapters have")
        found[name].__class__ = own
    return found


def frozen_digest(unet: nn.Module) -> str:
    """Returns the sha256 of a network's weights but for its class embedding, which grows with the classes."""
    digest = hashlib.sha256()
    for name, tensor in sorted(unet.state_dict().items()):
        if not name.startswith(f"{EMBEDDING}."):
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
            digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()


def read_class(path: str | os.PathLike) -> dict:
    """
    Returns what the file of a class says of itself: the settings of its adapters, `class_id`, and `name` or `None`.

    Raises:
        ValueError: when it is no such file.
    """
    with safe_open(path, framework="pt") as file:
        about = json.loads((file.metadata() or {}).get("funlora", "null"))
    is_whole = isinstance(about, dict) and type(about.get("class_id")) is int and about["class_id"] >= 0
    if not is_whole or not isinstance(about.get("name"), str | None):
        raise ValueError(f"{path} is not the file of a class")
    return about
