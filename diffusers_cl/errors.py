"""What can go wrong in a run that its user can mend, each with the exit code of the training process."""


class RunError(Exception):
    """A fault with a message for the user: it is printed without a traceback and ends the process with `exit_code`."""

    exit_code = 1


class ProcessLostError(RunError):
    """Another process of the run has ended or does not answer."""


def first_line(error: Exception) -> str:
    """Returns the part of an error's message that fits on one line, or the error's name if it has no message."""
    return str(error).partition("\n")[0] or type(error).__name__


class ConfigError(RunError, ValueError):
    """The configuration or the output folder alone shows the fault."""

    exit_code = 2


class DataError(RunError, ValueError):
    """The data, or something else that has to be fetched, shows the fault."""

    exit_code = 3


class CheckpointError(RunError):
    """A checkpoint or task folder is missing, damaged or does not fit the run."""

    exit_code = 4


class NonFiniteError(RunError):
    """A loss, gradient, weight, Fisher quantity or generated image is not finite."""

    exit_code = 5


class StorageError(RunError):
    """Files could not be written."""

    exit_code = 6


class FolderInUseError(RunError):
    """Another run is at work in the output folder."""

    exit_code = 7


class PushPendingError(RunError):
    """All is done but the push of some task folders: they stay, and scripts/push.py pushes them later."""

    exit_code = 8
