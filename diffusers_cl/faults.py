"""What ended a run, as an exit code and a sentence for its user."""

import errno
import re

from .errors import NonFiniteError, ProcessLostError, RunError, StorageError
from .processes import as_lost_process, lost_processes
from .signals import Interrupted


NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
UNEXPECTED = 1


def _expected(error: BaseException, stopped: int | None) -> BaseException | None:
    """The fault as an error that has an exit code, `None` where it is a bug."""
    if isinstance(error, RunError | Interrupted):
        return error
    if isinstance(error, KeyboardInterrupt):
        return Interrupted(130)
    if isinstance(error, OSError) and error.errno in NO_ROOM:
        return StorageError(f"output_dir: cannot write {error.filename or ''}: {error.strerror}")
    if isinstance(error, FloatingPointError):
        return NonFiniteError(f"{error}; the last checkpoint is kept")
    lost = as_lost_process(error)
    return Interrupted(stopped) if lost is not None and stopped is not None else lost


def explain(error: BaseException, output_dir: str | None, stopped: int | None = None) -> tuple[int, str | None]:
    """
    Returns the exit code for an exception and what to say of it, `None` where only a traceback tells.

    Args:
        error: with notes of where it was, if that is known.
        output_dir (`str`, *optional*): the run's, where other processes have left word.
        stopped (`int`, *optional*): the exit code of a signal that was received.
    """
    expected = _expected(error, stopped)
    if expected is None:
        return UNEXPECTED, None
    notes = getattr(error, "__notes__", [])[:1]
    # A launcher that has lost one process ends the others with a signal.
    if output_dir is not None and isinstance(expected, ProcessLostError | Interrupted):
        notes = [*notes, *lost_processes(output_dir, hanging=isinstance(expected, ProcessLostError))]
    where = f" ({'; '.join(notes)})" if notes else ""
    if isinstance(expected, Interrupted):
        return expected.exit_code, f"interrupted{where}; the same command goes on from where it was"
    # The error of a data loader's worker arrives with its traceback for a message.
    name = re.escape(type(expected).__name__)
    message = re.split(rf"(?:^|\n)\S*\b{name}: ", str(expected).strip())[-1]
    return expected.exit_code, message + where
