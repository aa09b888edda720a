"""YAML of plain values, lists and mappings: read strictly, whoever wrote it, and written so that it is read again."""

import re
from pathlib import Path

import yaml

from .errors import ConfigError, first_line


# Far more than any configuration has: a file that somebody else wrote costs seconds and little memory at the worst.
MAX_BYTES, MAX_DEPTH = 2**18, 8
# The plain values of YAML 1.2, in which `no` is a name and 1e-4 a number. Ints stay below Python's limit on digits.
SCALARS = {
    "null": re.compile(r"(?:~|null|Null|NULL|)\Z"),
    "bool": re.compile(r"(?:true|True|TRUE|false|False|FALSE)\Z"),
    "int": re.compile(r"[-+]?(?:0|[1-9][0-9_]{0,999})\Z"),
    "float": re.compile(
        r"(?:[-+]?(?:[0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]+)?|[-+]?[0-9][0-9_]*[eE][-+]?[0-9]+"
        r"|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN))\Z"
    ),
}


class _Loader(yaml.SafeLoader):
    """Plain values, lists and mappings: no tag, no alias, no key twice, no deep nesting."""

    yaml_implicit_resolvers = {}
    key, depth = "the file", 0

    def compose_node(self, parent, index):
        event = self.peek_event()
        if self.depth == 1 and isinstance(index, yaml.ScalarNode):
            self.key = repr(index.value)[:100]
        is_alias, is_tagged = isinstance(event, yaml.AliasEvent), getattr(event, "tag", None) is not None
        if is_alias or is_tagged or self.depth >= MAX_DEPTH:
            fault = "an alias" if is_alias else "a tag" if is_tagged else f"more than {MAX_DEPTH} levels"
            problem = f"{self.key} has {fault}; allowed: plain values and lists of them"
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node, deep=False):
        seen = set()
        # Other keys than scalars are refused by PyYAML.
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                problem = f"{key.value!r:.100} stands in more than one place; allowed: every key once"
                raise yaml.constructor.ConstructorError(None, None, problem, key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes what either version of YAML would take for something else than text."""


for _name, _pattern in SCALARS.items():
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, None)
    _Dumper.add_implicit_resolver(f"tag:yaml.org,2002:{_name}", _pattern, None)


def load_yaml(text: str) -> object:
    """
    Returns the one document of a YAML text: `None`, a bool, int, float or str, or lists and dicts of them, no more than
    eight levels deep. Nothing that the text says can run or grow.

    Raises:
        yaml.YAMLError: for any other text.
    """
    return yaml.load(text, _Loader)


def read_settings(file: str | Path) -> dict:
    """
    Returns the mapping in a YAML file of at most 256 KiB, read with [`load_yaml`].

    Raises:
        ConfigError: it cannot be read, or is something else; names file, line and key.
    """
    where = f"--config {str(file)!r:.300}"
    try:
        with open(file, "rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        settings = load_yaml(content.decode("utf-8-sig")) if len(content) <= MAX_BYTES else None
    except yaml.MarkedYAMLError as error:
        problem = ", ".join(filter(None, (error.context, error.problem)))
        raise ConfigError(f"{where}, line {error.problem_mark.line + 1}: {problem:.300}") from error
    except OSError as error:
        raise ConfigError(f"{where}: {error.strerror}; allowed: a YAML file") from error
    except (ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{where}: {first_line(error)}; allowed: a YAML file in UTF-8") from error
    if len(content) > MAX_BYTES:
        raise ConfigError(f"{where}: too long; allowed: a YAML file of at most {MAX_BYTES} bytes")
    if not isinstance(settings, dict):
        found = "nothing" if settings is None else type(settings).__name__
        raise ConfigError(f"{where}: expected a mapping of keys to values, found {found}")
    return settings


def dump_yaml(content: dict) -> str:
    """Returns a mapping as YAML, in its order, that [`load_yaml`] and any other reader of YAML read alike."""
    return yaml.dump(content, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
