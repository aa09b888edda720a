"""Continual learning for Hugging Face diffusers."""

import importlib


__version__ = "0.1.0"

_PUBLIC = {
    "ClassConditionalPipeline": "pipeline",
    "DiagonalEWC": "ewc",
    "FunLoRA": "funlora",
    "GenerativeDistillation": "replay",
    "GenerativeReplay": "replay",
    "LearningWithoutForgetting": "replay",
    "LowRankEWC": "lowrank",
    "MemoryReplay": "replay",
    "Rank1EWC": "ewc",
    "TrainingConfig": "config",
    "add_class": "adapters",
    "denoising_losses": "losses",
    "diagonal_fisher": "fisher",
    "fetch_class": "class_files",
    "load_pipeline": "sampling",
    "per_sample_gradients": "fisher",
    "push_class": "class_files",
    "rank1_fisher": "fisher",
    "remove_class": "adapters",
    "training_target": "losses",
}

__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PUBLIC[name]}"), name)
