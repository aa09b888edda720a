"""The training script's own step, between two of which other steps are measured: on the same machine, in the same second."""

import contextlib
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import torch
from diffusers import DDIMScheduler, UNet2DModel
from diffusers.training_utils import EMAModel
from tqdm.auto import tqdm

from diffusers_cl.arguments import parse_config
from diffusers_cl.data import load_splits
from diffusers_cl.losses import denoising_losses
from diffusers_cl.results import ROOT
from diffusers_cl.tasks import TaskImages

from .baselines import PlainStep
from .timing import ratio_row, seconds, synchronize


# Not counted, at the start of a task.
WARMUP = 5


class Clock:
    """
    Notes how long the script takes from one step's end to the next one's, and between two steps the same for others.

    Attributes:
        times (`dict[str, list[float]]`): seconds by `<task>: <name>`.
        loading (`float`): seconds in [`TaskImages`] since the last step.
    """

    def __init__(self, device: torch.device, others: dict):
        self.device, self.others = device, others
        self.times: dict[str, list[float]] = defaultdict(list)
        self.loading, self.started, self.place = 0.0, None, (0, 0)

    def tick(self, task: int, step: int, total: int) -> None:
        """Is called at the end of a step."""
        synchronize(self.device)
        now = time.perf_counter()
        if self.started is not None and step > WARMUP:
            self.times[f"{task}: script"].append(now - self.started)
            self.times[f"{task}: loading"].append(self.loading)
            for name, function in self.others.items():
                self.times[f"{task}: {name}"].append(seconds(function, self.device))
        # After the last step comes the checkpoint.
        self.started, self.loading = None if step == total else time.perf_counter(), 0.0


@contextlib.contextmanager
def clocked(script, clock: Clock):
    """Puts the clock where the script's progress bars advance, and where its images come from."""

    class ClockedBar(tqdm):
        def update(self, n=1):
            shown = super().update(n)
            clock.tick(int(self.desc.split()[1].rstrip(":")), self.n, self.total)
            return shown

    class ClockedImages(TaskImages):
        def __getitems__(self, keys):
            start = time.perf_counter()
            found = super().__getitems__(keys)
            clock.loading += time.perf_counter() - start
            return found

    script.tqdm, script.TaskImages = ClockedBar, ClockedImages
    try:
        yield
    finally:
        script.tqdm, script.TaskImages = tqdm, TaskImages


def other_steps(unet: UNet2DModel, num_new: int, use_ema: bool, device: torch.device) -> dict:
    """Returns what is measured between the script's steps, on batches of the same size."""
    channels, size = unet.config.in_channels, unet.config.sample_size
    images = torch.rand(2 * num_new, channels, size, size, device=device) * 2 - 1
    class_labels, timesteps = (torch.zeros(2 * num_new, dtype=torch.long, device=device) for _ in range(2))
    batch = images, timesteps, class_labels, torch.randn_like(images)
    new = tuple(tensor[:num_new] for tensor in batch)
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-6, fused=True)
    ema_model = EMAModel(unet.parameters(), foreach=True) if use_ema else None
    plain = PlainStep(unet, DDIMScheduler(), 1e-6, ema_model, optimizer)

    def passes(rows) -> None:
        denoising_losses(unet, *rows).mean().backward()

    @torch.no_grad()
    def teacher() -> None:
        unet(*new[:2], class_labels=new[2])

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()
        if ema_model is not None:
            ema_model.step(unet.parameters())

    return {
        "student": lambda: passes(batch),
        "teacher": teacher,
        "update": update,
        "plain": lambda: plain(*new[::2]),
        "plain, both halves": lambda: plain(*batch[::2]),
    }


def script_steps(preset: str, data: str | None, device: torch.device, num_steps: int) -> list[dict]:
    """
    Returns the lines of the script's step: two tasks of a preset, the first without replay, the second with distillation, with
    all that a step of the script does (tracker, log, gradient norm, EMA), but without checkpoints. With the threads of the
    preset.
    """
    sys.path.insert(0, str(ROOT))
    import train_continual

    with tempfile.TemporaryDirectory() as folder:
        # Short where it is not measured.
        arguments = [
            *("--config", str(ROOT / "configs" / f"{preset}.yaml"), "--output_dir", folder),
            *([] if data is None else ["--dataset_name", data]),
            *("--classes_per_task", "null", "--tasks", "[[0, 1], [2, 3]]", "--penalty", "none"),
            *("--max_train_steps", str(num_steps), "--checkpointing_steps", "1000000"),
            *(
                "--replay_images_per_class",
                "32",
                "--replay_num_inference_steps",
                "2",
                "--feature_extractor",
                "classifier",
            ),
            *("--eval_num_inference_steps", "2", "--eval_images_per_class", "10"),
        ]
        config = parse_config(arguments)
        torch.set_num_threads(config.num_threads or torch.get_num_threads())
        train, _ = load_splits(config)
        class_ids = {name: index for index, name in enumerate(train.names)}
        unet = train_continual.create_unet(
            train_continual.load_unet_config(config), train.channels, class_ids, config
        ).to(device)
        clock = Clock(device, other_steps(unet.train(), config.train_batch_size, config.use_ema, device))
        log = Path(folder).with_suffix(".log")
        with open(log, "w") as file, clocked(train_continual, clock):
            with contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
                exit_code = train_continual.run(arguments)
        if exit_code != 0:
            raise RuntimeError(f"train_continual.py ended with {exit_code}: {log.read_text()[-2000:]}")
        log.unlink()
        rows = train.select(train.rows_of(train.names[:2]))
        streamed = TaskImages(rows, class_ids)
        keys = [(0, index % len(streamed)) for index in range(config.train_batch_size)]
        decoding = [seconds(lambda: streamed.__getitems__(keys), device) for _ in range(num_steps)]

    def line(what: str, over: list[str], under: list[str], target: str | None = None) -> dict:
        upper, lower = (
            [sum(values) for values in zip(*(clock.times[name] for name in names), strict=True)]
            for names in (over, under)
        )
        ratios = [a / b for a, b in zip(upper, lower, strict=True)]
        medians = {name: sorted(clock.times[name])[len(clock.times[name]) // 2] for name in over + under}
        return ratio_row(what, preset, ratios, target, seconds=medians, batch=config.train_batch_size)

    passes = ["1: student", "1: teacher"]
    streaming = [a / b for a, b in zip(decoding, clock.times["1: script"], strict=False)]
    return [
        line("script's step with distillation, against its passes", ["1: script"], passes, "<= 1.05"),
        line("... against its passes and the optimizer's and EMA's update", ["1: script"], [*passes, "1: update"]),
        line(
            "... against a plain step of as many rows and the teacher",
            ["1: script"],
            ["1: plain, both halves", "1: teacher"],
        ),
        line("script's step without replay, against a plain step", ["0: script"], ["0: plain"]),
        line("images of a batch, share of the step", ["1: loading"], ["1: script"], "<= 0.03"),
        ratio_row("... if they were decoded in every step", preset, streaming, batch=config.train_batch_size),
    ]
