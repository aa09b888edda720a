"""Files of a model repo on the Hub, all of one commit; what goes wrong is one sentence."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import huggingface_hub
from huggingface_hub import constants
from huggingface_hub.errors import (
    HFValidationError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from .endpoint import CLIENT_ERRORS, REQUEST_TIMEOUT, clean_token, client_timeout, retry
from .errors import ConfigError, DataError, RunError, first_line


@contextmanager
def hub_faults(where: str) -> Iterator[None]:
    """
    Turns what the client raises into an error of one sentence.

    Args:
        where (`str`): the repo and revision, for messages.

    Raises:
        ConfigError: when there is no such repo or revision for this user.
        DataError: when it cannot be fetched.
    """
    try:
        yield
    except RunError:
        raise
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
    except CLIENT_ERRORS as error:
        raise DataError(f"{where} cannot be fetched: {first_line(error)}") from error


def pinned(
    model: str, revision: str | None, token: str | None = None, cache_dir: str | Path | None = None
) -> tuple[dict, str | None]:
    """
    Returns the arguments with which `hf_hub_download` and `snapshot_download` take a repo's files of one commit, and that
    commit: `None` offline, where they are those that the cache has. Within [`hub_faults`].
    """
    token = clean_token(token)
    # Asked first: a snapshot that cannot be asked for is taken from the cache, however old, without a word.
    offline, commit = constants.HF_HUB_OFFLINE, None
    if not offline:
        with client_timeout(REQUEST_TIMEOUT):
            commit = retry(lambda: huggingface_hub.model_info(model, revision=revision, token=token), model).sha
    options = {"repo_id": model, "revision": commit or revision, "local_files_only": offline}
    return {**options, "token": token, "cache_dir": cache_dir}, commit


def fetch_files(
    model: str,
    revision: str | None,
    patterns: list[str],
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[Path, str | None]:
    """
    Returns the folder with those files of a repo whose names fit, and the repo's commit (`None` offline).

    Args:
        model (`str`): the repo.
        revision (`str`, *optional*): branch, tag or commit.
        patterns (list of `str`): names of files, with `*` for any text.
        token, cache_dir (`str`, *optional*): by default the client's.

    Raises:
        ConfigError, DataError: as [`hub_faults`].
    """
    with hub_faults(f"{model} at revision {revision}" if revision else model):
        options, commit = pinned(model, revision, token, cache_dir)
        return Path(huggingface_hub.snapshot_download(allow_patterns=patterns, **options)), commit
