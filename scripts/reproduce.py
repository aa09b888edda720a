"""
Runs methods of one preset on several seeds, and writes results, tables and pictures.

    python scripts/reproduce.py --preset digits --methods finetune distillation joint --seeds 0 1 2
    python scripts/reproduce.py --preset cifar10 --methods distillation --seeds 0 --scale 0.1 --data ../cifar10 -- --allow_tf32

Every run is a process of `train_continual.py` with a folder and a log file in `--runs_dir`. What is done already is
skipped, and the same command goes on after Ctrl-C or a crash. Run it in the root of the checkout. `results/<preset>` gets
`<method>-seed<k>.json`, `table.md` and `table.tex`, the runs' folder `curves.png` and `one_class.png`. Keys after `--` go
to every run; as a run with other keys replaces the file of its method and seed, give them another `--results_dir`.
"""

import argparse
import ctypes
import dataclasses
import os
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import yaml

from diffusers_cl.arguments import parse_config
from diffusers_cl.comparison import compare, plot_averages, plot_first_class
from diffusers_cl.config import OPERATIONAL_KEYS, TrainingConfig
from diffusers_cl.errors import RunError
from diffusers_cl.files import write_json, write_text
from diffusers_cl.plots import format_number
from diffusers_cl.processes import num_cores
from diffusers_cl.report import headline_metric, read_json
from diffusers_cl.results import (
    DATA_KEYS,
    ROOT,
    is_result_of,
    join_result,
    load_run,
    portable_name,
    same_versions,
)
from diffusers_cl.scale import data_sizes, scaled_arguments
from diffusers_cl.tables import render_latex, render_markdown


TRAINER = ROOT / "train_continual.py"
# What is a job's own, or would start every job over.
RESERVED_KEYS = ("seed", "output_dir", "overwrite_output_dir", "resume_from_checkpoint")
# What Ctrl-C leaves to the runs to end by themselves.
SECONDS_TO_STOP = 60
PR_SET_PDEATHSIG = 1


@dataclass
class Job:
    """One run: its name, its command line without the output folder, the configuration that this gives, its files."""

    name: str
    arguments: list[str]
    config: TrainingConfig
    result: Path
    runs_dir: Path

    @property
    def log(self) -> Path:
        return self.runs_dir / f"{self.name}.log"

    def folder(self) -> tuple[Path, list[str]]:
        """The first folder that is new or holds this run, and what to add for going on there."""
        wanted = {k: v for k, v in dataclasses.asdict(self.config).items() if k not in OPERATIONAL_KEYS}
        for number in count(1):
            folder = self.runs_dir / (self.name if number == 1 else f"{self.name}-{number}")
            if not folder.exists() or not any(folder.iterdir()):
                return folder, []
            try:
                found = dataclasses.asdict(TrainingConfig()) | yaml.safe_load((folder / "config.yaml").read_text())
                versions_differ = (folder / "run.json").exists() and not same_versions(read_json(folder / "run.json"))
            except OSError:
                continue
            # Exact only with as many threads as before; --jobs may have changed since.
            threads = {"num_threads": found["num_threads"]}
            if not versions_differ and all(found.get(k) == v for k, v in {**wanted, **threads}.items()):
                same = found["num_threads"] == self.config.num_threads
                return folder, [] if same else ["--num_threads", str(found["num_threads"])]

    def made_by(self) -> str:
        """The command, without this machine's paths."""
        return shlex.join(
            ["accelerate", "launch", "train_continual.py", *(portable_name(part) for part in self.arguments)]
        )


def method_file(method: str) -> Path:
    """Returns the YAML file of a method: a path, or a name in configs/methods/."""
    path = Path(method) if method.endswith(".yaml") else ROOT / "configs" / "methods" / f"{method}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in (ROOT / "configs" / "methods").glob("*.yaml")))
        raise ValueError(f"--methods {method}: there is no {path}; known: {known}; or give a YAML file")
    return path.resolve()


def plan(args: argparse.Namespace, extra: list[str]) -> list[Job]:
    """Returns all runs, in the order in which they start: a seed of every method, then the next seed."""
    for key in RESERVED_KEYS:
        if f"--{key}" in extra:
            raise ValueError(f"--{key} after -- is not for every run")
    if args.jobs < 1 or args.scale is not None and not 0 < args.scale < 1:
        raise ValueError(f"--jobs is {args.jobs}, --scale is {args.scale}; allowed: 1 or more, and between 0 and 1")
    preset = ROOT / "configs" / f"{args.preset}.yaml"
    if not preset.is_file():
        known = ", ".join(sorted(file.stem for file in (ROOT / "configs").glob("*.yaml")))
        raise ValueError(f"--preset {args.preset}: there is no {preset}; known: {known}")
    overlays = [preset, *(path.resolve() for path in args.config)]
    files = {path.stem: path for path in map(method_file, args.methods)}
    if len(files) != len(args.methods):
        raise ValueError(f"--methods {' '.join(args.methods)}: two have the same name")
    base, sizes, jobs = {}, {}, []
    for method, file in files.items():
        arguments = [part for path in (*overlays, file) for part in ("--config", str(path))]
        if args.data is not None:
            is_folder = Path(args.data).is_dir()
            arguments += ["--dataset_name", str(Path(args.data).resolve()) if is_folder else args.data]
        config = parse_config([*arguments, *extra])
        if args.scale is not None:
            data = tuple(getattr(config, key) for key in DATA_KEYS)
            sizes[data] = sizes.get(data) or data_sizes(config)
            arguments += scaled_arguments(config, args.scale, sizes[data], args.runs_dir)
        if args.jobs > 1 and config.num_threads is None:
            arguments += ["--num_threads", str(max(1, num_cores() // args.jobs))]
        base[method] = [*arguments, "--report_to", "none"]
    for order in [None] if args.class_orders is None else range(args.class_orders):
        for seed in dict.fromkeys(args.seeds):
            for method, arguments in base.items():
                arguments = [*arguments, "--seed", str(seed)]
                if order is not None:
                    arguments += ["--class_order", str(order)]
                arguments += extra
                name = f"{method}-seed{seed}" if order is None else f"{method}-order{order}-seed{seed}"
                result = args.results_dir / f"{name}.json"
                jobs.append(Job(name, arguments, parse_config(arguments), result, args.runs_dir))
    return jobs


def child_setup() -> None:
    """In a new run: Ctrl-C interrupts it, from background jobs too, and so does the end of this process."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGINT)


def start(job: Job, folder: Path) -> subprocess.Popen:
    """Starts a run. In its own session: Ctrl-C reaches it once, from here."""
    command = [sys.executable, str(TRAINER), *job.arguments, "--output_dir", str(folder)]
    with job.log.open("a") as log:
        log.write(f"$ {shlex.join(command)}\n")
        log.flush()
        options = {"stdout": log, "stderr": subprocess.STDOUT, "cwd": ROOT, "start_new_session": True}
        # A progress bar in a log file, not on a screen.
        options["env"] = {"TQDM_MININTERVAL": "30", **os.environ}
        return subprocess.Popen(command, preexec_fn=child_setup, **options)


def summary(job: Job) -> str:
    run = load_run(job.result)
    values, minutes = run.metrics["metrics"][headline_metric(run.metrics)], run.machine["seconds"]["total"] / 60
    average, forgetting = values["average"][-1], format_number(values["forgetting"], True, values["average"][-1])
    return f"average {format_number(average)}, forgetting {forgetting}, {minutes:.1f} minutes"


def finish(job: Job, exit_code: int, folder: Path, scale: float | None) -> str | None:
    """Writes the results file of a run that ended; returns what went wrong, if it did."""
    if exit_code != 0:
        lines = job.log.read_text(errors="replace").rpartition("\n$ ")[2].splitlines()
        errors = [line.strip() for line in lines if "error: " in line.lower()]
        return f"exit code {exit_code}{': ' + errors[-1] if errors else ''}"
    try:
        result = join_result(load_run(folder), job.made_by(), scale)
    except ValueError as error:
        return str(error)
    write_json(job.result, result)
    return None


def write_tables(jobs: list[Job], args: argparse.Namespace) -> None:
    """Writes the table of all results in the folder, in Markdown and LaTeX, and the pictures beside the runs."""
    runs = [load_run(path) for path in sorted(args.results_dir.glob("*-seed*.json"))]
    if not runs:
        return
    try:
        table = compare(runs, published=read_json(ROOT / "results" / "published.json"))
    except ValueError as error:
        print(f"warning: no table in {args.results_dir}: {error}", file=sys.stderr, flush=True)
        return
    write_text(args.results_dir / "table.md", render_markdown(table, per_task=True))
    write_text(args.results_dir / "table.tex", render_latex(table))
    plot_averages(args.runs_dir / "curves.png", table)
    grids = {job.result: sorted((job.folder()[0] / "samples").glob("task-*.png")) for job in jobs}
    plot_first_class(args.runs_dir / "one_class.png", table, grids)


def stop(processes: list[subprocess.Popen]) -> None:
    """Interrupts runs and waits until they have ended; a second Ctrl-C, or too long a time, kills them."""
    for process in processes:
        process.send_signal(signal.SIGINT)
    try:
        deadline = time.monotonic() + SECONDS_TO_STOP
        for process in processes:
            process.wait(max(0.0, deadline - time.monotonic()))
    except (KeyboardInterrupt, subprocess.TimeoutExpired):
        for process in processes:
            process.kill()
            process.wait()


def run_all(jobs: list[Job], args: argparse.Namespace) -> dict[str, str]:
    """Runs what is not done, `--jobs` at a time, with a line for each; returns what failed, by name, and why."""
    waiting, running, failed, num_ended = [], {}, {}, 0

    def report(word: str, job: Job, text: str) -> None:
        nonlocal num_ended
        num_ended += 1
        print(f"[{num_ended}/{len(jobs)}] {word} {job.name}: {text}", flush=True)

    for job in jobs:
        if job.result.exists() and is_result_of(load_run(job.result), job.config):
            report("skipped", job, summary(job))
        else:
            waiting.append(job)
    args.runs_dir.mkdir(parents=True, exist_ok=True)
    try:
        while waiting or running:
            while waiting and len(running) < args.jobs:
                job = waiting.pop(0)
                folder, more = job.folder()
                job.arguments += more
                running[start(job, folder)] = job, folder
            ended = [process for process in running if process.poll() is not None]
            for process in ended:
                job, folder = running.pop(process)
                fault = finish(job, process.returncode, folder, args.scale)
                if fault is None:
                    report("done", job, summary(job))
                else:
                    failed[job.name] = f"{fault}; see {job.log}"
                    report("failed", job, failed[job.name])
            if ended and (waiting or running):
                write_tables(jobs, args)
            time.sleep(0.2)
    finally:
        stop(list(running))
    return failed


def interrupt(*_) -> None:
    raise KeyboardInterrupt


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    argv, extra = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    extra = [part for text in extra for part in (text.split("=", 1) if text.startswith("--") else [text])]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", required=True, help="a name in configs/, such as digits")
    parser.add_argument("--methods", required=True, nargs="+", help="names in configs/methods/, or YAML files")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--class_orders", type=int, help="run every seed with so many shuffled orders of the classes")
    parser.add_argument("--scale", type=float, help="shrink epochs, images and network by this factor below 1")
    parser.add_argument("--data", help="dataset_name: a dataset on the Hub or a folder")
    parser.add_argument("--config", nargs="+", type=Path, default=[], help="YAML files between preset and method")
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--runs_dir", type=Path, default=Path("runs/reproduce"), help="the runs' folders, by preset")
    parser.add_argument("--results_dir", type=Path, help="results and tables; default results/<preset>")
    args = parser.parse_args(argv)
    name = args.preset if args.scale is None else f"{args.preset}-scale{args.scale:g}"
    args.results_dir = (args.results_dir or ROOT / "results" / name).resolve()
    args.runs_dir = args.runs_dir.resolve() / name
    try:
        jobs = plan(args, extra)
        failed = run_all(jobs, args)
    except (ValueError, OSError, RunError) as error:
        print(f"reproduce.py: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("reproduce.py: interrupted; the same command goes on", file=sys.stderr)
        return 130
    write_tables(jobs, args)
    print(f"Table: {args.results_dir / 'table.md'}; runs and pictures: {args.runs_dir}")
    for name, fault in failed.items():
        print(f"failed: {name}: {fault}", file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, interrupt)
    sys.exit(main())
