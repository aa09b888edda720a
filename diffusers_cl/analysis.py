"""The whole analysis of one checkpoint: what is measured in which order, kept part by part so that a killed run goes on."""

import json
import resource
import time
from collections.abc import Callable
from pathlib import Path

import torch

from .directions import measure_bands, measure_gauss_newton, measure_movement
from .errors import ConfigError, NonFiniteError
from .gram import Plan, plan_passes
from .parts import PARTS, Options
from .shards import Shards, tensors_digest
from .subject import Subject, stored_cosines
from .timesteps import measure_surrogate, measure_timesteps


MIN_SAMPLES = 8


def check_options(subject: Subject, options: Options) -> Plan:
    """
    Returns how the gradients are taken.

    Raises:
        ConfigError: for more samples than images, timesteps that there are not, and a memory bound that holds no chunk.
    """
    num_images = len(subject.images())
    if not MIN_SAMPLES <= options.num_samples <= num_images:
        raise ConfigError(
            f"--num_samples is {options.num_samples}; allowed: {MIN_SAMPLES} to {num_images}, the training images of the"
            " model's classes"
        )
    if "bands" not in options.parts and {"movement", "gauss_newton"} & set(options.parts):
        raise ConfigError(
            f"--parts is {' '.join(options.parts)}; allowed: movement and gauss_newton with bands, whose directions they need"
        )
    last = subject.source.scheduler.config.num_train_timesteps - 1
    if wrong := [t for t in options.timesteps if not 0 <= t <= last]:
        raise ConfigError(f"--timesteps has {wrong[0]}; allowed: 0 to {last}")
    try:
        return plan_passes(subject.unet, options.num_samples, options.memory_gib * 2**30)
    except ValueError as error:
        raise ConfigError(
            f"--memory_gib is {options.memory_gib:g}, which holds no chunk of gradients: {error}"
        ) from error


def subject_inputs(subject: Subject) -> dict:
    """
    Returns all that the numbers are a function of beside the options, as JSON; of the images the first ones as they are, all
    others by the fingerprint that `datasets` has of their files.
    """
    first = {
        name: getattr(subject, name).decode(range(min(64, len(getattr(subject, name).labels))))
        for name in ("train", "test")
    }
    labels = {f"{name}.labels": torch.from_numpy(getattr(subject, name).labels) for name in ("train", "test")}
    return {
        "weights": tensors_digest(subject.unet.state_dict()),
        "scheduler": json.loads(subject.source.scheduler.to_json_string()),
        "images": tensors_digest(first | labels),
        "fingerprints": [subject.train.dataset._fingerprint, subject.test.dataset._fingerprint],
        "tasks": subject.tasks,
        "seed": subject.seed,
        "device": subject.device.type,
    }


def analysis_inputs(subject: Subject, options: Options) -> dict:
    """Returns all that geometry.json is a function of, as JSON."""
    asked = {"num_samples": options.num_samples, "timesteps": options.timesteps, "parts": list(options.parts)}
    return {**subject_inputs(subject), **asked}


def analyze(subject: Subject, options: Options, folder: Path, say: Callable[[str], None] = print) -> dict:
    """
    Returns everything that is asked for, as JSON.

    Args:
        subject ([`Subject`]), options ([`Options`]).
        folder (`Path`): for the parts that are done.
        say: called with what is about to be done and how long it takes.

    Raises:
        ConfigError: as [`check_options`], before any work.
        NonFiniteError: when a gradient, loss or eigenvalue is not finite.
        StorageError: when a part cannot be written.
    """
    plan = check_options(subject, options)
    inputs = subject_inputs(subject)
    # Other numbers of gradients are other timesteps, and nothing else.
    sized = {**inputs, "num_samples": options.num_samples}
    parts = {name: Shards(folder / name, sized if name == "timesteps" else inputs) for name in PARTS}
    result, seconds, cpu_seconds = {}, {}, {}
    measures = {
        "timesteps": lambda: measure_timesteps(subject, options, plan, parts["timesteps"], say),
        "surrogate": lambda: measure_surrogate(subject, options, parts["surrogate"]),
        "bands": lambda: measure_bands(subject, options, parts["bands"]),
        "movement": lambda: measure_movement(subject, options, parts["bands"], parts["movement"]),
        "gauss_newton": lambda: measure_gauss_newton(subject, options, parts["bands"], parts["gauss_newton"]),
    }
    try:
        for name in PARTS:
            if name in options.parts:
                start, cpu = time.perf_counter(), time.process_time()
                result[name] = measures[name]()
                seconds[name] = time.perf_counter() - start
                # Of all threads: on a busy machine the time by the clock says little.
                cpu_seconds[name] = time.process_time() - cpu
    except FloatingPointError as error:
        raise NonFiniteError(str(error)) from error
    if subject.directions is not None:
        result["stored_cosines"] = stored_cosines(subject.directions)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 2**30
    return {
        "inputs": analysis_inputs(subject, options),
        "plan": vars(plan),
        **result,
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "peak_memory_gib": peak,
    }
