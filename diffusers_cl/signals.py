"""Signals that end a run: the first lets the step be finished and saved, a second ends the process at once."""

import contextlib
import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator


# By the name of what was sent; SIGUSR1 is what clusters send before they take a machine away.
EXIT_CODES = {signal.SIGTERM: 143, signal.SIGINT: 130, signal.SIGHUP: 129, signal.SIGUSR1: 143}
# In seconds: what a launcher passes on of one signal or Ctrl-C, which the process may have got itself, arrives within this.
PASSED_ON_WITHIN = 2.0
PR_SET_PDEATHSIG = 1


class Interrupted(KeyboardInterrupt):
    """A signal ends the run; `exit_code` is 143, 130 or 129."""

    def __init__(self, exit_code: int):
        super().__init__(f"interrupted by a signal (exit code {exit_code})")
        self.exit_code = exit_code


def launched() -> bool:
    """Returns whether `accelerate launch` or `torchrun` has started this process."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def end_with_the_launcher() -> None:
    """
    Lets a launcher's death send SIGTERM to this process (Linux): else `accelerate launch`, which passes nothing on, leaves
    an orphan behind. Nothing is done where a person's shell has started it, which may be closed.
    """
    if launched() and sys.platform == "linux":
        parent = os.getppid()
        ctypes.CDLL(None, use_errno=True).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        # It may have died before this.
        if os.getppid() != parent:
            os.kill(os.getpid(), signal.SIGTERM)


class StopSignals:
    """
    Turns SIGTERM, SIGINT, SIGHUP and SIGUSR1 into [`Interrupted`] for the length of a `with` block: at once, but within
    [`deferred`] only when that ends or [`check`] is called. A second signal ends the process where it stands, which loses
    what is not saved. A signal that was ignored before (`nohup`) stays ignored.

    Attributes:
        received (`int` or `None`): the exit code of the first signal.
    """

    def __init__(self):
        self.received: int | None = None
        self._time = 0.0
        self._deferred = False
        self._pid, self._parent = os.getpid(), os.getppid()
        self._before: dict[int, object] = {}

    def __enter__(self) -> "StopSignals":
        # Elsewhere, Python takes no handlers.
        if threading.current_thread() is threading.main_thread():
            for number in EXIT_CODES:
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame) -> None:
        # A data loader's worker has inherited this; its trainer tells it when to end.
        if os.getpid() != self._pid:
            return
        if self.received is None:
            self.received, self._time = EXIT_CODES[signal.Signals(number)], time.monotonic()
            if not self._deferred:
                raise Interrupted(self.received)
            message = f"{signal.Signals(number).name}: the step is finished and saved; a second signal ends at once\n"
            os.write(2, message.encode())
        elif not self._is_passed_on():
            os._exit(self.received)

    def _is_passed_on(self) -> bool:
        """Whether a signal after the first is the launcher's, for the same reason, or the launcher's end."""
        if not launched():
            return False
        if os.getppid() != self._parent:
            self._parent = os.getppid()
            return True
        return time.monotonic() - self._time < PASSED_ON_WITHIN

    def ignore(self) -> None:
        """Lets nothing more disturb the process, which is about to end; the end of the `with` block takes it back."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def check(self) -> None:
        """Raises [`Interrupted`] if a signal was received."""
        if self.received is not None:
            raise Interrupted(self.received)

    @contextlib.contextmanager
    def deferred(self) -> Iterator[None]:
        """Within this block a first signal is only noted; it is raised when the block ends."""
        self._deferred = True
        try:
            yield
        finally:
            self._deferred = False
        self.check()
