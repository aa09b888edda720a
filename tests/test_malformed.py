"""Malformed configurations: exit code 2, one line that names the key, nothing run and nothing written."""

import dataclasses
from pathlib import Path
from typing import get_args

import pytest
import torture_config
import yaml
from malformed_cases import OUT_OF_RANGE, all_cases
from torture_config import damaged_configurations, malformed_configurations

from diffusers_cl import plain_yaml
from diffusers_cl.arguments import load_yaml, parse_config
from diffusers_cl.config import TrainingConfig
from diffusers_cl.errors import ConfigError


GIVEN = ["--dataset_name", "digits", "--classes_per_task", "2"]


def test_every_malformed_configuration_is_refused_in_one_line(tmp_path):
    found = malformed_configurations(tmp_path, count=500)
    assert found["problems"] == []
    assert found["refused"] == found["named"] == found["tried"] == 500
    assert ConfigError.exit_code == 2
    assert found["suggested"] == found["typos"] > 80
    assert found["tracebacks"] == found["files_written"] == 0
    assert found["kinds"].keys() == all_cases().keys()


def test_damaged_presets_are_read_or_refused(tmp_path):
    found = damaged_configurations(tmp_path, count=100)
    assert found["problems"] == [] and found["read"] + found["refused"] == 100
    assert min(found["read"], found["refused"]) > 5


def test_every_number_has_values_out_of_its_range():
    numbers = {
        field.name
        for field in dataclasses.fields(TrainingConfig)
        if {int, float} & {field.type, *get_args(field.type)}
    }
    assert numbers <= OUT_OF_RANGE.keys()


def _raise(error: BaseException):
    raise error


@pytest.mark.parametrize(
    ("parse", "count"),
    [
        (lambda command: _raise(KeyError("seed")), "tracebacks"),
        (lambda command: _raise(SystemExit(2)), "tracebacks"),
        (lambda command: _raise(RecursionError()), "tracebacks"),
        (lambda command: Path("config.yaml").write_text(""), "files_written"),
    ],
)
def test_the_check_sees_faults(tmp_path, monkeypatch, parse, count):
    monkeypatch.setattr(torture_config, "parse_config", parse)
    found = malformed_configurations(tmp_path, count=10)
    assert found[count] == len(found["problems"]) == 10 and found["refused"] == found["named"] == 0


def test_the_check_sees_silence_and_long_messages(tmp_path, monkeypatch):
    for number, text in enumerate(("wrong", "seed\n" * 4, "seed is 5; allowed: " + "x" * 1000)):
        monkeypatch.setattr(torture_config, "parse_config", lambda command, text=text: _raise(ConfigError(text)))
        found = malformed_configurations(tmp_path / str(number), count=20)
        assert found["refused"] == 20 and found["named"] == 0 and len(found["problems"]) == 20


def test_a_loader_that_runs_tags_is_noticed(tmp_path, monkeypatch):
    # Aliases would take all memory.
    monkeypatch.setattr(torture_config, "all_cases", lambda: {"tag": all_cases()["tag"]})
    monkeypatch.setattr(plain_yaml, "load_yaml", yaml.unsafe_load)
    found = malformed_configurations(tmp_path, count=200)
    assert found["files_written"] > 0 and found["problems"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("[1.5, 2E3, -1e5, .5, 3., 1_000]", [1.5, 2000.0, -1e5, 0.5, 3.0, 1000]),
        ("[true, False, null, ~, '']", [True, False, None, None, ""]),
        # A data set may have these classes.
        ("[no, yes, on, Off, n]", ["no", "yes", "on", "Off", "n"]),
        ("[01, 1:30, 2024-01-01, 0x1F, =, <<]", ["01", "1:30", "2024-01-01", "0x1F", "=", "<<"]),
        ("{a: [{b: 1}], c: 'it''s'}", {"a": [{"b": 1}], "c": "it's"}),
        ("[[[[[[[x]]]]]]]", [[[[[[["x"]]]]]]]),
    ],
)
def test_plain_yaml(text, value):
    assert load_yaml(text) == value
    assert str(load_yaml(text)) == str(value)


@pytest.mark.parametrize(
    "text", ["{a: 1, a: 2}", "[{a: 1, a: 1}]", "!!str a", "&a [*a]", "[" * 9 + "]" * 9, "a: 1\n---\nb: 2"]
)
def test_other_yaml(text):
    with pytest.raises(yaml.YAMLError):
        load_yaml(text)


def test_a_token_is_not_shown(tmp_path):
    for content in (
        "hub_token: [hf_canary]",
        "hub_token: {hf_canary: 1}",
        'hub_token: "hf_canary\\n"',
        "hub_token: !x hf_canary",
    ):
        (tmp_path / "token.yaml").write_text(content)
        with pytest.raises(ConfigError, match="hub_token") as error:
            parse_config([*GIVEN, "--config", str(tmp_path / "token.yaml")])
        assert "canary" not in str(error.value)
    for command in (["--hub_token", "hf_canary\n"], ["--hub_tokn=hf_canary"]):
        with pytest.raises(ConfigError, match="hub_token") as error:
            parse_config([*GIVEN, *command])
        assert "canary" not in str(error.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"learning_rate": "fast"}, ["learning_rate", "'fast'", "number"]),
        ({"train_batch_size": True}, ["train_batch_size", "True"]),
        ({"learning_rat": 1.0}, ["'learning_rat'", "'learning_rate'"]),
        ({"adam_beta1": 2.0}, ["adam_beta1", "2.0"]),
        ({"tasks": [["a\0"]]}, ["tasks", "text"]),
    ],
)
def test_settings_of_a_model_are_checked_like_any_other(settings, words):
    with pytest.raises(ConfigError) as error:
        parse_config(GIVEN, inherited=settings)
    assert [word for word in words if word not in str(error.value)] == []


def test_what_is_given_wins_over_what_is_inherited():
    config = parse_config([*GIVEN, "--seed", "1"], inherited={"seed": 2, "learning_rate": 3})
    assert (config.seed, config.learning_rate) == (1, 3.0) and isinstance(config.learning_rate, float)


def test_text_in_quotes_stays_text(tmp_path):
    """jsonargparse would take some of it for null, numbers or lists."""
    settings = {"cache_dir": "~", "revision": "[&a [x], *a]", "output_dir": "null", "tasks": [["01", 1, "null"]]}
    (tmp_path / "text.yaml").write_text(yaml.safe_dump(settings))
    given = ["--dataset_name", "digits", "--pretrained_model_name_or_path", "~"]
    for config in (parse_config(given, settings), parse_config([*given, "--config", str(tmp_path / "text.yaml")])):
        assert {key: getattr(config, key) for key in settings} == settings
