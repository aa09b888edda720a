"""From a configuration to its replay and its penalty."""

from collections.abc import Callable

from .config import TrainingConfig
from .controls import L2Penalty, RandomDirectionEWC
from .ewc import DiagonalEWC, Rank1EWC
from .lowrank import LowRankEWC
from .replay import GenerativeDistillation, GenerativeReplay, LearningWithoutForgetting, MemoryReplay


def create_replay(config: TrainingConfig) -> GenerativeReplay | None:
    """Returns what `config.replay` names, `None` for `none`."""
    return {
        "none": lambda: None,
        "generative_replay": GenerativeReplay,
        "generative_distillation": GenerativeDistillation,
        "lwf": LearningWithoutForgetting,
        "memory": MemoryReplay,
    }[config.replay]()


def create_penalty(config: TrainingConfig, warn: Callable[[str], None]) -> Rank1EWC | DiagonalEWC | None:
    """Returns what `config.penalty` names, `None` for `none`; `warn` is called with what is known to go wrong."""
    if config.penalty in ("rank1_ewc", "lowrank_ewc") and not config.use_ema and "constant" in config.lr_scheduler:
        warn(
            f"penalty: {config.penalty} at the raw weights of a constant learning rate: its directions depend on the"
            " optimizer's last steps (results/experiments, E1). use_ema, or a lr_scheduler that decays, settles them"
        )
    return {
        "none": lambda ewc_lambda: None,
        "ewc": DiagonalEWC,
        "rank1_ewc": Rank1EWC,
        "lowrank_ewc": lambda ewc_lambda: LowRankEWC(ewc_lambda, config.fisher_rank),
        "l2": L2Penalty,
        "random_direction": RandomDirectionEWC,
    }[config.penalty](config.ewc_lambda)
