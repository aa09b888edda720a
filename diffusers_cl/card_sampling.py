"""How a published model is sampled, as its card shows it."""

import inspect

from diffusers import UNet2DModel

from .config import TrainingConfig
from .markup import python_literal
from .pipeline import ClassConditionalPipeline


def sampling_lines(pipeline: ClassConditionalPipeline, config: TrainingConfig, repo_id: str | None) -> list[str]:
    """
    Returns the lines of Markdown that show the ways to sample a model: with diffusers and the repo's code, with diffusers-cl, and,
    where a pipeline of diffusers can drive it, with diffusers alone.

    Args:
        pipeline ([`ClassConditionalPipeline`]), config ([`TrainingConfig`]): of the model.
        repo_id (`str`, *optional*): the Hub repo that the model is pushed to.
    """
    class_id, name = next(iter(pipeline.known_classes.items()))
    repo = python_literal(repo_id or "path/to/this/folder")
    note = "" if repo_id else "  # the folder that this file is in"
    arguments = f"num_inference_steps={config.eval_num_inference_steps}, generator=generator"
    draw = [
        "generator = torch.Generator().manual_seed(0)",
        f"image = pipe(class_labels={python_literal(name)}, {arguments}).images[0]",
        "```",
        "",
    ]
    is_adapted = pipeline.adapters is not None
    code = "`pipeline.py` and `adapters/funlora.py`, which need" if is_adapted else "`pipeline.py`, which needs"
    own = [
        "from diffusers_cl import ClassConditionalPipeline",
        "ClassConditionalPipeline.from_pretrained",
        ", use_safetensors=True",
    ]
    if is_adapted:
        own = ["from diffusers_cl import load_pipeline", "load_pipeline", ""]
    lines = [
        f"With diffusers alone. This runs the repo's {code} nothing but torch and diffusers:",
        *["", "```python", "import torch", "from diffusers import DiffusionPipeline", ""],
        f"pipe = DiffusionPipeline.from_pretrained({repo}, trust_remote_code=True){note}",
        *draw,
        "`pipe.known_classes` has the names by id; a class is asked for by either.",
        "",
        "With diffusers-cl. No code of the repo is run, and what was downloaded once loads offline (`HF_HUB_OFFLINE=1`):",
        *["", "```python", "import torch", own[0], ""],
        f"pipe = {own[1]}({repo}{own[2]}){note}",
        *draw,
    ]
    scheduler = type(pipeline.scheduler)
    is_plain = isinstance(pipeline.unet, UNet2DModel) and not is_adapted
    if config.objective == "flow_matching":
        text = "With Heun's method: `pipe.scheduler = diffusers.FlowMatchHeunDiscreteScheduler.from_config(pipe.scheduler.config)`."
        lines += [text, ""]
    # All that this pipeline of diffusers can drive.
    elif is_plain and "generator" in inspect.signature(scheduler.step).parameters:
        lines += [
            "With diffusers alone and no code of the repo. Here classes are ids:",
            *["", "```python", "import torch"],
            f"from diffusers import ConsistencyModelPipeline, {scheduler.__name__}, UNet2DModel",
            "",
            f"repo = {repo}{note}",
            'unet = UNet2DModel.from_pretrained(repo, subfolder="unet", use_safetensors=True)',
            f'scheduler = {scheduler.__name__}.from_pretrained(repo, subfolder="scheduler")',
            "pipe = ConsistencyModelPipeline(unet, scheduler)",
            draw[0],
            f"image = pipe(class_labels=[{class_id}], {arguments}).images[0]  # {python_literal(name)}",
            *draw[2:],
            "All three draw the same image.",
            "",
        ]
    return lines
