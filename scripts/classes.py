"""
Lists the classes of an adapted model (FunLoRA), takes single ones out or in, and publishes one alone.

    python scripts/classes.py --model runs/funlora/task-04
    python scripts/classes.py --model runs/funlora/task-04 --push 7 --repo_id me/digit-7
    python scripts/classes.py --model runs/funlora/task-01 --add me/digit-7 --output_dir model-with-7
    python scripts/classes.py --model runs/funlora/task-04 --remove 7 --output_dir model-without-7

`--add` takes the file of a class (`FunLoRA.save_class`), the repo of one, or with `--class_label` a model that has it. What lands in
`--output_dir` is a model to sample from; the stream that it was learned in goes on from its task folders.
"""

import argparse
import sys
from pathlib import Path

from diffusers_cl.adapters import add_class, remove_class
from diffusers_cl.class_files import fetch_class, push_class
from diffusers_cl.errors import ConfigError, RunError
from diffusers_cl.sampling import load_pipeline, typed_label


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="a task folder of a run, a model's folder, or a Hub repo")
    parser.add_argument("--revision", help="branch, tag or commit of that repo")
    action = parser.add_mutually_exclusive_group()
    action.add_argument("--add", metavar="FILE_OR_REPO", help="take a class in")
    action.add_argument("--remove", metavar="CLASS", help="take a class out, by name or id")
    action.add_argument("--push", metavar="CLASS", help="publish a class in a repo of its own (--repo_id)")
    parser.add_argument("--class_label", help="with --add: the name of a class of that model")
    parser.add_argument("--name", help="with --add: what the class is called here")
    parser.add_argument(
        "--repo_id", help="with --push: namespace/name; the token is that of `hf auth login`, or HF_TOKEN"
    )
    parser.add_argument("--output_dir", type=Path, help="with --add and --remove: gets the model")
    args = parser.parse_args(argv)
    try:
        changes = args.add or args.remove
        if bool(changes) != (args.output_dir is not None) or bool(args.push) != (args.repo_id is not None):
            raise ConfigError("--output_dir belongs to --add and --remove, --repo_id to --push")
        is_file = args.add is not None and Path(args.add).is_file()
        if (args.class_label or args.name) and not args.add or args.class_label and is_file:
            raise ConfigError("--name belongs to --add, and --class_label to --add with a model")
        if args.output_dir is not None and args.output_dir.exists() and any(args.output_dir.iterdir()):
            raise ConfigError(f"--output_dir {args.output_dir} is not empty")
        pipeline = load_pipeline(args.model, revision=args.revision)
        names = list(pipeline.known_classes.values())
        if args.push:
            (class_id,) = pipeline.get_label_ids(typed_label(args.push, names))
            pushed = push_class(fetch_class(args.model, class_id, args.revision), args.repo_id)
            print(f"{pushed['url']} has the class {args.push} (commit {pushed['commit'][:12]})")
            return
        if args.add:
            class_id = add_class(pipeline, args.add if is_file else fetch_class(args.add, args.class_label), args.name)
            print(f"added {pipeline.known_classes[class_id]!r} as {class_id}")
        if args.remove:
            remove_class(pipeline, typed_label(args.remove, names))
        if changes:
            pipeline.save_pretrained(args.output_dir)
        own = [] if pipeline.adapters is None else pipeline.adapters.class_ids
        for class_id, name in pipeline.known_classes.items():
            print(f"{class_id}: {name!r}, {'its own parameters' if class_id in own else 'in the network'}")
    except (RunError, ValueError) as error:
        print(f"classes.py: error: {error}", file=sys.stderr)
        sys.exit(getattr(error, "exit_code", 2))


if __name__ == "__main__":
    main()
