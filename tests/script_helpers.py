"""What the tests of the script share: tiny settings of configs/digits.yaml, and ways to run it."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, GradientState
from filelock import FileLock
from PIL import Image
from transformers import ConvNextImageProcessor, ResNetConfig, ResNetForImageClassification

import train_continual


ROOT = Path(train_continual.__file__).parent
UNET = {
    "_class_name": "UNet2DModel",
    "block_out_channels": [8, 16],
    "down_block_types": ["DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 8,
    "norm_num_groups": 4,
}
# Two tasks of five steps, with everything that the preset has; sampling and measuring are as short as they can be. Shards
# of three images leave several for two processes to share out.
SETTINGS = """
tasks: [[0, 1], [2, 3]]
classes_per_task: null
max_train_steps: 5
train_batch_size: 8
learning_rate: 0.001
lr_scheduler: cosine
lr_warmup_steps: 1
use_ema: false
penalty: rank1_ewc
penalty_mode: decoupled
ewc_lambda: auto
fisher_samples: 8
replay: generative_distillation
replay_images_per_class: 2
replay_num_inference_steps: 2
replay_batch_size: 3
eval_images_per_class: 4
eval_num_inference_steps: 2
eval_batch_size: 3
checkpointing_steps: 1
checkpoints_total_limit: null
report_to: none
num_threads: 1
"""
# All that can be lost when a run is interrupted. Cosine with warm-up (the preset's) moves the learning rate at every step.
EVERYTHING = {
    "gradient_accumulation_steps": 2,
    "dataloader_num_workers": 2,
    "use_ema": "true",
    "random_flip": "true",
    "penalty_mode": "loss",
    "replay_refresh": "once",
}


def tiny_files(folder: Path) -> Path:
    """Returns a folder with `settings.yaml`, `unet.json` and `extractor/`, an untrained image classifier of the ten digits."""
    with FileLock(f"{folder}.lock"):
        if not (folder / "unet.json").exists():
            torch.manual_seed(0)
            config = ResNetConfig(
                embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic", num_labels=10
            )
            config.id2label, config.label2id = {i: str(i) for i in range(10)}, {str(i): i for i in range(10)}
            ResNetForImageClassification(config).save_pretrained(folder / "extractor")
            ConvNextImageProcessor(size={"shortest_edge": 32}, crop_pct=1.0).save_pretrained(folder / "extractor")
            (folder / "settings.yaml").write_text(SETTINGS)
            (folder / "unet.json").write_text(json.dumps(UNET))
    return folder


def shared_folder(tmp_path_factory) -> Path:
    """Returns a temporary folder that all workers of a pytest session see."""
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def finished_run(tmp_path_factory, name: str, **settings) -> Path:
    """Returns the folder of a finished run, which the first worker that asks for it makes."""
    shared = shared_folder(tmp_path_factory)
    files = tiny_files(shared / "tiny")
    with FileLock(f"{shared / name}.lock"):
        if not (shared / name / "status.json").exists():
            assert run(arguments(files, shared / name, **settings)) == 0
    return shared / name


def interrupted_copy(whole: Path, output_dir: Path, last_step: int, num_tasks: int, replay: bool) -> Path:
    """Copies a finished run of two tasks as it was after `last_step`, with `num_tasks` published tasks."""
    shutil.copytree(whole, output_dir)
    for checkpoint in output_dir.glob("checkpoint-*"):
        if int(checkpoint.name.removeprefix("checkpoint-")) > last_step:
            shutil.rmtree(checkpoint)
    for task in range(num_tasks, 2):
        shutil.rmtree(output_dir / f"task-{task:02d}")
        (output_dir / "samples" / f"task-{task:02d}.png").unlink()
    for name in ("metrics.json", "report.md", "run.json", "status.json"):
        (output_dir / name).unlink()
    shutil.rmtree(output_dir / "plots")
    if not replay:
        shutil.rmtree(output_dir / "replay")
    # What a kill in the middle of writing leaves.
    (output_dir / f".partial-checkpoint-{last_step + 1}").mkdir()
    (output_dir / f".partial-checkpoint-{last_step + 1}" / "model.safetensors").write_bytes(b"half")
    return output_dir


def arguments(files: Path, output_dir: Path, *extra: str, **settings) -> list[str]:
    """Returns a command line: configs/digits.yaml, `SETTINGS` over it, then `extra`, and `settings` over all."""
    values = {
        "model_config_name_or_path": files / "unet.json",
        "feature_extractor": files / "extractor",
        "cache_dir": files / "cache",
        "output_dir": output_dir,
        **settings,
    }
    command = ["--config", str(ROOT / "configs" / "digits.yaml"), "--config", str(files / "settings.yaml"), *extra]
    for key, value in values.items():
        command += [f"--{key}", str(value)]
    return command


def run(command: list[str]) -> int:
    """Returns the exit code of `train_continual.run`, in this process, with Accelerate's state and threads put back."""
    threads = torch.get_num_threads()
    try:
        return train_continual.run(command)
    finally:
        torch.set_num_threads(threads)
        with contextlib.suppress(Exception):
            torch.distributed.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()


def environment(files: Path) -> dict[str, str]:
    """Returns the environment of a new process: no network, no GPU, nothing of the user's."""
    dead = "http://127.0.0.1:9"
    return {
        **{key: value for key, value in os.environ.items() if not key.startswith(("HF_", "ACCELERATE_"))},
        "HF_HUB_OFFLINE": "1",
        "HF_HOME": str(files / "hf"),
        "TORCH_HOME": str(files / "torch"),
        "ACCELERATE_USE_CPU": "1",
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        **dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), dead),
    }


def start(files: Path, command: list[str], launcher: tuple[str, ...] = ()) -> subprocess.Popen:
    """Starts `python [launcher] train_continual.py` in a new process."""
    return subprocess.Popen(
        [sys.executable, *launcher, str(ROOT / "train_continual.py"), *command],
        cwd=ROOT,
        env=environment(files),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell's background jobs, and so their children, ignore Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def read_log(output_dir: Path) -> list[dict]:
    """Returns the lines of train_log.jsonl."""
    return [json.loads(line) for line in (output_dir / "logs" / "train_log.jsonl").read_text().splitlines()]


def write_images(folder: Path, classes: dict[str, int], size: int = 8) -> Path:
    """Writes an imagefolder of plain grey images: class k has the grey levels 40 k, 40 k + 1, ..."""
    for number, (name, count) in enumerate(classes.items()):
        (folder / name).mkdir(parents=True)
        for index in range(count):
            Image.new("L", (size, size), 40 * number + index).save(folder / name / f"{index:02d}.png")
    return folder
