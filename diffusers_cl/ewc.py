"""
Elastic weight consolidation: quadratic penalties around the weights of finished tasks, diagonal and rank-1.

```python
penalty = Rank1EWC(ewc_lambda=15_000.0)
loss = loss + penalty(unet)                  # 0 until a task has been consolidated
penalty.consolidate(unet, losses, batches)   # after a task
```

or, decoupled from the optimizer: `penalty.step(unet, lr)` after `optimizer.step()`. `unet` is the unwrapped module.
"""

import json
import warnings
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .fisher import Rank1Fisher, diagonal_fisher, rank1_fisher
from .passes import Losses, Reduce, alone, finite, trainable_parameters
from .quadratic import DiagonalQuadratic, Rank1Quadratic, Rank1Terms
from .strength import parse_ewc_lambda


WEIGHTS_NAME = "ewc.safetensors"
MIN_SIGNAL_RATIO = 5.0  # at s, two sets of draws have a cosine of about (s - 1) / s (results/experiments, E1)


class _Penalty:
    """What both penalties share: naming by parameter, checking, and files without pickles."""

    kind: str
    quantities: tuple[str, ...]

    def __init__(self, ewc_lambda: float | str = 15_000.0):
        self.factor, self.automatic = parse_ewc_lambda(ewc_lambda)
        self.ewc_lambda = ewc_lambda if self.automatic else self.factor
        self.tensors: dict[str, dict[str, torch.Tensor]] = {}
        self.statistics: dict[str, list[float]] = {}

    @property
    def num_tasks(self) -> int:
        """Returns the number of consolidated tasks."""
        return len(self.statistics.get("num_samples", []))

    def _parameters(self, model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
        """The model's parameters, checked against the state, which is moved to their device."""
        parameters = trainable_parameters(model)
        for tensors in self.tensors.values():
            if tensors.keys() != parameters.keys():
                different = sorted(tensors.keys() ^ parameters.keys())
                raise ValueError(f"{type(self).__name__}: state and model differ in the parameters {different[:3]}")
            for name, parameter in parameters.items():
                if tensors[name].shape[tensors[name].dim() - parameter.dim() :] != parameter.shape:
                    shapes = f"{tuple(tensors[name].shape)} in the state, {tuple(parameter.shape)} in the model"
                    raise ValueError(f"{type(self).__name__}: {name} is {shapes}")
                if tensors[name].device != parameter.device:
                    tensors[name] = tensors[name].to(parameter.device)
        return parameters

    def _record(self, **statistics: float | None) -> None:
        for name, value in statistics.items():
            self.statistics.setdefault(name, []).append(float("nan") if value is None else float(value))

    def summary(self) -> list[dict[str, float | None]]:
        """Returns what was measured for every consolidated task, by name; `None` where it was not."""
        tasks = [{name: self.statistics[name][k] for name in sorted(self.statistics)} for k in range(self.num_tasks)]
        return [{name: None if value != value else value for name, value in task.items()} for task in tasks]

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Returns the state: `<quantity>.<parameter name>` in float32, `statistics.<name>` in float64."""
        state = {
            f"{quantity}.{name}": tensor.contiguous()
            for quantity, tensors in self.tensors.items()
            for name, tensor in tensors.items()
        }
        for name, values in self.statistics.items():
            state[f"statistics.{name}"] = torch.tensor(values, dtype=torch.float64)
        return state

    def load_state_dict(self, state_dict: dict[str, torch.Tensor]) -> None:
        """Replaces the state by one from [`state_dict`]. Names and shapes are checked at the next use with a model."""
        self.tensors, self.statistics = {}, {}
        for key, tensor in state_dict.items():
            quantity, name = key.split(".", 1)
            if quantity == "statistics":
                self.statistics[name] = tensor.tolist()
            else:
                self.tensors.setdefault(quantity, {})[name] = tensor
        if self.tensors and set(self.tensors) != set(self.quantities):
            raise ValueError(f"the state of another penalty than {self.kind!r}: it holds {sorted(self.tensors)}")

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Writes `ewc.safetensors` into a folder."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        # One entry: of several the order is left to chance, and equal states are to be equal files.
        metadata = {"penalty": json.dumps({"kind": self.kind, "ewc_lambda": self.ewc_lambda})}
        save_file(self.state_dict(), Path(save_directory) / WEIGHTS_NAME, metadata=metadata)

    @classmethod
    def from_pretrained(cls, pretrained_model_path: str | Path):
        """
        Returns the penalty that [`save_pretrained`] wrote.

        Raises:
            ValueError: when the file holds another kind of penalty.
        """
        with safe_open(Path(pretrained_model_path) / WEIGHTS_NAME, framework="pt") as file:
            found = json.loads((file.metadata() or {})["penalty"])
            state_dict = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)
        if found["kind"] != cls.kind:
            raise ValueError(f"{pretrained_model_path} holds penalty {found['kind']!r}, not {cls.kind!r}")
        penalty = cls(found["ewc_lambda"])
        penalty.load_state_dict(state_dict)
        return penalty


class Rank1EWC(_Penalty):
    """
    EWC with a rank-1 Fisher per task (arXiv 2509.23593, Eq. 6), in normalised form:

    `(ewc_lambda / 2) sum_k m_k (v_k . theta - b_k)^2`, `b_k = v_k . theta*_k`, equal to the paper's
    `(ewc_lambda / 2) sum_k c*_k (mu_k . (theta - theta*_k))^2`. No copy of `theta*_k` is kept: a task costs one
    parameter vector and a few scalars.

    Args:
        ewc_lambda (`float` or `str`): the weight; the paper's is 15000. `"auto"` (not in the paper) takes the measured
            curvature of the task's loss along v, clamped at 0, in place of `ewc_lambda * m`; `"10xauto"` ten times that.
    """

    kind = "rank1_ewc"
    quantities = ("direction",)

    _joined: Rank1Terms | None = None

    def _terms(self, parameters: dict[str, torch.nn.Parameter]) -> Rank1Terms:
        """All tasks' quadratics, in the parameters' order; joined anew when one has come or they were moved."""
        directions, values = self.tensors["direction"], (self.strengths(), self.statistics["offset"])
        if self._joined is None or not self._joined.are_of(directions, *values):
            self._joined = None
            self.tensors["direction"] = {name: directions.pop(name) for name in parameters}
            self._joined = Rank1Terms(self.tensors["direction"], values[0], list(values[1]))
        return self._joined

    def strengths(self) -> list[float]:
        """Returns the coefficient of every task's quadratic: `ewc_lambda * m_k`, or the curvature under `auto`."""
        if self.automatic:
            curvatures = self.statistics.get("curvature", [])
            if any(kappa != kappa for kappa in curvatures):
                raise ValueError("ewc_lambda is 'auto', but the curvature of a finished task was not measured")
            return [self.factor * max(0.0, kappa) for kappa in curvatures]
        return [self.factor * m for m in self.statistics.get("second_moment", [])]

    def __call__(self, model: torch.nn.Module) -> torch.Tensor:
        """Returns the penalty, a scalar with a gradient; 0 until a task has been consolidated."""
        parameters = self._parameters(model)
        if self.num_tasks == 0:
            return torch.zeros((), device=next(iter(parameters.values())).device)
        return Rank1Quadratic.apply(self._terms(parameters), *parameters.values())

    @torch.no_grad()
    def step(self, model: torch.nn.Module, lr: float) -> None:
        """
        Takes the decoupled step: the exact minimiser of `|theta' - theta|^2 / 2 + lr * penalty(theta')`, solved in float64.

        `theta <- theta - V^T (I + lr L V V^T)^-1 lr L (V theta - b)`, L the diagonal of [`strengths`]. Not the paper's
        method: with Adam, a stiff penalty in the loss fills the second moments of every parameter and starves the new task. For
        a large lr this is the projection onto the weights that move no anchor (related: OGD, arXiv 1910.07104). `lr` is the
        schedule's. A step that is not finite is a `FloatingPointError`, and changes no weight.
        """
        parameters = self._parameters(model)
        if self.num_tasks == 0:
            return
        terms = self._terms(parameters)
        scale = lr * terms.strengths
        identity = torch.eye(len(scale), dtype=torch.float64, device=scale.device)
        # Before it is solved: a solver may call what is not finite singular.
        pull = finite(scale * terms.residuals(parameters.values()), "the penalty's step")
        solution = torch.linalg.solve(identity + scale[:, None] * terms.gram(), pull)
        torch._foreach_sub_(list(parameters.values()), terms.combined(solution))

    def _direction(self, model: torch.nn.Module, fisher: Rank1Fisher, batches, reduce: Reduce):
        """What the penalty holds; a control replaces it."""
        return fisher.direction

    def _add_directions(self, directions: dict[str, torch.Tensor]) -> None:
        """Appends rows, `(rows, *parameter.shape)` by parameter name."""
        self._joined = None
        known = self.tensors.setdefault("direction", {})
        for name, rows in directions.items():
            known[name] = torch.cat([known[name], rows]) if name in known else rows

    def consolidate(
        self, model: torch.nn.Module, losses: Losses, batches, reduce: Reduce = alone, diagnostics=True, progress=None
    ) -> Rank1Fisher:
        """
        Adds the finished task's term at the model's current weights.

        Args:
            model (`torch.nn.Module`): the unwrapped network.
            losses: `losses(model, batch) -> (batch,)`, calling nothing but `model(...)`.
            batches: re-iterable, the same tensors every time.
            reduce: sums a tensor over processes.
            diagnostics (`bool`): also measure trace and curvature (the curvature always under `auto`).
            progress (*optional*): keeps what was summed, so that an interrupted call made again goes on, to the same
                bits: a [`Shards`] or its like, see [`batches_to_do`].

        Returns:
            [`Rank1Fisher`], the estimate that was added.

        Raises:
            FloatingPointError: when a part of it is not finite; the penalty is left as it was.
        """
        parameters = self._parameters(model)
        curvature = diagnostics or self.automatic
        fisher = rank1_fisher(model, losses, batches, diagnostics, curvature, reduce=reduce, progress=progress)
        direction = self._direction(model, fisher, batches, reduce)
        products = [direction[n].flatten().double().dot(p.detach().flatten().double()) for n, p in parameters.items()]
        offset = finite(sum(products), "the penalty's offset").item()
        measured = {name: value for name, value in vars(fisher).items() if name != "direction"}
        signal = share = None
        if diagnostics:
            moments = [fisher.num_samples * fisher.mean_gradient_norm**2, fisher.second_moment]
            ratios = torch.tensor(moments, dtype=torch.float64) / fisher.trace
            signal, share = finite(ratios, "a ratio to the Fisher's trace").tolist()
        if signal is not None and signal < MIN_SIGNAL_RATIO:
            text = f"signal ratio {signal:.2g} after {fisher.num_samples} draws, noise alone has 1"
            warnings.warn(f"the direction is largely sampling noise: {text}; raise fisher_samples", stacklevel=2)
        self._add_directions({name: v[None] for name, v in direction.items()})
        self._record(offset=offset, **measured, signal_ratio=signal, direction_share=share)
        return fisher


class DiagonalEWC(_Penalty):
    """
    EWC with a diagonal empirical Fisher (Kirkpatrick et al., arXiv 1612.00796; arXiv 2509.23593, Eq. 1).

    The sum over tasks is kept collapsed and centred, `(ewc_lambda / 2) (sum_j A_j (theta_j - M_j)^2 + C)`: two
    parameter vectors however many tasks there were, and exactly 0 with zero gradient at the first anchor.

    Args:
        ewc_lambda (`float` or `str`): the weight; the paper's is 15000. `"auto"` (not in the paper) scales every
            task's Fisher so that its curvature along the mean gradient v is the measured one: `kappa / (v^T F v)`.
    """

    kind = "ewc"
    quantities = ("fisher", "anchor")

    def _weight(self) -> float:
        if any((kappa == kappa) != self.automatic for kappa in self.statistics.get("curvature", [])):
            raise ValueError(
                "ewc_lambda is 'auto' here and was a number before, or the reverse: the state has its scale"
            )
        return self.factor

    def __call__(self, model: torch.nn.Module) -> torch.Tensor:
        """Returns the penalty, a scalar with a gradient; 0 until a task has been consolidated."""
        parameters = self._parameters(model)
        if self.num_tasks == 0:
            return torch.zeros((), device=next(iter(parameters.values())).device)
        weights, anchors = ([self.tensors[kind][name] for name in parameters] for kind in self.quantities)
        distance = DiagonalQuadratic.apply(weights, anchors, *parameters.values())
        return self._weight() * (distance + 0.5 * self.statistics["constant"][-1])

    @torch.no_grad()
    def step(self, model: torch.nn.Module, lr: float) -> None:
        """
        Takes the decoupled step, element by element: `theta <- M + (theta - M) / (1 + lr ewc_lambda A)`, the minimiser
        of `|theta' - theta|^2 / 2 + lr * penalty(theta')`. Not the paper's method; see [`Rank1EWC.step`], also for errors.
        """
        parameters = self._parameters(model)
        if self.num_tasks == 0:
            return
        new = {}
        for name, parameter in parameters.items():
            weighted, anchor = self.tensors["fisher"][name].double(), self.tensors["anchor"][name].double()
            new[name] = torch.lerp(anchor, parameter.double(), 1 / (1 + lr * self._weight() * weighted)).to(parameter)
        finite(sum(tensor.sum(dtype=torch.float64) for tensor in new.values()), "the penalty's step")
        for name, parameter in parameters.items():
            parameter.copy_(new[name])

    def _estimate(self, model: torch.nn.Module, losses: Losses, batches, reduce: Reduce = alone, progress=None):
        """The task's diagonal (scaled, under `auto`), the number of draws and the curvature, where it was measured."""
        fisher, num_samples = diagonal_fisher(model, losses, batches, reduce=reduce, progress=progress)
        if not self.automatic:
            return fisher, num_samples, None
        rank1 = rank1_fisher(model, losses, batches, diagnostics=False, reduce=reduce, progress=progress)
        along = sum((fisher[name] * v.square()).sum(dtype=torch.float64) for name, v in rank1.direction.items())
        scale = finite(along.new_tensor(max(0.0, rank1.curvature)) / along, "the Fisher's scale").item()
        return {name: tensor * scale for name, tensor in fisher.items()}, num_samples, rank1.curvature

    def consolidate(
        self, model: torch.nn.Module, losses: Losses, batches, reduce: Reduce = alone, diagnostics=True, progress=None
    ) -> dict[str, torch.Tensor]:
        """
        Adds the finished task's term at the model's current weights; arguments and errors as [`Rank1EWC.consolidate`].

        Returns:
            `dict[str, torch.Tensor]`: the task's diagonal Fisher by parameter name (scaled, under `auto`).
        """
        parameters = self._parameters(model)
        fisher, num_samples, curvature = self._estimate(model, losses, batches, reduce, progress)
        constant = self.statistics["constant"][-1] if self.num_tasks else 0.0
        weighted, anchor = {}, {}
        for name, parameter in parameters.items():
            theta, new = parameter.detach().double(), fisher[name].double()
            old = self.tensors["fisher"][name].double() if self.num_tasks else torch.zeros_like(new)
            mean = self.tensors["anchor"][name].double() if self.num_tasks else theta
            summed = old + new
            share = torch.where(summed > 0, new / summed, torch.ones_like(summed))
            constant += (old * share * (theta - mean).square()).sum().item()
            # lerp returns its end point exactly, so that the first anchor is theta* to the bit.
            weighted[name] = finite(summed.float(), "the sum of the Fishers")
            anchor[name] = finite(torch.lerp(mean, theta, share).float(), "the penalty's anchor")
        trace = sum(tensor.sum(dtype=torch.float64) for tensor in fisher.values()).item() if diagnostics else None
        self.tensors = {"fisher": weighted, "anchor": anchor}
        self._record(num_samples=num_samples, constant=constant, curvature=curvature, trace=trace)
        return fisher
