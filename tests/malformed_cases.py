"""Malformed configurations of every kind, each with a pattern for the message that it must end with."""

import dataclasses
import itertools
import re
from collections.abc import Iterator
from types import NoneType
from typing import Literal, NamedTuple, get_args, get_origin

from diffusers_cl.config import TrainingConfig


TYPES = {field.name: field.type for field in dataclasses.fields(TrainingConfig)}
HUGE = ("1" + "0" * 400, "-1" + "0" * 400, "9" * 5000, "1" + "0" * 400 + ".5")

# YAML that is no value of a type; `~` is one where null is allowed.
WRONG = {
    int: "abc | '5' | [1] | {a: 1} | true | False | 1.5 | 1e3 | 5.0 | 2024-01-01 | 0x10 | 010 | 1:30 | ~",
    float: "abc | '1e-4' | [1.0] | {a: 1} | true | False | 1,5 | 1e | 2024-01-01 | 1.0.0 | ~",
    bool: "1 | 0 | yes | off | 'true' | [true] | {true: 1} | 1.0 | t | ~",
    str: "5 | 1.5 | 1e-4 | true | [a] | {a: b} | ~",
    Literal: "5 | nothing_like_it | [none] | {a: 1} | TRUE | '' | ~",
}
WRONG_OF_KEY = {
    "tasks": "5 | abc | [1, 2] | [[1.5]] | [[true]] | [[null]] | [[[1]]] | {a: 1} | [{a: 1}] | [''] | [['']]",
    "class_order": "1.5 | abc | [[1]] | {a: 1} | [true] | [null] | [1.0] | true",
    "max_train_steps": "abc | 1.5 | [1.5] | [a] | [[1]] | true | {a: 1} | [null] | ['5']",
    "fisher_timesteps": "5 | abc | [a, b] | [0.5, 1] | ~ | [[0, 1]] | {a: 1} | [false, true]",
    "ewc_lambda": "true | [1] | ~ | {a: 1} | strong | xauto | 10auto | 'nan' | infxauto | '0x10'",
}
# YAML of the right type and out of range; all other whole numbers start at 1.
FROM_ZERO = ("lr_warmup_steps", "dataloader_num_workers", "seed", "skip_nonfinite")
POSITIVE = (
    "learning_rate",
    "adapter_learning_rate",
    "adam_epsilon",
    "max_grad_norm",
    "distillation_weight",
    "ema_inv_gamma",
    "ema_power",
)
OUT_OF_RANGE = {
    **{key: "0 | -1 | -1000000" for key, kind in TYPES.items() if kind in (int, int | None)},
    **dict.fromkeys(FROM_ZERO, "-1 | -1000000"),
    **dict.fromkeys(POSITIVE, "0 | 0.0 | -1e-9 | -1"),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "ema_max_decay"), "1 | 1.0 | -0.1 | 2"),
    **dict.fromkeys(("replay_num_inference_steps", "eval_num_inference_steps"), "0 | -1 | 1001 | 100000"),
    "adam_weight_decay": "-1e-9 | -1",
    "hub_push_timeout": "0 | -1 | 1e12",
    "ddp_timeout": "0 | -1 | 100000000000000",
    "ewc_lambda": "0 | -1 | 0xauto | -1xauto",
    "max_train_steps": "0 | -1 | [] | [5, 0] | [5, -1] | [100000000000000]",
    "fisher_timesteps": "[] | [5] | [0, 1001] | [500, 500] | [9, 5] | [-1, 5] | [0, 5, 9]",
    "class_order": "-1 | []",
    "tasks": "[] | [[]] | [[1], []] | [[1, 2], [2]] | [[cat, cat]]",
}
NOT_FINITE = ".nan | .inf | -.inf | nan | inf | 1e400 | .NAN"

UNKNOWN = "momentum | x | config | help | seed.x | seed+ | __class__ | << | 1 | null | \u00e9 | [a] | a b | = | ' '"
TAGS = (
    "!!python/object/apply:os.system ['touch canary'] | !!python/object/apply:subprocess.check_output [[touch, canary]]"
    " | !!python/object/new:os.system ['touch canary'] | !!python/object/apply:builtins.open [canary, w]"
    " | !!python/name:os.system | !!python/module:os | !!python/tuple [1] | !!binary aGVsbG8= | !!set {a, b} | !!omap [a: 1]"
    " | !!timestamp 2024-01-01 | !!int abc | !!int '' | !!bool maybe | !!float x | !mine 1 | ! 1 | !!str 5"
    " | !<tag:yaml.org,2002:int> 5"
)
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{after}: &{after} [{', '.join([f'*{before}'] * 9)}]\n" for before, after in itertools.pairwise("abcdefghij")
)
ALIASES = BOMB + (
    " | seed: &x 1\nresolution: *x | seed: &x [*x] | seed: *nowhere | tasks: &x [[1], [*x]] | a: &a {seed: 1}\n<<: *a"
    " | a: &a {seed: 1}\n<<: [*a, *a] | - &a [*a]"
)
NESTED = (
    *("seed: " + "[" * 10_000, "[" * 10_000, "seed: " + "{a: " * 10_000, "- " * 10_000, "? " * 5_000),
    *(
        "tasks: " + "[" * 500 + "]" * 500,
        "".join(" " * depth + "a:\n" for depth in range(300)),
        "seed: [[[[[[[[[1]]]]]]]]]",
    ),
)
NO_MAPPING = "[1] | abc | 5 |  | # nothing | null | - seed: 1 | --- | seed | true | 'seed: 1' | seed 1"
BROKEN = (
    "seed: [1 | seed: \"1 | seed: '1 | {seed: 1 | seed: 1: 2 | \tseed: 1 | tasks:\n\t- [1] | @seed: 1 | %seed: 1 | seed: `1`"
    " | seed: 1\n  resolution: 8 | seed: 1\n---\nseed: 2 | seed: 1\n...\nseed: 2 | ---\n--- | seed: ] | ? [a, b]\n: 1 | ..."
    ' | ? {a: b}\n: 1 | {[a]: 1} | seed: "\\x" | - 1\nseed: 1 | seed: 1\n- 1 | %YAML 9.9\n---\nseed: 1'
)
BINARY = (
    *(b"\xff\xfe\x00", b"\x7fELF\x02\x01\x01\x00", b"\x89PNG\r\n\x1a\n", b"seed: 1\x00\n", b"output_dir: caf\xe9\n"),
    *("seed: 1".encode("utf-16"), "seed: 1".encode("utf-32"), b"PK\x03\x04", bytes(range(256)), b"seed: \x1b[31m1\n"),
    *(b"\xed\xa0\x80: 1\n", b"seed: \x80\n", b"#" * 300_000),
)
# Settings that do not go together, and a pattern for the message.
CONFLICTS = """
tasks: [[0], [1]] => tasks.*classes_per_task
classes_per_task: null => tasks.*classes_per_task
train_data_dir: images => dataset_name.*train_data_dir
dataset_name: null => dataset_name.*train_data_dir
{tasks: [[0]], classes_per_task: null, class_order: 3} => class_order
{stream: joint, replay: memory} => replay.*joint
{stream: cumulative, penalty: ewc} => penalty.*cumulative
revision: main => revision
allow_known_classes: true => allow_known_classes
hub_model_id: me => hub_model_id
{pretrained_model_name_or_path: a, stream: joint} => stream.*sequential
{pretrained_model_name_or_path: a, model_config_name_or_path: b} => model_config_name_or_path
{overwrite_output_dir: true, resume_from_checkpoint: a} => resume_from_checkpoint
{feature_extractor: classifier, feature_extractor_weights_path: a.pth} => feature_extractor
logging_dir: /elsewhere/logs => logging_dir
logging_dir: ../logs => logging_dir
"""
# Command lines, with spaces between the arguments.
COMMANDS = """
--config => config
--config= => config
--config --seed 1 => config
--config nowhere.yaml => nowhere.yaml
--config . => directory
--config /dev/null => null
a.yaml => a.yaml
--seed 1 2 => 2
-seed 1 => seed
-s => -s
-- => key ''
--=1 => key ''
--no-use_ema => no-use_ema
--seed.x 1 => seed
--fisher_timesteps+=1 => fisher_timesteps
--help=1 => help
@a.txt => @a.txt
--tasks [[0, => tasks
--tasks [[0],[*a]] => tasks
--tasks !!python/name:os.system => tasks
--print_config => print_config
--seed -1e5 => seed
"""
STRANGE_COMMANDS = (
    *((["--config", "a\0b"], "config"), (["--config", "a\nb\nc\nd"], "config"), (["--config", "x" * 5_000], "config")),
    *((["--tasks", "[" * 10_000], "tasks"), (["--class_order", BOMB], "class_order")),
    *((["--seed", "\udcff"], "seed"), (["--\udcff"], "key")),
)


class Case(NamedTuple):
    """The content of a YAML file, a command line after it, a pattern for the message, and the key it must suggest."""

    content: bytes | None
    command: list[str]
    pattern: str
    suggestion: str | None = None


def _setting(key: str, value: str) -> Iterator[Case]:
    """The same YAML value in a file and on the command line, where text may look like anything."""
    yield Case(f"{key}: {value}\n".encode(), [], rf"\b{key}\b")
    if get_args(TYPES[key]) != (str, NoneType) and TYPES[key] is not str:
        yield Case(None, [f"--{key}={value}"], rf"\b{key}\b")
        yield Case(None, [f"--{key}", value], rf"\b{key}\b")


def _wrong_values(key: str) -> list[str]:
    options = get_args(TYPES[key])
    is_literal = Literal in (get_origin(TYPES[key]), *map(get_origin, options))
    kind = Literal if is_literal else options[0] if options else TYPES[key]
    values = (WRONG_OF_KEY.get(key) or WRONG[kind]).split(" | ")
    return [value for value in values if value != "~" or NoneType not in options]


def _typos(key: str) -> Iterator[str]:
    for position, letter in enumerate(key):
        if letter.isalpha():
            yield key[:position] + key[position + 1 :]
            yield key[:position] + letter + key[position:]
        yield key[:position] + key[position + 1 : position + 2] + letter + key[position + 2 :]
    yield from (key.upper(), key.title(), key.replace("_", "-"), key.replace("_", "-").capitalize())


def _files(texts: str, pattern: str) -> list[Case]:
    return [Case(text.encode(), [], pattern) for text in texts.split(" | ")]


def all_cases() -> dict[str, tuple[int, list[Case]]]:
    """Returns every kind of fault: its share of 500, and its cases."""
    numbers = [key for key, kind in TYPES.items() if {int, float} & {kind, *get_args(kind)}]
    texts = [key for key, kind in TYPES.items() if str in (kind, *get_args(kind))]
    valued = [key for key, kind in TYPES.items() if bool not in (kind, *get_args(kind))]
    typos = [(key, typo) for key in TYPES for typo in _typos(key) if typo not in TYPES]
    prefixes = [key[:end] for key in TYPES for end in range(3, len(key)) if key[:end] not in TYPES]
    wrong = [case for key in TYPES for value in _wrong_values(key) for case in _setting(key, value)]
    beyond = [case for key, values in OUT_OF_RANGE.items() for v in values.split(" | ") for case in _setting(key, v)]
    two = [
        Case(one.content + two.content, [], f"{one.pattern}|{two.pattern}")
        for one, two in zip(wrong, itertools.cycle(beyond), strict=False)
        if one.content and two.content and one.pattern != two.pattern
    ]
    typed = [Case(None, [f"--{typo}", "1"], re.escape(typo), key) for key, typo in typos]
    typed += [Case(None, [f"--{typo}=1"], re.escape(typo), key) for key, typo in typos]
    escapes = [Case(f'{key}: "{text}"\n'.encode(), [], key) for key in texts for text in ("", " ", r"\0", r"\ud800")]
    raw = ("", " ", "a\0b", "\ud800", "a\n", "\x1b[1m")
    twice = ("{0}: null\n{0}: null", '{{{0}: 1, "{0}": 2}}', "{0}:\n'{0}':")
    conflicts = [line.split(" => ") for line in CONFLICTS.strip().splitlines()]
    commands = [line.split(" => ") for line in COMMANDS.strip().splitlines()]
    return {
        "unknown": (15, [Case(f"{key}: 1\n".encode(), [], "unknown key|unhashable") for key in UNKNOWN.split(" | ")]),
        "abbreviation": (15, [Case(None, [f"--{part}", "1"], rf"\b{part}\b") for part in prefixes]),
        "typo": (110, [Case(f"{typo}: 1\n".encode(), [], re.escape(typo), key) for key, typo in typos] + typed),
        "type": (130, wrong),
        "range": (50, beyond),
        "not_finite": (20, [c for key in numbers for value in NOT_FINITE.split(" | ") for c in _setting(key, value)]),
        "huge": (15, [case for key in numbers for value in HUGE for case in _setting(key, value)]),
        "two": (10, two),
        "text": (25, escapes + [Case(None, [f"--{key}", text], key) for key in texts for text in raw]),
        "no_value": (10, [Case(None, [f"--{key}"], key) for key in valued]),
        "twice": (15, [Case(text.format(key).encode(), [], rf"line \d: '{key}'") for key in TYPES for text in twice]),
        "tag": (
            25,
            [
                case
                for key in TYPES
                for tag in TAGS.split(" | ")
                for case in _files(f"{key}: {tag}", f"line 1: '{key}'")
            ],
        ),
        "alias": (8, _files(ALIASES, r"line \d+: .* an alias")),
        "nested": (8, [Case(text.encode(), [], r"bad.yaml.*line \d+: ") for text in NESTED]),
        "no_mapping": (10, _files(NO_MAPPING, "bad.yaml.*mapping")),
        "broken": (15, _files(BROKEN, r"bad.yaml.*line \d+: ")),
        "binary": (10, [Case(content, [], "bad.yaml") for content in BINARY]),
        "conflict": (13, [Case(text.encode(), [], pattern) for text, pattern in conflicts]),
        "command": (
            25,
            [Case(None, line.split(), re.escape(pattern)) for line, pattern in commands]
            + [Case(None, command, pattern) for command, pattern in STRANGE_COMMANDS],
        ),
    }
