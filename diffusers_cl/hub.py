"""Task folders: a complete diffusers model repo for every finished task, with its card and what going on needs."""

import json
from dataclasses import asdict
from pathlib import Path

import PIL.Image
import torch
from safetensors.torch import save_file

from . import __version__
from .checkpoint import publish_folder, verify_folder
from .config import TrainingConfig
from .errors import CheckpointError
from .names import dataset_name
from .pipeline import ClassConditionalPipeline
from .replay_images import MEMORY_NAME


CONSOLIDATION = "consolidation"
STATE_NAME = "state.json"
SCHEMA = 1


def task_folder(output_dir: str | Path, task: int) -> Path:
    """Returns the folder of a task, counted from 0."""
    return Path(output_dir) / f"task-{task:02d}"


def read_task_state(folder: str | Path) -> dict:
    """
    Returns `consolidation/state.json` of a task folder, after every one of its files was verified.

    Raises:
        CheckpointError: when the folder is not whole, or was written by a newer version of this package.
    """
    verify_folder(folder, CONSOLIDATION)
    state = json.loads((Path(folder) / CONSOLIDATION / STATE_NAME).read_text())
    if state["schema"] > SCHEMA:
        raise CheckpointError(f"{folder} was written by diffusers-cl {state['version']}, this is {__version__}")
    return state


def finished_tasks(output_dir: str | Path) -> list[dict]:
    """Returns the states of a run's task folders, from task 0 to the last one."""
    states = []
    while task_folder(output_dir, len(states)).exists():
        states.append(read_task_state(task_folder(output_dir, len(states))))
    return states


def write_task_folder(
    output_dir: str | Path,
    pipeline: ClassConditionalPipeline,
    penalty,
    memory: dict[str, torch.Tensor] | None,
    state: dict,
    samples: PIL.Image.Image,
    config: TrainingConfig,
    results: list[str],
) -> Path:
    """
    Publishes the folder of a finished task: what is pushed to the Hub, and where the run goes on from.

    Args:
        output_dir (`Path`).
        pipeline ([`ClassConditionalPipeline`]): the model, with the classes that it has seen.
        penalty: with `save_pretrained`, or `None`.
        memory: the real images that are kept, or `None` ([`extend_memory`]).
        state (`dict`): JSON for `consolidation/state.json`: task, tasks, class_ids, rows, lineage.
        samples (`PIL.Image.Image`): the sample grid.
        config ([`TrainingConfig`]).
        results (`list[str]`): lines of Markdown for the card.
    """

    def write(folder: Path) -> None:
        pipeline.save_pretrained(folder)
        samples.save(folder / "samples.png")
        (folder / CONSOLIDATION).mkdir()
        if penalty is not None:
            penalty.save_pretrained(folder / CONSOLIDATION)
        if memory is not None:
            save_file(memory, folder / CONSOLIDATION / MEMORY_NAME)
        content = {
            "schema": SCHEMA,
            "version": __version__,
            **state,
            "loss": "mean over channels and pixels of a row, then mean over rows; new and replayed rows apart",
            "config": asdict(config),
        }
        (folder / CONSOLIDATION / STATE_NAME).write_text(json.dumps(content, indent=1) + "\n")
        (folder / "README.md").write_text(model_card(pipeline, state, config, results))

    path = task_folder(output_dir, state["task"])
    publish_folder(path, write, CONSOLIDATION)
    return path


def model_card(pipeline: ClassConditionalPipeline, state: dict, config: TrainingConfig, results: list[str]) -> str:
    """Returns the README.md of a task folder: what the model draws, how to sample it, how it was made and measured."""
    known = list(pipeline.known_classes.values())
    dataset = dataset_name(asdict(config))
    front = [
        "---",
        f"license: {config.license}",
        "library_name: diffusers",
        "pipeline_tag: unconditional-image-generation",
    ]
    front += ["tags:", "- diffusers-cl", "- continual-learning", "- class-conditional", "---"]
    learned = [names for names in state["tasks"] if set(names) <= set(known)]
    order = "\n".join(f"{number}. {', '.join(names)}" for number, names in enumerate(learned, start=1))
    return (
        "\n".join(front)
        + f"""

# {dataset}, after task {state["task"]}

A class-conditional diffusion model (`{type(pipeline.unet).__name__}`, {config.resolution}x{config.resolution} pixels) that
learned its classes task by task with diffusers-cl {__version__}. It draws
{len(known)} classes: {", ".join(known[:50])}{", ..." if len(known) > 50 else ""}.

![one row a class](samples.png)

## Sampling

```python
from diffusers import DiffusionPipeline

pipe = DiffusionPipeline.from_pretrained("path/to/this/folder", trust_remote_code=True)
image = pipe(class_labels={known[0]!r}, num_inference_steps={config.eval_num_inference_steps}).images[0]
```

With diffusers-cl installed, `ClassConditionalPipeline.from_pretrained(...)` loads it without running the folder's code.

## The stream

The classes in the order in which it learned them:

{order}

- stream: {config.stream}; replay: {config.replay}; penalty: {config.penalty} ({config.penalty_mode}, ewc_lambda {config.ewc_lambda})
- seed {config.seed}; the whole configuration is in `consolidation/state.json`

## Results

"""
        + "\n".join(results)
        + "\n"
    )
