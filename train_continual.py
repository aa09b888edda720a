"""
Trains a class-conditional diffusion model on a stream of class sets.

    accelerate launch train_continual.py --config configs/digits.yaml [--config configs/methods/ewc.yaml] [--any_key value]

The order is that of diffusers' `examples/unconditional_image_generation/train_unconditional.py`, inside a loop over tasks.
"""

import json
import logging
import math
import shutil
import sys
import traceback
import warnings
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path


if __name__ == "__main__":
    # Before the imports that take seconds: a launcher may die in them.
    from diffusers_cl.signals import end_with_the_launcher

    end_with_the_launcher()

import datasets
import diffusers
import torch
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.logging import get_logger
from accelerate.utils import DynamoBackend, ProjectConfiguration
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel
from diffusers.utils import is_wandb_available
from torch.nn.utils import get_total_norm
from tqdm.auto import tqdm

from diffusers_cl import __version__
from diffusers_cl.adapters import adapt, as_pipeline, parameter_counts, with_adapter
from diffusers_cl.arguments import parse_config
from diffusers_cl.checkpoint import check_finite, load_checkpoint, save_checkpoint
from diffusers_cl.classification import create_classification
from diffusers_cl.config import NUM_TRAIN_TIMESTEPS, OPERATIONAL_KEYS, SECRET_KEYS, TrainingConfig
from diffusers_cl.data import load_splits
from diffusers_cl.draws import FisherBatches
from diffusers_cl.errors import ConfigError, NonFiniteError
from diffusers_cl.evaluation import class_grid_columns, create_evaluation, create_extractors, nearest_training_images
from diffusers_cl.faults import explain
from diffusers_cl.files import write_json
from diffusers_cl.folders import CONSOLIDATION, task_folder
from diffusers_cl.growth import load_weights, restore_penalty
from diffusers_cl.hub import write_task_folder
from diffusers_cl.inputs import INPUTS_NAME, check_inputs, collect_inputs
from diffusers_cl.losses import add_noise, denoising_losses, first_timestep, training_target
from diffusers_cl.methods import create_penalty, create_replay
from diffusers_cl.models import create_scheduler, create_unet, load_unet_config
from diffusers_cl.output import OutputLock, check_output_dir, prepare_output_dir, write_status
from diffusers_cl.pipeline import from_uint8
from diffusers_cl.plots import format_number
from diffusers_cl.preflight import scan
from diffusers_cl.processes import rank, refuse_sharded_parameters, set_num_threads
from diffusers_cl.publish import RECORD_NAME, BackgroundPush, finish_push
from diffusers_cl.randomness import derive_seed
from diffusers_cl.record import RunRecord
from diffusers_cl.replay import replay_weights
from diffusers_cl.replay_images import extend_memory, update_replay
from diffusers_cl.report import write_report
from diffusers_cl.resume import check_agreement, find_resume_point, go_back
from diffusers_cl.sampling import image_grid, sample_images
from diffusers_cl.shards import Shards, tensors_digest
from diffusers_cl.signals import Interrupted, StopSignals
from diffusers_cl.start import Start, check_start, copy_start, extend_stream, load_start, origin, take_over
from diffusers_cl.starvation import PenaltyShare
from diffusers_cl.task_repos import check_hub_access, task_repo_id
from diffusers_cl.tasks import StepBatches, TaskImages, keep_batch, resolve_tasks


logger = get_logger(__name__, log_level="INFO")
# Torch's own, at the first forward-mode product.
warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)


def main(config: TrainingConfig, start: Start | None, lock: OutputLock, stop: StopSignals) -> None:
    """Runs the stream that a configuration describes, after the task `start`, from where the run in `output_dir` stands."""
    output_dir = Path(config.output_dir)
    check_output_dir(config, lock)
    refuse_sharded_parameters()
    if start is not None:
        check_start(start, config)
    unet_config = load_unet_config(config, start and start.folder)
    # Before anything is trained that could not be pushed.
    hub_model_id = None
    if config.push_to_hub and rank() == 0:
        name = config.hub_model_id or output_dir.resolve().name
        first_own_task = 0 if start is None else start.task + 1
        options = {"license": config.license, "is_new": not (output_dir / RECORD_NAME).exists()}
        hub_model_id = check_hub_access(name, config.hub_token, config.hub_private_repo, first_own_task, **options)
    if config.report_to == "wandb" and not is_wandb_available():
        raise ConfigError("report_to is 'wandb', which is not installed; allowed here: tensorboard, none")
    set_num_threads(config)

    accelerator = Accelerator(
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        mixed_precision=config.mixed_precision,
        dynamo_backend=config.dynamo_backend,
        log_with=None if config.report_to == "none" else config.report_to,
        project_config=ProjectConfiguration(project_dir=output_dir, logging_dir=output_dir / config.logging_dir),
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(seconds=config.ddp_timeout))],
    )
    device = accelerator.device
    quiet = not accelerator.is_local_main_process

    logging.basicConfig(
        format="%(asctime)s - %(levelname)s - %(name)s - %(message)s",
        datefmt="%m/%d/%Y %H:%M:%S",
        level=logging.INFO,
    )
    logging.getLogger("httpx").setLevel(logging.WARNING)
    logger.info(accelerator.state, main_process_only=False)
    if accelerator.is_local_main_process:
        datasets.utils.logging.set_verbosity_warning()
        diffusers.utils.logging.set_verbosity_warning()
    else:
        datasets.utils.logging.set_verbosity_error()
        diffusers.utils.logging.set_verbosity_error()
        datasets.disable_progress_bars()

    precision = "tf32" if config.allow_tf32 else "ieee"
    torch.backends.cuda.matmul.fp32_precision = torch.backends.cudnn.conv.fp32_precision = precision

    # Get the datasets, and the classes of every task. A class keeps the id of its place in the stream.
    with accelerator.local_main_process_first():
        train_split, test_split = load_splits(config, start and unet_config["in_channels"])
        tasks = resolve_tasks(config, train_split, test_split)
    new_classes = [name for names in tasks for name in names]
    class_ids = {name: class_id for class_id, name in enumerate(new_classes)}
    if start is not None:
        tasks, class_ids = extend_stream(start, tasks, config, train_split.channels * config.resolution**2)
    # One training phase a task; a joint run has one for all of them.
    if config.stream == "joint":
        phases, num_tasks_seen = [list(class_ids)], [len(tasks)]
    else:
        phases, num_tasks_seen = tasks, list(range(1, len(tasks) + 1))
    if config.stream == "cumulative":
        phases = [[name for names in tasks[: task + 1] for name in names] for task in range(len(tasks))]

    # Every image is looked at, and the extractor is there, before training starts, or the run stops here.
    with accelerator.local_main_process_first():
        data = scan([train_split, test_split], new_classes, config.cache_dir, quiet)
        extractors = create_extractors(config, start, train_split, class_ids, device, quiet)
    if data["converted"]:
        logger.info(f"Of {data['images']} images some are converted: {data['converted']}")
    # How the processes share out what is sampled and measured.
    sharing = {
        "process_index": accelerator.process_index,
        "num_processes": accelerator.num_processes,
        "gather": accelerator.gather if accelerator.num_processes > 1 else None,
    }
    evaluation = create_evaluation(config, start, test_split, tasks, class_ids, *extractors, **sharing)
    classification = create_classification(config, start, train_split, test_split, tasks, class_ids, accelerator)

    # Initialize the model and the noise scheduler
    min_rows = unet_config["num_class_embeds"] if start else 0
    layout = torch.channels_last if config.channels_last else torch.preserve_format
    unet = create_unet(unet_config, train_split.channels, class_ids, config, min_rows).to(device, memory_format=layout)
    unet = with_adapter(unet, config, is_compiled=accelerator.state.dynamo_plugin.backend != DynamoBackend.NO)
    noise_scheduler = create_scheduler(config, start and start.folder)
    replay, penalty = create_replay(config), create_penalty(config, logger.warning)
    if start is not None:
        take_over(start, unet, penalty, config, logger.warning)

    # Handle the output folder. What the numbers depend on beside the configuration is as it was, in a run that goes on.
    inputs, changes = collect_inputs(data, class_ids, unet_config, accelerator), []
    if accelerator.is_main_process:
        prepare_output_dir(config, lock)
        if not task_folder(output_dir, len(phases) - 1).exists():
            changes = check_inputs(output_dir, inputs, config.allow_inexact)
            write_json(output_dir / INPUTS_NAME, inputs)
        if start is not None:
            copy_start(start, output_dir, config.revision)
            logger.info(f"Going on from {start.model}, whose settings hold where nothing else is given:")
            logger.info(", ".join(f"{key}: {getattr(config, key)}" for key in start.settings))
    accelerator.wait_for_everyone()

    # Potentially go on from a previous run: after its last finished task, or within a task from a checkpoint.
    resume = find_resume_point(output_dir, config.resume_from_checkpoint, len(phases), logger.warning)
    check_agreement(resume, accelerator)
    if config.resume_from_checkpoint is not None and accelerator.is_main_process:
        go_back(output_dir, resume)
    rows, fisher, global_step, checkpoint = resume.rows, resume.fisher, resume.global_step, resume.checkpoint
    if rows and not (start is not None and resume.task == start.task + 1):
        previous = task_folder(output_dir, resume.task - 1)
        load_weights(unet, previous)
        if penalty is not None:
            restore_penalty(penalty, previous / CONSOLIDATION, unet)
        logger.info(f"Going on after {previous}")

    # Finished tasks are pushed while the next one trains.
    push = None
    if config.push_to_hub and accelerator.is_main_process:
        script = Path(__file__).parent / "scripts" / "push.py"
        options = {"token": config.hub_token, "private": config.hub_private_repo, "revision": config.hub_revision}
        push = BackgroundPush(output_dir, hub_model_id, script=script, **options)
        push.start()
    if resume.task == len(phases):
        if accelerator.is_main_process:
            shutil.rmtree(output_dir / "shards", ignore_errors=True)
        finish_push(push, config.hub_push_timeout)
        accelerator.print(f"{output_dir} is finished. The report is {output_dir / 'report.md'}")
        return

    record = RunRecord(output_dir, accelerator, changes)
    record.write()
    if accelerator.is_main_process:
        public = {key: value for key, value in asdict(config).items() if key not in SECRET_KEYS}
        scalars = {key: value for key, value in public.items() if isinstance(value, (int, float, str, bool))}
        accelerator.init_trackers("train_continual", config=scalars)
        train_log = open(output_dir / "logs" / "train_log.jsonl", "a", buffering=1)  # noqa: SIM115 (closed at the end)

    def sampler(unet, phase: str):
        """Returns a function of class ids and noise keys that samples uint8 images, shared out over the processes."""
        is_replay = phase == "replay"
        return partial(
            sample_images,
            as_pipeline(unet, noise_scheduler),
            seed=config.seed,
            num_inference_steps=config.replay_num_inference_steps if is_replay else config.eval_num_inference_steps,
            batch_size=config.replay_batch_size if is_replay else config.eval_batch_size,
            **sharing,
            description=f"Task {record.task}: sampling ({phase})",
            disable_progress_bar=quiet,
            folder=shards / phase,
        )

    for task in range(resume.task, len(phases)):
        record.task = task
        # Parts of long phases, from which a run goes on that was killed in one.
        shards = output_dir / "shards" / f"task-{task:02d}"
        seen = list(dict.fromkeys(name for names in tasks[: num_tasks_seen[task]] for name in names))

        # The model of the previous task is the teacher, and generates what is replayed.
        memory = None
        if replay is not None and task > 0:
            with record.phase("replay"):
                memory, num_generated = update_replay(
                    replay,
                    output_dir,
                    task,
                    tasks,
                    class_ids,
                    unet,
                    partial(sampler, phase="replay"),
                    config,
                    accelerator,
                    logger.warning,
                    none_kept=start is not None and task == start.task + 1,
                )
                record.content["images"]["generated"] += num_generated
        w_new, w_old = replay_weights(config.replay_weighting, task if replay else 0, config.distillation_weight)

        # The task's images, decoded once and kept where they fit; its length, in optimizer steps
        with record.phase("load"):
            task_rows = train_split.select(train_split.rows_of(phases[task])).load(device)
        batches_per_epoch = math.ceil(len(task_rows.labels) / (config.train_batch_size * accelerator.num_processes))
        max_train_steps = math.ceil(batches_per_epoch * config.num_train_epochs / config.gradient_accumulation_steps)
        if config.max_train_steps is not None:
            covered = range(len(tasks)) if config.stream == "joint" else [task]
            max_train_steps = sum(config.num_steps_for_task(t) for t in covered)
        step_before_task = global_step

        # Initialize the optimizer and the learning rate scheduler, anew for every task
        learning_rate = adapt(unet, tasks, task, class_ids, config)
        optimizer = torch.optim.AdamW(
            unet.parameters(),
            lr=learning_rate,
            betas=(config.adam_beta1, config.adam_beta2),
            weight_decay=config.adam_weight_decay,
            eps=config.adam_epsilon,
            fused=True,
        )
        lr_scheduler = get_scheduler(
            config.lr_scheduler,
            optimizer=optimizer,
            num_warmup_steps=config.lr_warmup_steps,
            num_training_steps=max_train_steps,
        )
        ema_model = None
        if config.use_ema:
            ema_model = EMAModel(
                unet.parameters(),
                decay=config.ema_max_decay,
                use_ema_warmup=True,
                inv_gamma=config.ema_inv_gamma,
                power=config.ema_power,
                foreach=True,
            )
            ema_model.to(device)

        if checkpoint is not None:
            path, state = checkpoint
            load_checkpoint(path, unet, optimizer, ema_model)
            lr_scheduler.load_state_dict(state["lr_scheduler"])
            for group, lr in zip(optimizer.param_groups, lr_scheduler.get_last_lr(), strict=True):
                group["lr"] = lr
            if accelerator.scaler is not None:
                accelerator.scaler.load_state_dict(state["scaler"])
            global_step = state["step"]
            logger.info(f"Resuming from {path}")
            checkpoint = None

        # Prepare everything with our `accelerator`. The schedule counts optimizer steps, so it is stepped by the loop.
        model, prepared_optimizer = accelerator.prepare(unet, optimizer)
        first_micro_step = (global_step - step_before_task) * config.gradient_accumulation_steps
        batches = StepBatches(
            len(task_rows.labels),
            config.train_batch_size,
            max_train_steps * config.gradient_accumulation_steps,
            config.seed,
            task,
            first_micro_step,
            accelerator.process_index,
            accelerator.num_processes,
        )
        train_dataloader = torch.utils.data.DataLoader(
            TaskImages(task_rows, class_ids, (config.seed, "flip", task) if config.random_flip else None),
            batch_sampler=batches,
            collate_fn=keep_batch,
            num_workers=config.dataloader_num_workers if task_rows.images is None else 0,
        )

        logger.info(f"***** Running training, task {task} of {len(phases)}: {', '.join(phases[task][:20])} *****")
        logger.info(f"  Num examples = {len(task_rows.labels)}")
        logger.info(f"  Num replayed examples = {len(replay) if replay else 0}")
        logger.info(f"  Instantaneous batch size per device = {config.train_batch_size} (replay doubles it)")
        total_batch_size = config.train_batch_size * accelerator.num_processes * config.gradient_accumulation_steps
        logger.info(f"  Total train batch size (w. parallel, distributed & accumulation) = {total_batch_size}")
        logger.info(f"  Gradient Accumulation steps = {config.gradient_accumulation_steps}")
        logger.info(f"  Optimization steps of this task = {max_train_steps}")

        progress_bar = tqdm(
            total=max_train_steps, initial=global_step - step_before_task, desc=f"Task {task}: training", disable=quiet
        )
        penalty_share = PenaltyShare(
            penalty, config.penalty_mode, lambda text, task=task: logger.warning(f"Task {task}: {text}")
        )
        # A signal is looked at after every step, by all processes together.
        with record.phase("train"), stop.deferred():
            model.train()
            parts = torch.zeros(4, device=device)
            for micro_step, (images, class_labels) in enumerate(train_dataloader, start=first_micro_step):
                # Every draw below is a function of the seed and the step alone, so there is no state to save.
                place = divmod(micro_step, config.gradient_accumulation_steps)
                torch.manual_seed(derive_seed(config.seed, "train", task, *place, accelerator.process_index))
                images, class_labels = images.to(device), class_labels.to(device)
                num_new = len(images)
                if replay:
                    replayed_images, replayed_labels = replay.sample(images)
                    images = torch.cat([images, replayed_images.to(device)])
                    class_labels = torch.cat([class_labels, replayed_labels.to(device)])
                clean_images = from_uint8(images)

                # Sample noise that we'll add to the images, and a random timestep for each image
                noise = torch.randn(clean_images.shape, device=device)
                timesteps = torch.randint(0, NUM_TRAIN_TIMESTEPS, (len(clean_images),), device=device)
                timesteps = timesteps + first_timestep(noise_scheduler)
                # Add noise to the clean images according to the noise magnitude at each timestep
                # (this is the forward diffusion process, or a flow's straight path)
                noisy_images = add_noise(noise_scheduler, clean_images, noise, timesteps)

                target = training_target(noise_scheduler, clean_images, noise, timesteps)
                if replay:
                    old_rows = (part[num_new:] for part in (noisy_images, timesteps, class_labels, target))
                    with accelerator.autocast():
                        replayed_target = replay.target(*old_rows)
                    target = torch.cat([target[:num_new], replayed_target.to(target.dtype)])

                with accelerator.accumulate(model):
                    losses = denoising_losses(model, noisy_images, timesteps, class_labels, target)
                    loss_new = losses[:num_new].mean()
                    loss_old = losses[num_new:].mean() if replay else torch.zeros_like(loss_new)
                    loss = w_new * loss_new + w_old * loss_old
                    penalty_value = torch.zeros_like(loss_new)
                    if penalty is not None and config.penalty_mode == "loss":
                        penalty_value = penalty(unet)
                        loss = loss + penalty_value
                    accelerator.backward(loss)
                    parts += torch.stack([loss, loss_new, loss_old, penalty_value]).detach()

                    if accelerator.sync_gradients:
                        if config.max_grad_norm is not None:
                            grad_norm = accelerator.clip_grad_norm_(unet.parameters(), config.max_grad_norm)
                        else:
                            accelerator.unscale_gradients()
                            grad_norm = get_total_norm([p.grad for p in unet.parameters() if p.grad is not None])
                        signalled = parts.new_full((1,), float(stop.received is not None))
                        parts = torch.cat([parts / config.gradient_accumulation_steps, signalled])
                        parts = accelerator.reduce(parts, reduction="mean")
                        # The one wait for the device in a step, before the weights change.
                        *values, stopping, grad_norm = torch.cat([parts, grad_norm.reshape(1)]).tolist()
                        # With fp16 an infinite gradient is the gradient scaler's business.
                        checked = values if accelerator.mixed_precision == "fp16" else [*values, grad_norm]
                        finite = all(map(math.isfinite, checked))
                        if not finite:
                            measured = {"loss": values[0], "penalty": values[3], "grad_norm": grad_norm}
                            first = micro_step + 1 - config.gradient_accumulation_steps
                            images_of_step = task_rows.rows[batches.indices(first, micro_step + 1)].tolist()
                            if not record.skip(global_step, config.skip_nonfinite, measured, images_of_step):
                                raise NonFiniteError(
                                    f"step {global_step}: loss {values[0]}, gradient norm {grad_norm}; nothing was updated,"
                                    " the last checkpoint is kept. skip_nonfinite skips such steps"
                                )
                        clipped = min(1.0, (config.max_grad_norm or math.inf) / (grad_norm + 1e-6))
                        if finite:
                            penalty_share.before_update(unet, global_step, clipped)
                            prepared_optimizer.step()
                            penalty_share.after_update(unet)
                    prepared_optimizer.zero_grad()

                # Checks if the accelerator has performed an optimization step behind the scenes
                if accelerator.sync_gradients:
                    lr = lr_scheduler.get_last_lr()[0]
                    if finite:
                        if penalty is not None and config.penalty_mode == "decoupled":
                            penalty.step(unet, lr)
                        if ema_model is not None:
                            ema_model.step(unet.parameters())
                    lr_scheduler.step()
                    progress_bar.update(1)
                    global_step += 1
                    num_batches = config.gradient_accumulation_steps * accelerator.num_processes
                    record.content["images"]["trained"] += num_new * num_batches
                    record.content["images"]["replayed"] += (len(images) - num_new) * num_batches

                    logs = {"loss": values[0], "loss_new": values[1], "grad_norm": grad_norm, "lr": lr}
                    if replay:
                        logs["loss_replay"] = values[2]
                    if penalty is not None and config.penalty_mode == "loss":
                        logs["penalty"] = values[3]
                    if finite and (share := penalty_share.finish(unet)) is not None:
                        logs["penalty_share"] = share
                    if ema_model is not None:
                        logs["ema_decay"] = ema_model.cur_decay_value
                    parts = torch.zeros(4, device=device)
                    progress_bar.set_postfix(loss=f"{values[0]:.4f}", lr=lr, refresh=False)
                    task_ends = global_step - step_before_task == max_train_steps
                    # TensorBoard takes most of a millisecond.
                    if finite and (task_ends or global_step % config.logging_steps == 0):
                        accelerator.log(logs, step=global_step)
                    if finite and accelerator.is_main_process:
                        train_log.write(json.dumps({"step": global_step, "task": task, **logs}) + "\n")

                    if task_ends or stopping or global_step % config.checkpointing_steps == 0:
                        if not accelerator.is_main_process:
                            # As the main process does before it saves: all stop together.
                            check_finite(unet, optimizer, ema_model)
                        else:
                            state = {
                                "task": task,
                                "lr_scheduler": lr_scheduler.state_dict(),
                                "scaler": accelerator.scaler and accelerator.scaler.state_dict(),
                            }
                            limit = config.checkpoints_total_limit
                            path = save_checkpoint(output_dir, global_step, unet, optimizer, state, ema_model, limit)
                            logger.info(f"Saved state to {path}")
                    if stopping:
                        # Nobody leaves before the checkpoint is there.
                        accelerator.wait_for_everyone()
                        raise Interrupted(stop.received or 143)
        progress_bar.close()

        accelerator.wait_for_everyone()
        if ema_model is not None:
            ema_model.copy_to(unet.parameters())
        # Fisher, teacher, evaluation and publishing all see the network without the mixed-precision wrapper.
        unet = accelerator.unwrap_model(model, keep_fp32_wrapper=False, keep_torch_compile=False).eval()
        del model, prepared_optimizer, optimizer, lr_scheduler, ema_model
        accelerator.free_memory()

        if penalty is not None:
            with record.phase("fisher"):
                logger.info(f"Task {task}: estimating the Fisher")
                draws = FisherBatches(
                    TaskImages(task_rows, class_ids),
                    noise_scheduler,
                    config.fisher_samples,
                    tuple(config.fisher_timesteps),
                    config.fisher_batch_size,
                    config.seed,
                    task,
                    device,
                    accelerator.process_index,
                    accelerator.num_processes,
                )
                own_inputs = {**inputs, "weights": tensors_digest(unet.state_dict()), "rank": rank()}
                penalty.consolidate(
                    unet,
                    lambda model, batch: denoising_losses(model, *batch),
                    draws,
                    reduce=lambda tensor: accelerator.reduce(tensor, reduction="sum"),
                    diagnostics=config.fisher_diagnostics,
                    progress=Shards(shards / f"fisher-{rank()}", own_inputs, config.checkpointing_steps),
                )

        fisher = [*fisher, penalty and penalty.summary()[-1]]
        classified = classification(sampler(unet, "classify"), num_tasks_seen[task], record.phase)
        with record.phase("evaluate"):
            row, first_images = evaluation(sampler(unet, "evaluate"), num_tasks_seen[task])
            record.content["images"]["generated"] += sum(row["num_images"])
            rows = [*rows, row | classified]
            metrics = {
                "schema": 1,
                "version": __version__,
                "tasks": tasks,
                "stream": config.stream,
                "first_task": 0 if start is None else start.task + 1,
                **evaluation.report(rows),
                "parameters": parameter_counts(unet, class_ids),
                "fisher": fisher,
                "config": {key: value for key, value in asdict(config).items() if key not in OPERATIONAL_KEYS},
            }
            for name, metric in metrics["metrics"].items():
                logger.info(f"Task {task}: {name} " + ", ".join(map(format_number, metric["matrix"][-1])))
                if metric["average"][-1] is not None:
                    accelerator.log({f"eval/{name}": metric["average"][-1]}, step=global_step)

        # The task folder comes last: once it is there, the task is finished.
        with record.phase("publish"):
            if accelerator.is_main_process:
                folder = task_folder(output_dir, task)
                columns = class_grid_columns(first_images, len(seen))
                grid = image_grid(first_images, columns)
                grid.save(output_dir / "samples" / f"{folder.name}.png")
                if task == len(phases) - 1:
                    (output_dir / "plots").mkdir(exist_ok=True)
                    nearest = nearest_training_images(first_images, columns, seen, train_split)
                    image_grid(nearest, columns).save(output_dir / "plots" / "nearest.png")
                if config.report_to == "tensorboard":
                    tracker = accelerator.get_tracker("tensorboard")
                    tracker.log_images({"samples": first_images.numpy()}, step=global_step)
                if replay is not None and replay.source == "memory":
                    memory = extend_memory(
                        memory,
                        TaskImages(task_rows, class_ids),
                        config.memory_images_per_class,
                        config.memory_bytes,
                        config.seed,
                    )
                # With `latest` nothing that was generated has to be kept.
                once = replay and replay.source == "generated" and config.replay_refresh == "once"
                record.stored(
                    penalty=penalty and penalty.state_dict(),
                    memory=memory,
                    replay={"images": replay.images} if once else None,
                )
                write_json(output_dir / "metrics.json", metrics)
                record.write()
                write_report(output_dir)
                state = {
                    "task": task,
                    "tasks": tasks,
                    "class_ids": class_ids,
                    "seen_classes": seen,
                    "global_step": global_step,
                    **origin(task, start, config, hub_model_id),
                    "rows": rows,
                    "fisher": fisher,
                    "floor": metrics["floor"],
                    "feature_extractor_info": metrics["feature_extractor_info"],
                }
                repo_id = hub_model_id and task_repo_id(hub_model_id, task)
                pipeline = as_pipeline(unet, noise_scheduler, {class_ids[name]: name for name in seen})
                write_task_folder(
                    output_dir, pipeline, penalty, memory, evaluation, state, grid, config, metrics, repo_id
                )
                shutil.rmtree(shards.parent, ignore_errors=True)
                if push is not None:
                    push.start()
            accelerator.wait_for_everyone()

    record.write()
    if accelerator.is_main_process:
        train_log.close()
    accelerator.print(f"Done. The report is {output_dir / 'report.md'}")
    accelerator.end_training()
    finish_push(push, config.hub_push_timeout)


def run(arguments: list[str] | None = None) -> int:
    """Returns the exit code of a run; a fault that its user can mend prints one sentence."""
    output_dir, debug = None, "--debug" in (sys.argv if arguments is None else arguments)
    with StopSignals() as stop, OutputLock() as lock:
        try:
            config = parse_config(arguments)
            output_dir, debug = Path(config.output_dir), config.debug
            if (start := load_start(config)) is not None:
                config = parse_config(arguments, inherited=start.settings)
            main(config, start, lock, stop)
            stop.ignore()
        except (Exception, KeyboardInterrupt) as error:
            stop.ignore()
            exit_code, message = explain(error, output_dir, stop.received)
            # A folder that holds another run keeps that run's status.
            if lock.held:
                write_status(output_dir, exit_code, message or f"{type(error).__name__}: {error}")
            if message is None:
                raise
            if debug:
                traceback.print_exc()
            print(f"train_continual.py: {'error: ' * (exit_code < 128)}{message}", file=sys.stderr)
            return exit_code
        write_status(output_dir, 0, "finished")
    return 0


if __name__ == "__main__":
    sys.exit(run())
