"""
Runs train_continual many times, a fork each, and kills it where it is told: torch is imported once.

A process of its own: `python tests/kill_server.py`. Each line of its input is a JSON object, each line of its output the
answer. See [`kill_harness.KillServer`], which talks to it.
"""

import contextlib
import gc
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path


sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import train_continual  # noqa: E402 (after the path)
from diffusers_cl.record import RunRecord  # noqa: E402
from diffusers_cl.signals import PR_SET_PDEATHSIG  # noqa: E402


def end(plan: dict) -> None:
    """Sends the plan's signal to this process, at once or after its `delay` in seconds."""

    def send() -> None:
        os.kill(os.getpid(), plan.get("signal", signal.SIGKILL))

    if delay := plan.get("delay", 0.0):
        timer = threading.Timer(delay, send)
        timer.daemon = True
        timer.start()
    else:
        send()


def watch(plan: dict, where: str) -> None:
    """
    Lets the plan happen in this process: at the n-th `save` (a file synced, a file or folder renamed), after the `rename`
    to a name, in a `phase` of a `task`, or so many `seconds` after the start. The file `where` has the phase that it is in.
    (`inject` is something else: the arguments of [`injections.inject`].)
    """
    Path(where).write_text("start")
    count = 0
    fsync, rename, replace, phase = os.fsync, os.rename, os.replace, RunRecord.phase

    def saved() -> None:
        nonlocal count
        count += 1
        if count == plan.get("save"):
            end(plan)

    def sync(descriptor):
        saved()
        fsync(descriptor)

    def renaming(move):
        def moved(source, target, **options):
            saved()
            move(source, target, **options)
            if Path(target).name == plan.get("rename"):
                end(plan)

        return moved

    @contextlib.contextmanager
    def entered(self, name):
        Path(where).write_text(name)
        if (name, self.task) == (plan.get("phase"), plan.get("task")):
            end(plan)
        with phase(self, name):
            yield
        Path(where).write_text("between")

    os.fsync, os.rename, os.replace, RunRecord.phase = sync, renaming(rename), renaming(replace), entered
    if "seconds" in plan:
        end({**plan, "delay": plan["seconds"]})


def child(request: dict, rank: int, port: int) -> None:
    """Runs the script in a new process, and ends it with the script's exit code."""
    import ctypes

    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    # A shell's background jobs ignore Ctrl-C, and pass that on.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(request.get("environment", {}))
    if request["processes"] > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        os.environ.update(WORLD_SIZE=str(request["processes"]), LOCAL_WORLD_SIZE=str(request["processes"]))
    if rank == request.get("rank", 0):
        watch(request["plan"], request["where"])
        if "inject" in request["plan"]:
            # Not at the top: it takes the script apart.
            from injections import inject

            inject(**request["plan"]["inject"])
    sys.argv = ["train_continual.py", *request["arguments"]]
    code = 1
    try:
        code = train_continual.run(request["arguments"])
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def serve(request: dict) -> dict:
    """Returns the exit status of every process of a run (negative: of a signal) and the seconds that it took."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    began, pids = time.monotonic(), []
    for rank in range(request["processes"]):
        if (pid := os.fork()) == 0:
            child(request, rank, port)
        pids.append(pid)
    statuses = {}
    while len(statuses) < len(pids):
        pid, status = os.waitpid(-1, 0)
        statuses[pid] = os.waitstatus_to_exitcode(status)
        # A machine that is taken away takes all of its processes.
        if statuses[pid] == -signal.SIGKILL:
            for other in set(pids) - statuses.keys():
                os.kill(other, signal.SIGKILL)
    return {"statuses": [statuses[pid] for pid in pids], "seconds": time.monotonic() - began}


if __name__ == "__main__":
    # What is imported is never collected again in a child.
    gc.freeze()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        print(json.dumps(serve(json.loads(line))), flush=True)
    # Nothing is to be put away, and some libraries say much about it.
    os._exit(0)
