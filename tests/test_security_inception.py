"""The Inception weights: only the file that is published, and only the tensors in it."""

import os
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from hostile_helpers import CPU, pickled
from torch_fidelity import feature_extractor_inceptionv3 as fidelity

from diffusers_cl import inception
from diffusers_cl.config import TrainingConfig
from diffusers_cl.errors import DataError
from diffusers_cl.features import resolve_feature_extractor
from diffusers_cl.files import file_sha256


NAME = "weights-inception-2015-12-05-6726825d.pth"


class Handler(SimpleHTTPRequestHandler):
    def log_message(self, *_) -> None:
        """The tests ask which files are there."""


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A folder with weights of the real network, random ones, and the URL at which it is served."""
    folder = tmp_path_factory.mktemp("served")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fidelity, "load_state_dict_from_url", lambda *args, **kwargs: {})
        patch.setattr(fidelity.FeatureExtractorInceptionV3, "load_state_dict", lambda *args, **kwargs: None)
        network = fidelity.FeatureExtractorInceptionV3("inception-v3-compat", ["2048"])
    torch.save(network.state_dict(), folder / NAME)
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(folder))) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
        thread.start()
        yield folder, f"http://127.0.0.1:{server.server_address[1]}/{NAME}"
        server.shutdown()
        thread.join()


@pytest.fixture
def hub(served, tmp_path, monkeypatch) -> Path:
    """What torch.hub keeps: nothing yet. The published file is the one that is served."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(fidelity, "URL_INCEPTION_V3", served[1])
    monkeypatch.setattr(inception, "INCEPTION_SHA256", file_sha256(served[0] / NAME))
    return tmp_path / "torch" / "hub" / "checkpoints"


def resolve(weights: Path | None = None):
    config = TrainingConfig(feature_extractor_weights_path=weights and str(weights))
    return resolve_feature_extractor(config, None, [], CPU)


def test_the_published_name_has_the_first_digits():
    # Were torch-fidelity to publish another file, this fails before a user's run does.
    assert fidelity.URL_INCEPTION_V3.endswith(f"/{NAME}")
    assert inception.INCEPTION_SHA256.startswith(NAME.removesuffix(".pth").rpartition("-")[2])


def test_it_is_fetched_once_and_checked_every_time(hub, served, monkeypatch):
    features = resolve()(torch.zeros(1, 3, 8, 8, dtype=torch.uint8))[0]
    assert features.shape == (1, 2048) and [file.name for file in hub.iterdir()] == [NAME]
    assert file_sha256(hub / NAME) == file_sha256(served[0] / NAME)
    # Now from there.
    monkeypatch.setattr(fidelity, "URL_INCEPTION_V3", f"http://127.0.0.1:9/{NAME}")
    assert inception.published_weights() == hub / NAME
    # One bit of a weight.
    content = bytearray((hub / NAME).read_bytes())
    content[len(content) // 2] ^= 1
    (hub / NAME).write_bytes(content)
    found = file_sha256(hub / NAME)
    with pytest.raises(
        DataError, match=f"has sha256 {found}, the published file {inception.INCEPTION_SHA256}: delete"
    ):
        resolve()


def test_what_is_fetched_and_another_is_not_kept(hub, monkeypatch):
    monkeypatch.setattr(inception, "INCEPTION_SHA256", "6726825d" + "0" * 56)
    with pytest.raises(DataError, match="invalid hash value .expected .6726825d0000.*feature_extractor_weights_path"):
        resolve()
    assert list(hub.iterdir()) == []


@pytest.mark.parametrize("kind", [1, 4, 6, 7])
def test_code_in_a_file_is_not_run_whatever_its_hash(hub, tmp_path, monkeypatch, kind):
    hub.mkdir(parents=True)
    (hub / NAME).write_bytes(pickled(tmp_path / "canary", kind))
    monkeypatch.setattr(inception, "INCEPTION_SHA256", file_sha256(hub / NAME))
    for weights in (None, hub / NAME):
        with pytest.raises(DataError, match="cannot get the Inception weights") as refused:
            resolve(weights)
        assert "\n" not in str(refused.value)
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize("before", [None, "0"])
def test_other_loads_are_as_they_were(tmp_path, monkeypatch, before):
    monkeypatch.delenv(inception.FORCE_KEY, raising=False)
    if before is not None:
        monkeypatch.setenv(inception.FORCE_KEY, before)
    (tmp_path / "file").write_bytes(pickled(tmp_path / "canary", 2))
    with pytest.raises(KeyError), inception.tensors_alone():
        # As torch-fidelity does.
        with pytest.raises(Exception, match="Weights only load failed"):
            torch.load(tmp_path / "file", weights_only=False)
        raise KeyError
    assert os.environ.get(inception.FORCE_KEY) == before and not (tmp_path / "canary").exists()
