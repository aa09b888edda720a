"""A run that goes on must find what it is a function of as it was; what differs is named with both values."""

import copy

import pytest

from diffusers_cl.errors import CheckpointError, ConfigError, DataError
from diffusers_cl.files import write_json
from diffusers_cl.inputs import INPUTS_NAME, check_inputs


INPUTS = {
    "data": {"fingerprint": "a" * 64, "images": 40, "converted": {}},
    "class_ids": {"cat": 0, "dog": 1},
    "architecture": {"block_out_channels": [8, 16]},
    "exact": {"processes": 1, "threads": 2, "device": "cpu", "torch": "2.15.0"},
}


def changed(part: str, key: str, value) -> dict:
    inputs = copy.deepcopy(INPUTS)
    inputs[part][key] = value
    return inputs


def test_nothing_to_compare_with_and_nothing_changed(tmp_path):
    assert check_inputs(tmp_path, INPUTS, False) == []
    write_json(tmp_path / INPUTS_NAME, INPUTS)
    assert check_inputs(tmp_path, INPUTS, False) == []


@pytest.mark.parametrize(
    ("part", "key", "value", "kind", "words"),
    [
        ("data", "fingerprint", "b" * 64, DataError, ["aaaaaaaaaaaa", "bbbbbbbbbbbb", "overwrite_output_dir"]),
        ("class_ids", "dog", 2, DataError, ["'dog'", "1", "2"]),
        ("class_ids", "bird", 2, DataError, ["'bird'", "None", "2"]),
        ("architecture", "block_out_channels", [8, 32], ConfigError, ["block_out_channels", "[8, 16]", "[8, 32]"]),
        ("exact", "processes", 2, CheckpointError, ["processes 1 before, 2 now", "allow_inexact"]),
        ("exact", "threads", 4, CheckpointError, ["threads 2 before, 4 now"]),
        ("exact", "device", "NVIDIA H200", CheckpointError, ["cpu", "NVIDIA H200"]),
        ("exact", "torch", "2.16.0", CheckpointError, ["2.15.0", "2.16.0"]),
    ],
)
def test_a_change_is_an_error_with_both_values(tmp_path, part, key, value, kind, words):
    write_json(tmp_path / INPUTS_NAME, INPUTS)
    now = changed(part, key, value)
    with pytest.raises(kind) as caught:
        check_inputs(tmp_path, now, False)
    assert [word for word in words if word not in str(caught.value)] == []
    if part == "exact":
        assert check_inputs(tmp_path, now, True) == [{"key": key, "before": INPUTS["exact"][key], "now": value}]
    else:
        # No flag lets other data or another network in.
        with pytest.raises(kind):
            check_inputs(tmp_path, now, True)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"data": 1}', "[" * 100_000])
def test_a_file_that_cannot_be_read(tmp_path, content):
    (tmp_path / INPUTS_NAME).write_text(content)
    with pytest.raises(CheckpointError, match=INPUTS_NAME):
        check_inputs(tmp_path, INPUTS, True)
