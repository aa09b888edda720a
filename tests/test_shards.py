"""Parts of a phase on disk: what is read again is what was saved, of the same inputs, or nothing."""

import json
import resource

import pytest
import torch

from diffusers_cl.errors import StorageError
from diffusers_cl.shards import INPUTS_NAME, Shards, load_tensors, save_tensors, tensors_digest


INPUTS = {"weights": "abc", "timesteps": (0, 1000)}
TENSORS = {
    "mean": torch.arange(6, dtype=torch.float64).reshape(2, 3).t(),
    "counts": torch.tensor([1, -2]),
    "half": torch.tensor([1.5, float("inf")], dtype=torch.bfloat16),
    "flag": torch.tensor(True),
    "none": torch.empty(0, 3),
}


def same(found: dict | None, expected: dict) -> bool:
    return (
        found is not None
        and found.keys() == expected.keys()
        and all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    )


@pytest.fixture
def shards(tmp_path) -> Shards:
    return Shards(tmp_path / "run" / "phase", INPUTS)


def test_a_part_comes_back_bit_for_bit(shards):
    assert shards.load("sums") is None
    shards.save("sums", TENSORS)
    loaded = Shards(shards.folder, INPUTS).load("sums")
    assert same(loaded, TENSORS)
    assert all(loaded[name].dtype == tensor.dtype for name, tensor in TENSORS.items())
    shards.save("sums", {"mean": torch.zeros(1)})
    assert same(shards.load("sums"), {"mean": torch.zeros(1)})
    assert {path.name for path in shards.folder.iterdir()} == {"sums.safetensors", INPUTS_NAME}


def test_flipped_bits_and_lost_ends_are_seen(shards):
    tensors = {"mean": torch.tensor([1.0, -2.0]), "counts": torch.tensor(3)}
    shards.save("sums", tensors)
    path = shards.folder / "sums.safetensors"
    whole = path.read_bytes()
    # All 1600 bits take long; of every byte another one.
    for position in range(len(whole)):
        content = bytearray(whole)
        content[position] ^= 1 << position % 8
        path.write_bytes(content)
        assert shards.load("sums") is None, f"byte {position} of {len(whole)}"
    for length in range(0, len(whole), 5):
        path.write_bytes(whole[:length])
        assert shards.load("sums") is None
    path.write_bytes(whole)
    assert same(shards.load("sums"), tensors)


def test_a_part_is_none_of_another_name_or_phase(shards, tmp_path):
    shards.save("first", TENSORS)
    path = shards.folder / "first.safetensors"
    (shards.folder / "second.safetensors").write_bytes(path.read_bytes())
    assert shards.load("second") is None
    # As where the deletion of the old parts has failed.
    other = Shards(tmp_path / "other", {**INPUTS, "weights": "abd"})
    other.save("second", TENSORS)
    (other.folder / "first.safetensors").write_bytes(path.read_bytes())
    assert other.load("first") is None and other.load("second") is not None


def test_other_inputs_empty_the_folder(shards):
    shards.save("first", TENSORS)
    other = Shards(shards.folder, {**INPUTS, "timesteps": (0, 999)})
    assert other.load("first") is None
    # Looking does no harm.
    assert shards.load("first") is not None
    other.save("second", TENSORS)
    assert {path.name for path in shards.folder.iterdir()} == {"second.safetensors", INPUTS_NAME}
    assert json.loads((shards.folder / INPUTS_NAME).read_text()) == {"weights": "abc", "timesteps": [0, 999]}


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000])
def test_damaged_inputs_cost_the_parts_and_no_more(shards, content):
    shards.save("first", TENSORS)
    (shards.folder / INPUTS_NAME).write_bytes(content)
    shards.save("second", TENSORS)
    assert shards.load("first") is None and shards.load("second") is not None


def test_a_full_disk_is_one_sentence_and_leaves_the_part_before(shards):
    shards.save("sums", {"mean": torch.zeros(2)})
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))
    try:
        with pytest.raises(StorageError) as error:
            shards.save("sums", {"mean": torch.zeros(10_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot write" in str(error.value) and "sums.safetensors" in str(error.value)
    assert "File too large" in str(error.value) and "40,000 bytes needed" in str(error.value)
    assert same(shards.load("sums"), {"mean": torch.zeros(2)})
    assert {path.name for path in shards.folder.iterdir()} == {"sums.safetensors", INPUTS_NAME}


def test_digest_tells_names_types_and_shapes_apart():
    zeros = torch.zeros(4)
    variants = [
        {"a": zeros},
        {"b": zeros},
        {"a": zeros.int()},
        {"a": zeros.reshape(2, 2)},
        {"a": zeros.double()[:2]},
        {"a": zeros[:2], "b": zeros[2:]},
        {"a": -zeros},
        {},
    ]
    digests = [tensors_digest(tensors) for tensors in variants] + [tensors_digest({"a": zeros}, {"seed": 1})]
    assert len(set(digests)) == len(digests)
    # Not the order of the names, nor where the numbers lie in memory.
    pair = {"b": torch.ones(3, 2).t(), "a": zeros}
    assert tensors_digest(pair) == tensors_digest({"a": zeros.clone(), "b": torch.ones(2, 3)})


def test_a_file_of_its_own(tmp_path):
    path = tmp_path / "classifier.safetensors"
    assert load_tensors(path, {"recipe": 1}) is None
    save_tensors(path, {"a": torch.ones(2)}, {"recipe": 1})
    assert same(load_tensors(path, {"recipe": 1}), {"a": torch.ones(2)})
    assert load_tensors(path, {"recipe": 2}) is None
    assert list(tmp_path.iterdir()) == [path]
    path.unlink()
    path.mkdir()
    assert load_tensors(path, {"recipe": 1}) is None


# Passes over batches

BATCHES = [torch.randn(5, generator=torch.Generator().manual_seed(number)) for number in range(7)]


def add_up(shards: Shards | None, stop_before: int | None = None, name: str = "sums") -> tuple[dict, list[int]]:
    """The sums of a pass, and the numbers of the batches that it took; it may end early, as a kill ends it."""
    sums = {"mean": torch.zeros(5), "batches_seen": torch.zeros((), dtype=torch.int64)}
    taken = []
    numbered = list(enumerate(BATCHES))
    for number, batch in numbered if shards is None else shards.over(numbered, name, sums):
        if number == stop_before:
            break
        taken.append(number)
        # In float32 the order of additions is in the last digits.
        sums["mean"] += batch
        sums["batches_seen"] += 1
    return sums, taken


@pytest.mark.parametrize("every", [1, 2, 3, 7, 10])
@pytest.mark.parametrize("stop_before", range(7))
def test_a_pass_goes_on_after_the_last_batch_that_was_saved(tmp_path, every, stop_before):
    expected, _ = add_up(None)
    interrupted = Shards(tmp_path, INPUTS, every)
    assert add_up(interrupted, stop_before)[1] == list(range(stop_before))
    again = Shards(tmp_path, INPUTS, every)
    sums, taken = add_up(again)
    assert taken == list(range(stop_before // every * every, 7))
    assert same(sums, expected)
    # A finished pass takes no batch and gives the same sums.
    sums, taken = add_up(again)
    assert taken == [] and same(sums, expected)


def test_passes_do_not_mix(tmp_path):
    shards = Shards(tmp_path, INPUTS)
    add_up(shards, stop_before=3, name="first")
    assert add_up(shards, name="second")[1] == list(range(7))
    assert add_up(Shards(tmp_path, {**INPUTS, "weights": "abd"}), name="first")[1] == list(range(7))
    assert add_up(shards, name="first")[1] == list(range(7))


def test_damaged_sums_are_added_up_anew(tmp_path):
    shards, (expected, _) = Shards(tmp_path, INPUTS), add_up(None)
    add_up(shards, stop_before=5)
    path = tmp_path / "sums.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    sums, taken = add_up(shards)
    assert taken == list(range(7)) and same(sums, expected)


def test_a_pass_of_no_batches_saves_nothing(tmp_path):
    sums = {"mean": torch.ones(2)}
    assert list(Shards(tmp_path / "phase", INPUTS).over([], "sums", sums)) == []
    assert not (tmp_path / "phase").exists() and torch.equal(sums["mean"], torch.ones(2))
