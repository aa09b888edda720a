"""
Makes a task folder of a class-conditional model that was trained elsewhere, so that it can learn new classes.

    python scripts/adopt.py --model me/my-ddpm --output_dir adopted --feature_extractor classifier
    accelerate launch train_continual.py --pretrained_model_name_or_path adopted --train_data_dir my_new_classes

The model is a `UNet2DModel` with a class embedding and a scheduler of DDPM's kind or of flow matching (Euler's or Heun's): a
pipeline, or `unet/` and `scheduler/` alone. Without data, all that is measured or estimated is so on the model's own samples.
"""

import argparse
import sys
import warnings
from dataclasses import replace
from pathlib import Path

from diffusers_cl.adopt import OWN_SAMPLES_PER_CLASS, adopt
from diffusers_cl.config import NUM_TRAIN_TIMESTEPS, TrainingConfig
from diffusers_cl.errors import ConfigError, RunError
from diffusers_cl.losses import is_flow
from diffusers_cl.sampling import choose_device
from diffusers_cl.source import Source, open_source
from diffusers_cl.validation import validate


# Torch's own, at the first forward-mode product.
warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated", category=FutureWarning)

# Options that are keys of the configuration, as they are.
CONFIG_OPTIONS = """
    dataset_name dataset_config_name train_data_dir image_column label_column train_split eval_split resize_mode penalty
    ewc_lambda fisher_samples replay seed feature_extractor feature_extractor_weights_path license cache_dir
""".split()


def positive_int(text: str) -> int:
    """Returns a command line value that must be 1 or more."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def number_or_text(text: str) -> float | str:
    """Returns a command line value as a number, if it is one."""
    try:
        return float(text)
    except ValueError:
        return text


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the options, from the command line by default."""
    defaults = TrainingConfig()
    parser = argparse.ArgumentParser(description="Makes a task folder of a model that was trained elsewhere.")
    parser.add_argument("--model", required=True, help="A folder or Hub repo with a unet and a scheduler.")
    parser.add_argument("--revision", help="Branch, tag or commit of the repo.")
    parser.add_argument("--output_dir", type=Path, required=True, help="Becomes the task folder; a new one.")
    parser.add_argument(
        "--labels",
        help="A JSON or YAML file: a list of class names in the order of the class embedding's rows, or a mapping of row"
        " numbers to names. Rows without a name are not among the model's classes. Default: id2label of the model's config,"
        " else the row numbers.",
    )
    parser.add_argument(
        "--num_images_per_class",
        type=positive_int,
        help="How many images of a class it is measured on, here and where a run goes on from it. Default: all test images"
        f" of the data; without data {OWN_SAMPLES_PER_CLASS} samples.",
    )
    parser.add_argument("--num_inference_steps", type=positive_int, default=50, help="Denoising steps for an image.")
    parser.add_argument(
        "--batch_size", type=positive_int, default=64, help="Images in one forward pass when sampling."
    )
    parser.add_argument("--device", help="Default: the accelerator where there is one, else the CPU.")

    data = parser.add_argument_group("data (default: none, the model's own samples)", "As in train_continual.py.")
    data.add_argument("--dataset_name", help="Has the model's classes, by name: a Hub id, a folder, or digits.")
    data.add_argument("--dataset_config_name")
    data.add_argument("--train_data_dir", help="In its place, a folder of images with one sub-folder a class.")
    data.add_argument("--image_column")
    data.add_argument("--label_column")
    data.add_argument("--train_split", default=defaults.train_split)
    data.add_argument("--eval_split")
    data.add_argument("--resize_mode", choices=["pad", "resize"], default=defaults.resize_mode)

    kept = parser.add_argument_group("method", "With which a run goes on from the folder; it can set any other.")
    kept.add_argument("--penalty", choices=["none", "ewc", "rank1_ewc"], default="none")
    kept.add_argument(
        "--ewc_lambda",
        type=number_or_text,
        default=defaults.ewc_lambda,
        help="A positive number, auto, or a multiple such as 10xauto.",
    )
    kept.add_argument("--fisher_samples", type=positive_int, help="Draws for the Fisher; default: one an image.")
    kept.add_argument(
        "--replay",
        choices=["none", "generative_replay", "generative_distillation", "lwf", "memory"],
        default="generative_distillation",
    )
    kept.add_argument("--seed", type=int, default=0)
    kept.add_argument(
        "--feature_extractor",
        default=defaults.feature_extractor,
        help="What distances are measured with, for good: inception, a transformers image classifier (Hub id or folder), or"
        " classifier, a small one that is trained here, without data on the model's own samples.",
    )
    kept.add_argument("--feature_extractor_weights_path", help="Inception weights that are already on this machine.")
    # Not a run's default: the model has another author.
    kept.add_argument("--license", default="unknown", help="The model's, for the card (default: unknown).")
    kept.add_argument("--cache_dir", help="Where downloads and the small classifier are kept.")
    return parser.parse_args(argv)


def build_config(args: argparse.Namespace, source: Source) -> TrainingConfig:
    """Returns the configuration that the folder holds: the command line's, the model's, and defaults."""
    if args.num_inference_steps > NUM_TRAIN_TIMESTEPS:
        raise ConfigError(f"--num_inference_steps {args.num_inference_steps}: the model has {NUM_TRAIN_TIMESTEPS}")
    if is_flow(source.scheduler):
        model = {"objective": "flow_matching"}
    else:
        model = {"prediction_type": source.scheduler.config.prediction_type}
    config = TrainingConfig(
        **model,
        **{key: getattr(args, key) for key in CONFIG_OPTIONS},
        resolution=source.unet.config.sample_size,
        tasks=[list(source.class_ids)],
        eval_images_per_class=args.num_images_per_class,
        eval_num_inference_steps=args.num_inference_steps,
        eval_batch_size=args.batch_size,
        replay_num_inference_steps=args.num_inference_steps,
        replay_batch_size=args.batch_size,
    )
    # A run without data is no run.
    has_data = args.dataset_name is not None or args.train_data_dir is not None
    validate(config if has_data else replace(config, dataset_name="none"))
    return config


def run(args: argparse.Namespace) -> Path:
    """Returns the task folder that `args` asks for; raises as [`open_source`] and [`adopt`]."""
    source = open_source(args.model, args.revision, args.labels, args.cache_dir)
    config = build_config(args, source)
    device = choose_device(args.device)
    folder = adopt(source, config, args.output_dir, device)
    print(f"{folder}: {len(source.class_ids)} classes ({', '.join(list(source.class_ids)[:20])})")
    return folder


def main() -> None:
    """Runs the script; what the user can mend ends it with one line and the fault's exit code."""
    try:
        run(parse_args())
    except RunError as error:
        print(f"adopt.py: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
