"""
Files of a model from elsewhere, a folder or a repo on the Hub, all of one commit: which are taken, how large they may be, and
that none leads out of the folder. What goes wrong is one sentence.
"""

import re
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
from safetensors import SafetensorError, safe_open

from .endpoint import CLIENT_ERRORS, REQUEST_TIMEOUT, clean_token, client_timeout, retry
from .errors import CheckpointError, ConfigError, DataError, RunError, first_line
from .files import MAX_JSON_BYTES, allowed_places, read_json


# All that is taken of a pipeline: no code, and no weights that would be unpickled.
PIPELINE_FILES = re.compile(
    r"model_index\.json|(unet/config|scheduler/scheduler_config)\.json"
    r"|unet/diffusion_pytorch_model[\w.-]*\.safetensors(\.index\.json)?|adapters/(config\.json|diffusion_pytorch_model\.safetensors)"
)
# And of a transformers image classifier.
CLASSIFIER_FILES = re.compile(
    r"(config|preprocessor_config|processor_config)\.json|model[\w.-]*\.safetensors(\.index\.json)?"
)
# In bytes, of a file by how its name ends, and of any other.
SIZE_LIMITS = {".safetensors": 64 * 2**30, ".json": MAX_JSON_BYTES}
SIZE_LIMIT = 64 * 2**20
# Of the header of a safetensors file, in bytes: it is parsed whole, into memory of twenty times its size.
HEADER_LIMIT = 16 * 2**20


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


def check_size(path: str | Path, size: int | None) -> None:
    """Raises `CheckpointError` for a file that is larger than any that a model has; by its name, before it is opened."""
    limit = SIZE_LIMITS.get(Path(path).suffix, SIZE_LIMIT)
    if size is not None and size > limit:
        raise CheckpointError(f"{path} has {size:,} bytes; allowed: at most {limit:,}")


def pinned(
    model: str,
    revision: str | None,
    allowed: re.Pattern,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[dict, str | None, list[str]]:
    """
    Returns the arguments with which `hf_hub_download` and `snapshot_download` take a repo's files of one commit; that
    commit, `None` offline, where the files are those that the cache has; and the names of the allowed ones that the repo
    has, none offline. Within [`hub_faults`].

    Raises:
        CheckpointError: when an allowed file is too large: nothing was fetched.
    """
    token = clean_token(token)
    # Asked first: a snapshot that cannot be asked for is taken from the cache, however old, without a word.
    offline, commit, names = constants.HF_HUB_OFFLINE, None, []
    if not offline:
        with client_timeout(REQUEST_TIMEOUT):
            asked = {"revision": revision, "token": token, "files_metadata": True}
            info = retry(lambda: huggingface_hub.model_info(model, **asked), model)
        commit = info.sha
        for file in info.siblings or []:
            if allowed.fullmatch(file.rfilename):
                check_size(f"{model}/{file.rfilename}", file.size)
                names.append(file.rfilename)
    options = {"repo_id": model, "revision": commit or revision, "local_files_only": offline}
    return {**options, "token": token, "cache_dir": cache_dir}, commit, names


def _check_safetensors(path: Path) -> None:
    """Reads the header alone, whose parser checks names, sizes and places of the tensors."""
    try:
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > HEADER_LIMIT:
            raise ValueError(f"its header has {length:,} bytes; allowed: at most {HEADER_LIMIT:,}")
        with safe_open(path, framework="pt"):
            pass
    except (OSError, ValueError, SafetensorError) as error:
        raise CheckpointError(f"{path} is damaged, or no safetensors file: {first_line(error)}") from error


def check_files(folder: Path, allowed: re.Pattern) -> None:
    """
    Checks the files of a model that may be read or copied, before any of them is: each is a file, in this folder, of a size
    that a model has; JSON is JSON, the headers of safetensors are in order, and an index names files beside it.

    Args:
        folder (`Path`): the model's; in the Hub's cache or not.
        allowed (`re.Pattern`): matches the names of these files.

    Raises:
        CheckpointError: naming the file.
    """
    places = allowed_places(folder)
    for path in sorted([*folder.glob("*"), *folder.glob("*/*")]):
        if not allowed.fullmatch(path.relative_to(folder).as_posix()):
            continue
        if not any(path.resolve().is_relative_to(place) for place in places):
            raise CheckpointError(f"{path} is a link to {path.resolve()}, out of the folder")
        if not path.is_file():
            raise CheckpointError(f"{path} is no file")
        check_size(path, path.stat().st_size)
        if path.suffix == ".json":
            content = read_json(path)
        if path.name.endswith(".safetensors.index.json"):
            shards = content.get("weight_map")
            shards = list(shards.values()) if isinstance(shards, dict) else [shards]
            if strange := [name for name in shards if not re.fullmatch(r"[\w.-]+\.safetensors", str(name))]:
                raise CheckpointError(f"{path} names {strange[0]!r}; allowed: safetensors files beside it")
        if path.suffix == ".safetensors":
            _check_safetensors(path)


def model_folder(
    model: str | Path,
    revision: str | None,
    allowed: re.Pattern,
    token: str | None = None,
    cache_dir: str | Path | None = None,
) -> tuple[Path, str | None]:
    """
    Returns the folder of a model, whose allowed files are checked ([`check_files`]), and the commit of a repo (`None`
    offline, and for a folder).

    Args:
        model (`str`): the folder, or a repo, of which the allowed files are fetched.
        revision (`str`, *optional*): the repo's branch, tag or commit.
        allowed (`re.Pattern`): matches the names of the files to take.
        token, cache_dir (`str`, *optional*): by default the client's.

    Raises:
        ConfigError, DataError: as [`hub_faults`].
        CheckpointError: as [`check_files`].
    """
    folder, commit = Path(model), None
    if not folder.is_dir():
        with hub_faults(f"{model} at revision {revision}" if revision else str(model)):
            options, commit, names = pinned(str(model), revision, allowed, token, cache_dir)
            if names:
                # By the name that was asked for, which the cache then knows the commit of, offline too.
                huggingface_hub.hf_hub_download(filename=names[0], **options | {"revision": revision})
            folder = Path(huggingface_hub.snapshot_download(allow_patterns=names, **options))
    check_files(folder, allowed)
    return folder, commit
