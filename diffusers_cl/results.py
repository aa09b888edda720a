"""Finished runs as results: what is kept of them under `results/`, which of them are one method, and what may be compared."""

import hashlib
import importlib.metadata
import json
import platform
import subprocess
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from . import __version__
from .config import OPERATIONAL_KEYS, TrainingConfig
from .names import method_name
from .report import read_json


# What a run measures: equal for any two runs of one table.
DATA_KEYS = (
    "dataset_name",
    "dataset_config_name",
    "train_data_dir",
    "train_split",
    "eval_split",
    "eval_images_per_class",
    "max_train_samples",
    "resolution",
    "resize_mode",
    "feature_extractor_weights_path",
)
# What does not make it another method.
SAME_METHOD_KEYS = ("seed", "num_threads", "license", "class_order", "generated_classifier_images")
# Files and folders of one machine.
PATH_KEYS = (
    "feature_extractor",
    "feature_extractor_weights_path",
    "eval_classifier",
    "model_config_name_or_path",
    "pretrained_model_name_or_path",
)
ROOT = Path(__file__).resolve().parent.parent


@dataclass
class Run:
    """
    A finished or running run.

    Attributes:
        path (`Path`): where it was read.
        metrics (`dict`): `metrics.json`, with names in place of this machine's paths.
        machine (`dict`, *optional*): `run.json`.
        model_config (`dict`, *optional*): what is in `model_config_name_or_path`, where it is known.
        scale (`float`, *optional*): of a run that `scripts/reproduce.py --scale` shrank.
    """

    path: Path
    metrics: dict
    machine: dict | None
    model_config: dict | None = None
    scale: float | None = None

    @property
    def config(self) -> dict:
        return self.metrics["config"]

    @property
    def seed(self) -> int:
        return self.config["seed"]

    @property
    def pair(self) -> tuple:
        """What two runs share that are compared one by one: seed and order of the classes."""
        return self.seed, json.dumps(self.config.get("class_order"))

    @property
    def finished(self) -> bool:
        """Whether every task has its row."""
        return len(self.metrics["num_images"][-1]) == len(self.metrics["tasks"])

    @property
    def method(self) -> dict:
        """What makes a run this method: two runs are one method if these are equal."""
        return method_config(self.config, self.model_config)


def portable_name(value: str) -> str:
    """Returns a path as the committed files have it: within the checkout from its root, elsewhere the name alone."""
    path = Path(value)
    if not path.is_absolute() and ".." not in path.parts:
        return value
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def portable_config(config: dict) -> dict:
    """Returns a configuration without this machine's paths: data sets in folders by the folder's name."""
    config = dict(config)
    for key in PATH_KEYS:
        if config.get(key) is not None:
            config[key] = portable_name(config[key])
    for key in ("dataset_name", "train_data_dir"):
        path = Path(config.get(key) or ".")
        if config.get(key) is not None and (path.is_absolute() or ".." in path.parts or path.is_dir()):
            config[key] = path.resolve().name
    return config


def read_model_config(path: str | None) -> dict | None:
    """Returns the network's architecture in a JSON file or model folder, `None` where there is none (a Hub id)."""
    for file in [] if path is None else [Path(path), Path(path) / "config.json", ROOT / path]:
        if file.is_file():
            return read_json(file)
    return None


def effective_config(config: dict) -> dict:
    """
    Returns a configuration without the keys that nothing in its run reads; keys that it lacks have their default.

    Args:
        config (`dict`): a flat resolved configuration, as in `metrics.json`, of any version.
    """
    config = {key: value for key, value in (asdict(TrainingConfig()) | config).items() if key not in OPERATIONAL_KEYS}
    penalty, replay = config["penalty"], config["replay"]
    unread = set()
    if penalty == "none":
        unread |= {"penalty_mode", "ewc_lambda"}
    if penalty == "none" or penalty == "l2" and not isinstance(config["ewc_lambda"], str):
        unread |= {key for key in config if key.startswith("fisher_")}
    if penalty != "lowrank_ewc":
        unread.add("fisher_rank")
    if replay == "none":
        unread.add("replay_weighting")
    if replay == "none" or config["replay_weighting"] != "sum":
        unread.add("distillation_weight")
    if not replay.startswith("generative_"):
        unread |= {key for key in config if key.startswith("replay_")} - {"replay_weighting"}
    if replay != "memory":
        unread |= {key for key in config if key.startswith("memory_")}
    elif config["memory_bytes"] is not None:
        unread.add("memory_images_per_class")
    if config["objective"] != "diffusion":
        unread.add("prediction_type")
    if config["adapter"] == "none":
        unread |= {key for key in config if key.startswith(("adapter_", "funlora_"))} | {"train_class_embedding"}
    elif config["funlora_function"] == "vanilla":
        unread |= {"funlora_terms", "funlora_learn_terms"}
    elif config["funlora_function"] == "shift":
        unread.add("funlora_learn_terms")
    if not config["use_ema"]:
        unread |= {key for key in config if key.startswith("ema_")}
    if config["max_train_steps"] is not None:
        unread.add("num_train_epochs")
    if config["lr_scheduler"] == "constant":
        unread.add("lr_warmup_steps")
    return {key: value for key, value in config.items() if key not in unread}


def method_config(config: dict, model_config: dict | None) -> dict:
    """
    Returns the effective configuration without what only tells runs of one method apart. The network is in it by its
    content, where that is known, and not by the name of a file.
    """
    method = {key: value for key, value in effective_config(config).items() if key not in SAME_METHOD_KEYS}
    if model_config is not None:
        content = {key: value for key, value in model_config.items() if not key.startswith("_")}
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        method["model_config_name_or_path"] = f"sha256:{digest[:12]}"
    return method


def same_versions(machine: dict) -> bool:
    """Returns whether a run (its `run.json`) was made with the versions that are installed here, builds aside."""
    versions = {"python": platform.python_version(), "diffusers_cl": __version__}
    for name in ("torch", "diffusers", "accelerate", "datasets"):
        versions[name] = importlib.metadata.version(name)
    return {name: version.split("+")[0] for name, version in machine["versions"].items()} == versions


def is_result_of(run: Run, config: TrainingConfig) -> bool:
    """Returns whether a run is what a configuration would give: method, seed, order of the classes, what is measured, versions."""
    config, model_config = asdict(config), read_model_config(config.model_config_name_or_path)
    same = ("seed", "class_order", "generated_classifier_images")
    return (
        run.method == method_config(portable_config(config), model_config)
        and all(run.config.get(key) == config[key] for key in same)
        and same_versions(run.machine)
    )


def load_run(path: str | Path) -> Run:
    """Returns a run from its output folder or from a results file; raises a `ValueError` that says what is wrong."""
    path = Path(path)
    if path.is_dir():
        if not (path / "metrics.json").exists():
            raise ValueError(
                f"{path}: has no metrics.json: no run of train_continual.py, or none with a finished task"
            )
        machine = path / "run.json"
        content = {"metrics": read_json(path / "metrics.json")}
        content["run"] = read_json(machine) if machine.exists() else None
    else:
        content = read_json(path)
    metrics = content.get("metrics")
    if not isinstance(metrics, dict) or metrics.get("schema") != 1:
        raise ValueError(
            f"{path}: has no metrics of a run in schema 1; give an output folder or a file that --save made"
        )
    model_config = content.get("model_config") or read_model_config(metrics["config"].get("model_config_name_or_path"))
    metrics |= {
        "feature_extractor": portable_name(metrics["feature_extractor"]),
        "config": portable_config(metrics["config"]),
    }
    if "name" in metrics.get("feature_extractor_info", {}):
        metrics["feature_extractor_info"]["name"] = metrics["feature_extractor"]
    return Run(path, metrics, content.get("run"), model_config, content.get("scale"))


def checkout_commit() -> str | None:
    """Returns the commit of this checkout, with `-dirty` where tracked files were changed, `None` where git does not know it."""
    describe = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40", "--exclude", "*"]
    try:
        return subprocess.run(describe, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def join_result(run: Run, made_by: str | None, scale: float | None = None) -> dict:
    """
    Returns a finished run as one object, the content of a file under `results/`: `metrics` (`metrics.json`), `run`
    (`run.json`), `model_config` (what `model_config_name_or_path` holds), `scale`, `made_by` and [`checkout_commit`].
    """
    if run.machine is None:
        raise ValueError(f"{run.path}: has no run.json")
    if not run.finished:
        raise ValueError(f"{run.path}: not all of its {len(run.metrics['tasks'])} tasks are finished")
    result = {"metrics": run.metrics, "run": run.machine, "model_config": run.model_config}
    return result | {"scale": scale, "made_by": made_by, "commit": checkout_commit()}


def check_comparable(runs: list[Run], metric: str) -> None:
    """
    Raises a `ValueError` if a run lacks the metric or two measured different things, naming them and what differs. Runs
    whose classes come in another `class_order` have other tasks, but the same classes in as many of the same size. Not all
    need have trained classifiers, but those that did, on equally many generated images a class.
    """
    for run in runs:
        if metric not in run.metrics["metrics"]:
            raise ValueError(f"{run.path}: has no metric {metric!r}, only {', '.join(run.metrics['metrics'])}")
        if None in run.metrics["metrics"][metric]["matrix"][-1]:
            raise ValueError(f"{run.path}: {metric} is not known for all tasks: it went on without their data")

    def measured(run: Run, reordered: bool) -> dict:
        tasks, num_images = run.metrics["tasks"], run.metrics["num_images"][-1]
        values = {key: run.config.get(key) for key in DATA_KEYS}
        values["feature_extractor"] = run.metrics["feature_extractor"]
        if reordered:
            values["classes"] = sorted(name for names in tasks for name in names)
            return values | {"classes a task": list(map(len, tasks)), "images": sum(num_images)}
        return values | {"tasks": tasks, "images a task": num_images}

    def refuse(one: Run, other: Run, key: str, *values) -> None:
        text = f"{key} is {values[0]!r} and {values[1]!r}"
        raise ValueError(f"{one.path} and {other.path} cannot stand in one table: {text}")

    first, key = runs[0], "generated_classifier_images"
    classified = [run for run in runs if run.config.get(key) is not None]
    for run in classified[1:]:
        if run.config[key] != classified[0].config[key]:
            refuse(classified[0], run, key, classified[0].config[key], run.config[key])
    for run in runs[1:]:
        reordered = run.config.get("class_order") != first.config.get("class_order")
        expected = measured(first, reordered)
        for key, value in measured(run, reordered).items():
            if value != expected[key]:
                refuse(first, run, key, expected[key], value)


def group_runs(runs: list[Run]) -> dict[str, list[Run]]:
    """
    Returns runs by the name of their method. Where two methods have one name, the keys in which they differ follow it.

    Raises:
        ValueError: if one method has one seed (and order of the classes) twice, naming both runs.
    """
    groups: dict[str, list[Run]] = {}
    for run in runs:
        group = groups.setdefault(json.dumps(run.method, sort_keys=True), [])
        for other in group:
            if other.pair == run.pair:
                raise ValueError(
                    f"{other.path} and {run.path} are the same method with the same seed {run.seed}: give one of them"
                )
        group.append(run)
    named = {}
    for group in groups.values():
        name, method = method_name(group[0].config), group[0].method
        namesakes = [other[0].method for other in groups.values() if method_name(other[0].config) == name]
        keys = sorted({key for other in namesakes for key in {**method, **other} if method.get(key) != other.get(key)})
        notes = ", ".join(f"{key} {json.dumps(method.get(key))}" for key in keys)
        named[f"{name} [{notes}]" if notes else name] = group
    return named


def mean_and_error(values: list[float | None]) -> tuple[float, float | None] | None:
    """Returns the mean over runs and its standard error (`None` for one run), `None` where a run has no such value."""
    if not values or None in values:
        return None
    error = float(np.std(values, ddof=1) / len(values) ** 0.5) if len(values) > 1 else None
    return float(np.mean(values)), error
