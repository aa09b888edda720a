"""Files of a model repo on the Hub, all of one commit; what goes wrong is one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .errors import ConfigError, DataError, first_line


# Seconds without an answer after which the question for a commit is given up.
REQUEST_TIMEOUT = 30


@contextmanager
def hub_faults(where: str) -> Iterator[None]:
    """
    Turns what the client raises into an error of one sentence.

    Args:
        where (`str`): the option and the repo, for messages.

    Raises:
        ConfigError: when there is no such repo or revision for this user.
        DataError: when it cannot be fetched.
    """
    try:
        yield
    except RevisionNotFoundError as error:
        raise ConfigError(f"{where}: the repo has no such branch, tag or commit") from error
    except RepositoryNotFoundError as error:
        raise ConfigError(
            f"{where}: no such folder here and no such repo, or a private one that hub_token (or `hf auth login`) does"
            " not open"
        ) from error
    except HFValidationError as error:
        raise ConfigError(f"{where}: no such folder here, and no name of a repo") from error
    except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
        raise DataError(f"{where}: not in the cache, and the Hub cannot be reached: {first_line(error)}") from error
    except (HTTPError, OSError) as error:
        raise DataError(f"{where} cannot be fetched: {first_line(error)}") from error


def pinned(model: str, revision: str | None, token: str | None = None, cache_dir: str | None = None) -> dict:
    """
    Returns the arguments with which `hf_hub_download` and `snapshot_download` take a repo's files of one commit; offline,
    of whatever the cache has. Within [`hub_faults`].
    """
    # Asked first: a snapshot that cannot be asked for is taken from the cache, however old, without a word.
    offline = huggingface_hub.constants.HF_HUB_OFFLINE
    if not offline:
        revision = huggingface_hub.model_info(model, revision=revision, token=token, timeout=REQUEST_TIMEOUT).sha
    options = {"repo_id": model, "revision": revision, "local_files_only": offline}
    return {**options, "token": token, "cache_dir": cache_dir}


def fetch_files(
    where: str,
    model: str,
    revision: str | None,
    patterns: list[str],
    token: str | None = None,
    cache_dir: str | None = None,
) -> tuple[Path, str | None]:
    """
    Returns the folder with those files of a repo whose names fit, and the repo's commit (`None` offline).

    Args:
        where (`str`): the option and the repo, for messages.
        model (`str`): the repo.
        revision (`str`, *optional*): branch, tag or commit.
        patterns (list of `str`): with `*` for any text.
        token, cache_dir (`str`, *optional*): by default the client's.

    Raises:
        ConfigError, DataError: as [`hub_faults`].
    """
    with hub_faults(where):
        options = pinned(model, revision, token, cache_dir)
        folder = huggingface_hub.snapshot_download(allow_patterns=patterns, **options)
    return Path(folder), None if options["local_files_only"] else options["revision"]
