"""
Samples a trained model: one PNG an image and a grid with one row a class.

    python scripts/sample.py --model runs/digits/task-04 --classes 3 7 --num_images 10 --output_dir samples

An image is a function of the model, the seed, its class and its index: with the run's seed, the first ones are those of
its evaluation. Another `--batch_size` or another choice of classes changes it by float rounding at most.
"""

import argparse
import re
import sys
from pathlib import Path

from diffusers_cl.errors import ConfigError, RunError
from diffusers_cl.folders import tasks_of_run
from diffusers_cl.sampling import choose_device, image_grid, load_pipeline, sample_images, to_pil, typed_label


def positive_int(text: str) -> int:
    """Returns a command line value that must be 1 or more."""
    value = int(text)
    if value < 1:
        raise ValueError
    return value


def parse_args(argv: list[str] | None = None) -> argparse.Namespace:
    """Returns the options, from the command line by default."""
    parser = argparse.ArgumentParser(description="Samples images of given classes from a trained model.")
    parser.add_argument("--model", required=True, help="A task folder of a run (`runs/digits/task-04`) or a Hub repo.")
    parser.add_argument("--revision", default=None, help="Branch, tag or commit of that repo.")
    parser.add_argument(
        "--classes",
        nargs="+",
        default=None,
        help="Names or ids; a number that is also a name is taken as the name. Default: every class the model knows.",
    )
    parser.add_argument("--num_images", type=positive_int, default=10, help="Images a class.")
    parser.add_argument("--output_dir", type=Path, default=Path("samples"), help="Gets grid.png and the images.")
    parser.add_argument("--num_inference_steps", type=positive_int, default=50, help="Denoising steps.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch_size", type=positive_int, default=64, help="Images in one forward pass.")
    parser.add_argument("--device", default=None, help="Default: the accelerator where there is one, else the CPU.")
    return parser.parse_args(argv)


def file_name(class_name: str, index: int) -> str:
    """Returns the name of an image's file; what cannot stand in one is written as %XX."""
    return re.sub(r'[%/\\:*?"<>|\x00-\x1f]', lambda match: f"%{ord(match[0]):02X}", f"{class_name}-{index:03d}.png")


def sample(args: argparse.Namespace) -> Path:
    """
    Samples and saves what `args` asks for.

    Returns:
        `Path`: the grid's file.

    Raises:
        CheckpointError: for a model that cannot be loaded.
        ConfigError: for classes that the model does not know (with those that it does), more steps than it was trained
            with, and a device that is not there.
    """
    if tasks := tasks_of_run(args.model):
        raise ConfigError(
            f"--model {args.model} is the folder of a run, pass one of its tasks: {', '.join(map(str, tasks))}"
        )
    pipeline = load_pipeline(args.model, choose_device(args.device), f"--model {args.model}", args.revision)
    known = pipeline.known_classes
    names = list(known.values())
    labels = [typed_label(text, names) for text in args.classes or names]
    try:
        class_ids = list(dict.fromkeys(pipeline.get_label_ids(labels)))
    except ValueError as error:
        raise ConfigError(f"--classes: {error}") from error
    num_train_timesteps = pipeline.scheduler.config.num_train_timesteps
    if args.num_inference_steps > num_train_timesteps:
        raise ConfigError(f"--num_inference_steps {args.num_inference_steps}: the model has {num_train_timesteps}")

    args.output_dir.mkdir(parents=True, exist_ok=True)
    rows = [(class_id, index) for class_id in class_ids for index in range(args.num_images)]
    images = sample_images(
        pipeline,
        [class_id for class_id, _ in rows],
        [("eval", known[class_id], index) for class_id, index in rows],
        args.seed,
        num_inference_steps=args.num_inference_steps,
        batch_size=args.batch_size,
    )
    for (class_id, index), picture in zip(rows, to_pil(images), strict=True):
        picture.save(args.output_dir / file_name(known[class_id], index))
    grid_file = args.output_dir / "grid.png"
    image_grid(images, args.num_images).save(grid_file)
    print(f"{grid_file}: rows are " + ", ".join(known[class_id] for class_id in class_ids))
    return grid_file


def main() -> None:
    """Runs the script; what the user can mend ends it with one line and the fault's exit code."""
    try:
        sample(parse_args())
    except RunError as error:
        print(f"sample.py: error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
