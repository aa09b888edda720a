"""What adapters.py does of a run: opens it, learns its later tasks with adapters of another kind, and measures as it did."""

import contextlib
import dataclasses
import math
import statistics
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import Accelerator
from adapter_kinds import RANKS, create_adapters
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from diffusers_cl.adapters import ADAPTERS, AdaptedUNet, adapt, as_pipeline
from diffusers_cl.classification import create_classification
from diffusers_cl.config import NUM_TRAIN_TIMESTEPS, TrainingConfig
from diffusers_cl.data import ImageSplit, load_splits
from diffusers_cl.errors import ConfigError, NonFiniteError
from diffusers_cl.evaluation import create_evaluation, create_extractors
from diffusers_cl.folders import read_task_state, tasks_of_run
from diffusers_cl.funlora import FunLoRA
from diffusers_cl.losses import add_noise, denoising_losses, first_timestep, training_target
from diffusers_cl.metrics import summarize_classification
from diffusers_cl.names import method_name
from diffusers_cl.pipeline import from_uint8
from diffusers_cl.randomness import derive_seed
from diffusers_cl.report import headline_metric
from diffusers_cl.results import effective_config, load_run
from diffusers_cl.sampling import load_pipeline, sample_images
from diffusers_cl.tasks import StepBatches, TaskImages, keep_batch


@dataclasses.dataclass
class Finished:
    """A finished run of FunLoRA: its folders by task, the state of the last, its configuration, and what results say of it."""

    folders: list[Path]
    state: dict
    config: TrainingConfig
    about: dict


def open_run(folder: Path) -> Finished:
    """
    Returns a run to compare with.

    Raises:
        ConfigError: when it is not finished, not of FunLoRA, or went on from another run.
    """
    try:
        run = load_run(folder)
    except ValueError as error:
        raise ConfigError(str(error)) from error
    metrics, folders = run.metrics, tasks_of_run(folder)
    if run.config.get("adapter") != "funlora" or metrics["first_task"] != 0 or len(folders) < 2:
        raise ConfigError(
            f"{folder}: allowed: a run of --adapter funlora, of two tasks or more, from its first task on"
        )
    if not run.finished or run.machine is None:
        raise ConfigError(f"{folder}: not all of its {len(metrics['tasks'])} tasks are finished")
    state = read_task_state(folders[-1])
    known = {field.name for field in dataclasses.fields(TrainingConfig)}
    config = TrainingConfig(**{key: value for key, value in state["config"].items() if key in known})
    # Where an extractor is looked for, and no other settings than those of the run.
    config = dataclasses.replace(config, output_dir=str(folder), overwrite_output_dir=False)
    about = {
        "name": folder.resolve().name,
        "method": method_name(run.config),
        "seed": run.seed,
        "tasks": metrics["tasks"],
        "metric": headline_metric(metrics),
        "floor": metrics["floor"],
        "learning_rate": config.adapter_learning_rate or config.learning_rate,
        "per_task": {name: found["matrix"][-1] for name, found in metrics["metrics"].items()},
        "classification": metrics.get("classification"),
        "parameters": {key: metrics["parameters"][key] for key in ("network", "per_class")},
        "config": effective_config(run.config),
        "model_config": run.model_config,
        **{key: run.machine[key] for key in ("device", "threads", "versions", "seconds", "cpu_seconds")},
    }
    return Finished(folders, state, config, about)


def train_task(
    model: torch.nn.Module,
    images: ImageSplit,
    task: int,
    class_ids: dict[str, int],
    noise_scheduler,
    config: TrainingConfig,
    accelerator: Accelerator,
    learning_rate: float,
) -> int:
    """
    Trains what requires gradients on a task's images, draw by draw as train_continual.py does, and returns the steps.

    Args:
        model ([`AdaptedUNet`]): which changes.
        images ([`ImageSplit`]): of the task.
        task (`int`), class_ids (`dict[str, int]`), noise_scheduler, config ([`TrainingConfig`]): of the run.
        accelerator (`Accelerator`), learning_rate (`float`).

    Raises:
        NonFiniteError: when the loss is no number.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    betas = (config.adam_beta1, config.adam_beta2)
    options = {"weight_decay": config.adam_weight_decay, "eps": config.adam_epsilon, "fused": True}
    optimizer = torch.optim.AdamW(parameters, lr=learning_rate, betas=betas, **options)
    steps = config.num_steps_for_task(task)
    if steps is None:
        per_epoch = math.ceil(len(images.labels) / config.train_batch_size)
        steps = math.ceil(per_epoch * config.num_train_epochs / config.gradient_accumulation_steps)
    lengths = {"num_warmup_steps": config.lr_warmup_steps, "num_training_steps": steps}
    lr_scheduler = get_scheduler(config.lr_scheduler, optimizer=optimizer, **lengths)
    ema_model = None
    if config.use_ema:
        warmup = {"use_ema_warmup": True, "inv_gamma": config.ema_inv_gamma, "power": config.ema_power}
        ema_model = EMAModel(parameters, decay=config.ema_max_decay, foreach=True, **warmup)
        ema_model.to(accelerator.device)
    prepared, prepared_optimizer = accelerator.prepare(model, optimizer)
    num_batches = steps * config.gradient_accumulation_steps
    batches = StepBatches(len(images.labels), config.train_batch_size, num_batches, config.seed, task)
    dataset = TaskImages(images, class_ids, (config.seed, "flip", task) if config.random_flip else None)
    loader = torch.utils.data.DataLoader(dataset, batch_sampler=batches, collate_fn=keep_batch)
    prepared.train()
    for micro_step, (pictures, class_labels) in enumerate(tqdm(loader, desc=f"Task {task}", leave=False)):
        place = divmod(micro_step, config.gradient_accumulation_steps)
        torch.manual_seed(derive_seed(config.seed, "train", task, *place, 0))
        clean_images, class_labels = from_uint8(pictures.to(accelerator.device)), class_labels.to(accelerator.device)
        noise = torch.randn(clean_images.shape, device=accelerator.device)
        timesteps = torch.randint(0, NUM_TRAIN_TIMESTEPS, (len(clean_images),), device=accelerator.device)
        timesteps = timesteps + first_timestep(noise_scheduler)
        noisy_images = add_noise(noise_scheduler, clean_images, noise, timesteps)
        target = training_target(noise_scheduler, clean_images, noise, timesteps)
        with accelerator.accumulate(prepared):
            loss = denoising_losses(prepared, noisy_images, timesteps, class_labels, target).mean()
            if not torch.isfinite(loss):
                raise NonFiniteError(f"task {task}, step {place[0]}: the loss is {loss.item()}")
            accelerator.backward(loss)
            if accelerator.sync_gradients:
                # A class without rows in the batch goes on with its momentum, as FunLoRA's does.
                for parameter in parameters:
                    parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
                if config.max_grad_norm is not None:
                    accelerator.clip_grad_norm_(parameters, config.max_grad_norm)
            prepared_optimizer.step()
            prepared_optimizer.zero_grad()
        if accelerator.sync_gradients:
            if ema_model is not None:
                ema_model.step(parameters)
            lr_scheduler.step()
    if ema_model is not None:
        ema_model.copy_to(parameters)
    accelerator.unwrap_model(prepared, keep_fp32_wrapper=False).eval()
    return steps


class Images:
    """Samples as a run does, but each image once: those of old classes stay. [`Evaluation`] calls it."""

    def __init__(self, config: TrainingConfig):
        self.pipeline, self.config, self.kept = None, config, {}

    def renew(self, pipeline, class_ids: Sequence[int]) -> None:
        """Samples with this pipeline from now on, the images of these classes anew."""
        self.pipeline = pipeline
        self.kept = {asked: image for asked, image in self.kept.items() if asked[0] not in class_ids}

    def __call__(self, class_ids: Sequence[int], keys: Sequence[tuple]) -> torch.Tensor:
        asked = list(zip(class_ids, keys, strict=True))
        if missing := [pair for pair in asked if pair not in self.kept]:
            steps, size = self.config.eval_num_inference_steps, self.config.eval_batch_size
            found = sample_images(self.pipeline, *zip(*missing, strict=True), self.config.seed, steps, size)
            self.kept |= dict(zip(missing, found, strict=True))
        return torch.stack([self.kept[pair] for pair in asked])


def is_that_of_the_run(adapters: FunLoRA, folder: Path) -> bool:
    """Returns whether these are, bit by bit, the adapters in a task's folder."""
    other = FunLoRA.from_pretrained(folder / ADAPTERS).state_dict()
    own = {key: tensor.cpu() for key, tensor in adapters.state_dict().items()}
    return own.keys() == other.keys() and all(torch.equal(own[key], other[key]) for key in own)


def measure(kind: str, run: Finished, learning_rate: float | None, accelerator: Accelerator) -> dict:
    """
    Returns the row of a kind: what it learned and cost.

    Args:
        kind (`str`): `funlora`, or one of `KINDS`.
        run ([`Finished`]).
        learning_rate (`float`, *optional*): by default the run's adapters'.
        accelerator (`Accelerator`).

    Raises:
        ConfigError, CheckpointError, DataError, NonFiniteError: for what cannot be had, adapted or trained.
    """
    config, tasks, class_ids = run.config, run.state["tasks"], run.state["class_ids"]
    device, learning_rate = accelerator.device, learning_rate or run.about["learning_rate"]
    pipeline = load_pipeline(run.folders[0], device)
    unet, noise_scheduler = pipeline.unet, pipeline.scheduler
    unet.to(memory_format=torch.channels_last if config.channels_last else torch.preserve_format)
    model = AdaptedUNet(unet)
    if kind != "funlora":
        model.adapters = create_adapters(kind, unet, [class_ids[name] for name in tasks[0]], config)
    train_split, test_split = load_splits(config, unet.config.in_channels)
    extractors = create_extractors(config, None, train_split, class_ids, device, True)
    evaluation = create_evaluation(config, None, test_split, tasks, class_ids, *extractors)
    classification = create_classification(config, None, train_split, test_split, tasks, class_ids, accelerator)
    images, steps, rows = Images(config), [], read_task_state(run.folders[0])["rows"][:1]
    spent = {"seconds": 0.0, "cpu_seconds": 0.0}
    for task, names in enumerate(tasks[1:], start=1):
        if kind == "funlora":
            adapt(model, tasks, task, class_ids, config)
        else:
            new = [name for name in names if class_ids[name] not in model.adapters.class_ids]
            for name in new:
                model.adapters.add_class(class_ids[name], unet, derive_seed(config.seed, "adapter", name))
            model.adapters.train_only([class_ids[name] for name in names])
        task_images = train_split.select(train_split.rows_of(names)).load(device)
        started = time.perf_counter(), time.process_time()
        options = (noise_scheduler, config, accelerator, learning_rate)
        steps.append(train_task(model, task_images, task, class_ids, *options))
        spent["seconds"] += time.perf_counter() - started[0]
        spent["cpu_seconds"] += time.process_time() - started[1]
        seen = {class_ids[name]: name for earlier in tasks[: task + 1] for name in earlier}
        images.renew(as_pipeline(model, noise_scheduler, seen), [class_ids[name] for name in names])
        rows.append(classification(images, task + 1, lambda phase: contextlib.nullcontext()))
    accelerator.free_memory()
    metrics = evaluation(images, len(tasks))[0]["metrics"]
    row = {
        "kind": kind,
        "learning_rate": learning_rate,
        "parameters_per_class": model.adapters.parameters_per_class,
        "steps": steps,
        "average": {name: statistics.fmean(values) for name, values in metrics.items() if None not in values},
        "per_task": metrics,
        "classification": summarize_classification(rows) if rows[-1] else None,
        # Old classes' images are the ones that they were before.
        "first_task_unchanged": {name: values[0] for name, values in metrics.items()}
        == {name: values[0] for name, values in rows[0]["metrics"].items()},
        **spent,
    }
    if kind == "funlora":
        return row | {"that_of_the_run": is_that_of_the_run(model.adapters, run.folders[-1])}
    return row | ({"rank": RANKS[kind]} if kind in RANKS else {})
