"""The command line and the YAML files of a run, as a [`TrainingConfig`], and back."""

import argparse
import dataclasses
import difflib
import re
import sys
from pathlib import Path

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from .config import SECRET_KEYS, TrainingConfig, validate
from .errors import ConfigError, first_line


# What jsonargparse says of a value that fits none of several types.
UNION_MESSAGE = r'Parser key "([^"]+)": Does not validate .* Subtypes: \[(.*)\] Errors: .* Given value: (.*)'


class _Parser(ArgumentParser):
    """Raises instead of printing the usage: a fault is one sentence."""

    def error(self, message: str, ex: Exception | None = None):
        text = re.sub(r"<class '(\w+)'>|typing\.Literal\[([^]]*)\]", r"\1\2", " ".join(message.split()))
        text = re.sub(r'Parser key "([^"]+)": Expected an? (.*?)\. Got value: (.*)', r"\1 is \3; allowed: \2", text)
        raise ConfigError(re.sub(UNION_MESSAGE, r"\1 is \3; allowed: \2", text)) from ex


def _check_keys(keys: list[str], where: str) -> None:
    known = [field.name for field in dataclasses.fields(TrainingConfig)]
    for key in keys:
        if str(key).removesuffix("+") not in known:
            close = difflib.get_close_matches(str(key), known, n=1)
            raise ConfigError(f"{where}: unknown key {key!r}" + (f"; did you mean {close[0]!r}?" if close else ""))


def parse_config(arguments: list[str] | None = None, inherited: dict | None = None) -> TrainingConfig:
    """
    Returns the validated configuration of a command line: `--config FILE ...` in the order given, then `--key value`.

    Args:
        arguments (list of `str`, *optional*): the process's by default.
        inherited (`dict`, *optional*): values in place of the defaults, for keys that nothing sets.

    Raises:
        ConfigError: unknown key, wrong type or impossible combination, naming the key and what is allowed.
    """
    # Files first: the command line wins wherever it stands.
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    first.add_argument("--config", action="append", default=[])
    try:
        found, rest = first.parse_known_args(sys.argv[1:] if arguments is None else arguments)
    except argparse.ArgumentError as error:
        raise ConfigError(str(error)) from error
    for file in (files := found.config):
        try:
            content = yaml.safe_load(Path(file).read_text())
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise ConfigError(f"--config {file}: {first_line(error)}") from error
        if not isinstance(content, dict):
            raise ConfigError(f"--config {file}: expected a mapping of keys to values, found {type(content).__name__}")
        _check_keys(list(content), file)
    _check_keys([a[2:].split("=", 1)[0] for a in rest if a.startswith("--") and a != "--help"], "command line")
    # `--use_ema` alone means true, as in diffusers' scripts.
    switches = {f"--{field.name}" for field in dataclasses.fields(TrainingConfig) if field.type is bool}
    for position in reversed(range(len(rest))):
        if rest[position] in switches and (rest + ["--"])[position + 1].startswith("--"):
            rest[position] += "=true"
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    about = TrainingConfig.__doc__
    parser = _Parser(prog="train_continual.py", description=about, exit_on_error=False, print_config=None)
    parser.add_argument("--config", action="config", help="a YAML file; may be repeated, a later one wins")
    parser.add_class_arguments(TrainingConfig, as_group=False)
    if inherited:
        # From a file like any other: its types are checked.
        parser.parse_object(inherited)
        parser.set_defaults(inherited)
    try:
        namespace = parser.parse_args([part for file in files for part in ("--config", file)] + rest)
    except ArgumentError as error:
        raise ConfigError(" ".join(str(error).split())) from error
    config = TrainingConfig(**{key: value for key, value in namespace.as_dict().items() if key != "config"})
    validate(config)
    return config


def to_yaml(config: TrainingConfig) -> str:
    """Returns the configuration as YAML, in the order of the dataclass, without what is secret."""
    content = {key: value for key, value in dataclasses.asdict(config).items() if key not in SECRET_KEYS}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
