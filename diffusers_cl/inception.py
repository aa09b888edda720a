"""The weights of the Inception network, a file in the format of `torch.save`: the one that is published, and no code."""

import contextlib
import os
import urllib.parse
from collections.abc import Iterator
from pathlib import Path

import torch

from .files import file_sha256


# Of the file that torch-fidelity publishes; the file's name has the first eight digits.
INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
# What `torch.load` goes by, whatever it is told.
FORCE_KEY = "TORCH_FORCE_WEIGHTS_ONLY_LOAD"


def published_weights() -> Path:
    """
    Returns the published file where torch.hub keeps it, fetched if it is not there. torch-fidelity itself checks none.

    Raises:
        OSError: when it cannot be fetched.
        RuntimeError, ValueError: when what was fetched, or what is there, has another sha256.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    file = Path(torch.hub.get_dir()) / "checkpoints" / Path(urllib.parse.urlsplit(URL_INCEPTION_V3).path).name
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(file), hash_prefix=INCEPTION_SHA256, progress=False)
    elif (found := file_sha256(file)) != INCEPTION_SHA256:
        raise ValueError(f"{file} has sha256 {found}, the published file {INCEPTION_SHA256}: delete it")
    return file


@contextlib.contextmanager
def tensors_alone() -> Iterator[None]:
    """Lets `torch.load` read tensors and nothing else, in the `with` block: torch-fidelity lets it unpickle."""
    before = os.environ.get(FORCE_KEY)
    os.environ[FORCE_KEY] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[FORCE_KEY]
        else:
            os.environ[FORCE_KEY] = before
