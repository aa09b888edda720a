"""What the configuration of a run alone shows to be wrong."""

import dataclasses
import math
from collections import Counter
from pathlib import Path

from .config import NUM_TRAIN_TIMESTEPS, TrainingConfig
from .errors import ConfigError
from .strength import parse_ewc_lambda


# All other whole numbers count something.
MAY_BE_ZERO = ("lr_warmup_steps", "dataloader_num_workers", "seed", "skip_nonfinite")
# All other whole numbers have 31 bits. The longest timeout is a week.
AT_MOST = {"seed": 2**63 - 1, "memory_bytes": 2**63 - 1, "num_threads": 1024, "dataloader_num_workers": 1024}
AT_MOST |= {"resolution": 4096, "ddp_timeout": 604_800}
AT_MOST |= dict.fromkeys(("replay_num_inference_steps", "eval_num_inference_steps"), NUM_TRAIN_TIMESTEPS)


def validate(config: TrainingConfig) -> None:
    """
    Checks what the configuration alone can show.

    Raises:
        ConfigError: names the key, its value and what is allowed.
    """

    def require(condition: bool, key: str, allowed: str) -> None:
        if not condition:
            raise ConfigError(f"{key} is {getattr(config, key)!r:.200}; allowed: {allowed}")

    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        require(not isinstance(value, float) or math.isfinite(value), field.name, "finite numbers")
        if field.type in (int, int | None) and value is not None:
            least, most = int(field.name not in MAY_BE_ZERO), AT_MOST.get(field.name, 2**31 - 1)
            require(least <= value <= most, field.name, f"whole numbers from {least} to {most}")
    goes_on = config.pretrained_model_name_or_path is not None
    for one, other in (("dataset_name", "train_data_dir"), ("tasks", "classes_per_task")):
        first, second = getattr(config, one), getattr(config, other)
        # A stream that goes on learns all new classes at once, if nothing is said.
        none_needed = goes_on and one == "tasks" and first is None
        if (first is None) == (second is None) and not none_needed:
            both = f"{one} ({first!r:.200}) and {other} ({second!r:.200})"
            raise ConfigError(f"give exactly one of {both}; null takes back a preset's")
    if config.tasks is not None:
        require(config.class_order is None, "class_order", "null when tasks are listed")
        require(len(config.tasks) > 0 and all(config.tasks), "tasks", "non-empty lists of classes")
        counts = Counter(str(name) for task in config.tasks for name in task)
        name, count = max(counts.items(), key=lambda item: item[1])
        if count > 1:
            raise ConfigError(f"tasks: the class {name!r:.200} stands in more than one place, but belongs to one task")
    if (order := config.class_order) is not None:
        seed = isinstance(order, int) and 0 <= order <= AT_MOST["seed"]
        require(seed or (isinstance(order, list) and order), "class_order", "a list of classes, or a seed from 0")
    if goes_on:
        allowed = f"'sequential' when going on from {config.pretrained_model_name_or_path!r:.200}, without its data"
        require(config.stream == "sequential", "stream", allowed)
        require(config.model_config_name_or_path is None, "model_config_name_or_path", "null: the model is there")
    for key in ("revision", "allow_known_classes"):
        require(goes_on or not getattr(config, key), key, "nothing without pretrained_model_name_or_path")
    require(config.push_to_hub or config.hub_model_id is None, "hub_model_id", "null without push_to_hub")
    if config.stream != "sequential":
        allowed = f"'none' with stream: {config.stream}, which has the real data"
        require(config.replay == "none", "replay", allowed)
        require(config.penalty == "none", "penalty", allowed)
    if config.objective == "flow_matching":
        require(
            config.prediction_type == "epsilon", "prediction_type", "'epsilon', its default: a flow has a velocity"
        )
    if config.adapter != "none":
        allowed = f"'none' with adapter: {config.adapter}, which forgets nothing"
        require(config.replay == "none", "replay", allowed)
        require(config.penalty == "none", "penalty", allowed)
        require(config.stream == "sequential", "stream", f"'sequential' with adapter: {config.adapter}")
        require(config.dynamo_backend != "inductor", "dynamo_backend", f"'no' with adapter: {config.adapter}")
        require(len(config.adapter_layers) > 0, "adapter_layers", "at least one pattern")
    if (steps := config.max_train_steps) is not None:
        within = {0 < step < 2**31 for step in (steps if isinstance(steps, list) else [steps])} == {True}
        require(within, "max_train_steps", f"whole numbers from 1 to {2**31 - 1}, at least one")
    positive = "learning_rate adapter_learning_rate adam_epsilon max_grad_norm distillation_weight ema_inv_gamma ema_power hub_push_timeout"
    for key in positive.split():
        require(getattr(config, key) is None or getattr(config, key) > 0, key, "positive numbers")
    for key in ("adam_beta1", "adam_beta2", "ema_max_decay"):
        require(0 <= getattr(config, key) < 1, key, "[0, 1)")
    require(config.adam_weight_decay >= 0, "adam_weight_decay", "0 or more")
    require(config.hub_push_timeout <= AT_MOST["ddp_timeout"], "hub_push_timeout", "at most a week, in seconds")
    inside = not Path(config.logging_dir).is_absolute() and ".." not in Path(config.logging_dir).parts
    require(inside, "logging_dir", "a folder inside output_dir")
    try:
        parse_ewc_lambda(config.ewc_lambda)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    bounds = [0, *config.fisher_timesteps, NUM_TRAIN_TIMESTEPS]
    within = len(bounds) == 4 and bounds[0] <= bounds[1] < bounds[2] <= bounds[3]
    require(within, "fisher_timesteps", f"[start, end) within [0, {NUM_TRAIN_TIMESTEPS}]")
    # A normalisation over a batch needs two.
    require(config.generated_classifier_images != 1, "generated_classifier_images", "null, or 2 images and more")
    if config.overwrite_output_dir:
        require(config.resume_from_checkpoint is None, "resume_from_checkpoint", "null when overwriting")
    if config.feature_extractor_weights_path is not None:
        require(config.feature_extractor == "inception", "feature_extractor", "'inception' when weights are given")
