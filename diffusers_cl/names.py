"""What tables, reports and cards call a configuration."""

from pathlib import Path


PENALTY_NAMES = {
    "ewc": "diagonal EWC",
    "rank1_ewc": "rank-1 EWC",
    "lowrank_ewc": "rank-{fisher_rank} EWC",
    "l2": "L2",
    "random_direction": "random direction",
}
REPLAY_NAMES = {
    "generative_replay": "generative replay",
    "generative_distillation": "distillation",
    "lwf": "LwF",
    "memory": "memory",
}
ADAPTER_NAMES = {"funlora": "FunLoRA ({funlora_function})"}


def method_name(config: dict) -> str:
    """
    Returns the name of the method that a configuration describes, as the tables print it.

    Args:
        config (`dict`): the flat resolved configuration (`"config"` in `metrics.json`).

    Returns:
        `str`: for instance `"fine-tuning"`, `"joint"` or `"rank-1 EWC + distillation (decoupled, auto)"`. The penalty
        of arXiv 2509.23593 is `(loss, 15000)`.
    """
    if config["stream"] != "sequential":
        return config["stream"]
    parts, note = [], ""
    # Results of before there were adapters do not say.
    if (adapter := config.get("adapter", "none")) != "none":
        parts.append(ADAPTER_NAMES[adapter].format_map(config))
    if config["penalty"] != "none":
        parts.append(PENALTY_NAMES[config["penalty"]].format_map(config))
        ewc_lambda = config["ewc_lambda"]
        note = f" ({config['penalty_mode']}, {ewc_lambda if isinstance(ewc_lambda, str) else f'{ewc_lambda:g}'})"
    if config["replay"] != "none":
        parts.append(REPLAY_NAMES[config["replay"]])
        if config["replay"] == "memory":
            budget = config["memory_bytes"]
            parts[-1] += f" ({config['memory_images_per_class']} a class)" if budget is None else f" ({budget} bytes)"
    return (" + ".join(parts) or "fine-tuning") + note


def dataset_name(config: dict) -> str:
    """Returns the name of the data set of a configuration: its id on the Hub, or its folder's name without the path."""
    name = config["dataset_name"] or config["train_data_dir"]
    return Path(name).resolve().name if config["dataset_name"] is None or Path(name).is_dir() else name
