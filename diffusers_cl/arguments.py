"""The command line and the YAML files of a run, as a [`TrainingConfig`], and back."""

import dataclasses
import difflib
import functools
import re
import reprlib
import sys
from types import NoneType
from typing import Literal, get_args, get_origin

import yaml
from jsonargparse import ArgumentParser, set_loader, set_parsing_settings

from .config import SECRET_KEYS, TrainingConfig
from .errors import ConfigError
from .plain_yaml import dump_yaml, load_yaml, read_settings
from .validation import validate


TYPES = {field.name: field.type for field in dataclasses.fields(TrainingConfig)}
TYPE_NAMES = {bool: "true or false", int: "whole number", float: "number", str: "text", NoneType: "null"}
NO_TEXT = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")


def _check_keys(keys: list, known: list[str], where: str) -> None:
    for key in keys:
        if key not in known:
            plain = str(key).lower().replace("-", "_")
            close = difflib.get_close_matches(plain, known)
            # Two letters that changed places: of keys as close, the one with the same letters.
            best = max(close, key=lambda name: sorted(name) == sorted(plain), default=None)
            hint = f"did you mean {best!r}?" if best else "--help lists them all"
            raise ConfigError(f"{where}: unknown key {key!r:.100}; {hint}")


def _describe(kind) -> str:
    """A type in words."""
    if get_origin(kind) is Literal:
        return ", ".join(map(repr, get_args(kind)))
    if get_origin(kind) is list:
        return f"[{_describe(get_args(kind)[0])}, ...]"
    return TYPE_NAMES.get(kind) or " or ".join(map(_describe, get_args(kind)))


def _fits(value, kind) -> bool:
    """Whether a value is of a type as it stands. jsonargparse takes null for any type, and reads the text '5' as 5."""
    options = get_args(kind)
    if get_origin(kind) is Literal:
        return isinstance(value, str) and value in options
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_fits(item, options[0]) for item in value)
    if options:
        return any(_fits(value, option) for option in options)
    if kind is float and type(value) is int:
        return abs(value) <= sys.float_info.max
    # A bool is no int here.
    return type(value) is kind and not (kind is str and (not value.strip() or NO_TEXT.search(value)))


def _check(settings: dict, where: str) -> None:
    """Raises `ConfigError` for a key that there is not, or a value of another type than the configuration declares."""
    _check_keys(list(settings), list(TYPES), where)
    for key, value in settings.items():
        if not _fits(value, TYPES[key]):
            shown = "not text" if key in SECRET_KEYS else reprlib.repr(value)
            allowed = _describe(TYPES[key])
            if "text" in allowed:
                allowed += "; text: not empty, no control characters, in quotes where YAML sees another type"
            raise ConfigError(f"{where}: {key} is {shown}; allowed: {allowed}")


def _from_text(key: str, text: str):
    """Returns what the command line says: text as it is typed where no number is allowed, otherwise YAML."""
    options = (TYPES[key], *(get_args(TYPES[key]) if get_origin(TYPES[key]) is not list else ()))
    if not text.strip() or (str in options and float not in options):
        return text
    try:
        value = load_yaml(text)
    except yaml.YAMLError:
        return text
    return text if isinstance(value, str) else value


class _Parser(ArgumentParser):
    """Reads what is typed as YAML files are read, and raises instead of printing the usage: a fault is one sentence."""

    def _get_values(self, action, arg_strings):
        value = super()._get_values(action, arg_strings)
        if action.dest in TYPES:
            value = _from_text(action.dest, value)
            _check({action.dest: value}, "command line")
        return value

    def error(self, message: str, ex: Exception | None = None):
        raise ConfigError(f"command line: {' '.join(message.split()):.300}; allowed: --key value") from ex


@functools.cache
def _parser() -> _Parser:
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    # jsonargparse reads text as YAML, in objects too. Here it has been read already.
    set_loader("text", lambda text: text)
    parser = _Parser(
        prog="train_continual.py",
        usage="%(prog)s --config FILE [--config FILE ...] [--key value ...]",
        description=TrainingConfig.__doc__,
        parser_mode="text",
        print_config=None,
    )
    parser.add_argument(
        "--config", action="append", metavar="FILE", help="A YAML file; may be repeated, a later one wins."
    )
    parser.add_class_arguments(TrainingConfig, as_group=False)
    for action in [action for action in parser._actions if action.dest in TYPES]:
        # No `--tasks+` to append: a key is given once.
        action.option_strings = [f"--{action.dest}"]
        # `--use_ema` alone means true, as in diffusers' scripts.
        if bool in (TYPES[action.dest], *get_args(TYPES[action.dest])):
            action.nargs, action.const = "?", "true"
    return parser


def parse_config(arguments: list[str] | None = None, inherited: dict | None = None) -> TrainingConfig:
    """
    Returns the validated configuration of a command line: `--config FILE ...` in the order given, then `--key value`.

    Args:
        arguments (list of `str`, *optional*): the process's by default.
        inherited (`dict`, *optional*): values in place of the defaults, for keys that nothing sets.

    Raises:
        ConfigError: unknown key, wrong type or impossible combination, naming the key and what is allowed.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    keys = [argument[2:].partition("=")[0] for argument in arguments if argument.startswith("--")]
    _check_keys(keys, [*TYPES, "config", "help"], "command line")
    given = _parser().parse_args(arguments, defaults=False).as_dict()
    # Files first: the command line wins wherever it stands.
    sources = [("settings of pretrained_model_name_or_path", inherited or {})]
    sources += [(f"--config {file!r:.300}", read_settings(file)) for file in given.pop("config", [])]
    settings = {}
    for where, content in sources:
        _check(content, where)
        settings |= content
    config = TrainingConfig(**_parser().parse_object(settings | given, defaults=False).as_dict())
    validate(config)
    return config


def to_yaml(config: TrainingConfig) -> str:
    """Returns the configuration as YAML, in the order of the dataclass, without what is secret."""
    content = {key: value for key, value in dataclasses.asdict(config).items() if key not in SECRET_KEYS}
    return dump_yaml(content)
