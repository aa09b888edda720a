"""The configuration: who wins, what is refused, and that every key is documented and read."""

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import pytest
import yaml

import diffusers_cl
from diffusers_cl import config as config_module
from diffusers_cl.arguments import parse_config, to_yaml
from diffusers_cl.config import OPERATIONAL_KEYS, TrainingConfig
from diffusers_cl.errors import ConfigError


ROOT = Path(__file__).resolve().parents[1]
DIGITS = str(ROOT / "configs" / "digits.yaml")
PRESETS = sorted((ROOT / "configs").glob("*.yaml"))
METHODS = sorted((ROOT / "configs" / "methods").glob("*.yaml"))
EXPERIMENTS = sorted((ROOT / "configs" / "experiments").rglob("*.yaml"))
KEYS = [field.name for field in dataclasses.fields(TrainingConfig)]


@pytest.fixture
def write(tmp_path):
    """Returns a function that writes a YAML file and gives its path."""

    def write(name: str, text: str) -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return write


def test_a_later_file_wins_and_the_command_line_over_all(write):
    one = write("one.yaml", "seed: 1\ntrain_batch_size: 1\nlearning_rate: 1.0\n")
    two = write("two.yaml", "train_batch_size: 2\nlearning_rate: 2.0\n")
    for command in (
        ["--config", DIGITS, "--config", one, "--config", two, "--learning_rate", "3"],
        ["--learning_rate", "3", "--config", DIGITS, "--config", one, f"--config={two}"],
        ["--config", DIGITS, "--config", one, "--learning_rate=3", "--config", two],
    ):
        config = parse_config(command)
        assert (config.seed, config.train_batch_size, config.learning_rate) == (1, 2, 3.0)
        assert config.dataset_name == "digits"
    assert parse_config(["--config", DIGITS, "--config", two, "--config", one]).train_batch_size == 1


def test_a_switch_alone_means_true(write):
    base = write("base.yaml", "dataset_name: digits\nclasses_per_task: 2\nuse_ema: false\n")
    assert parse_config(["--config", base]).use_ema is False
    assert parse_config(["--config", base, "--debug"]).debug and parse_config(["--debug", "--config", base]).debug
    for command in (["--use_ema"], ["--use_ema", "--seed", "1"], ["--use_ema", "true"], ["--use_ema=true"]):
        assert parse_config(["--config", base, *command]).use_ema is True
        assert parse_config([*command, "--config", base]).use_ema is True
    assert parse_config(["--config", base, "--use_ema", "false"]).use_ema is False
    overridden = write("ema.yaml", "use_ema: true\n")
    assert parse_config(["--config", base, "--config", overridden, "--use_ema=false"]).use_ema is False


def test_types(write):
    text = "learning_rate: 1e-3\newc_lambda: 15000\nmax_train_steps: [5, 2]\ntasks: [[cat, 1], [dog]]\n"
    config = parse_config(["--config", write("a.yaml", text + "dataset_name: x\nfisher_timesteps: [667, 1000]\n")])
    assert config.learning_rate == 1e-3 and config.ewc_lambda == 15000 and config.fisher_timesteps == [667, 1000]
    assert config.tasks == [["cat", 1], ["dog"]]
    assert [config.num_steps_for_task(task) for task in range(4)] == [5, 2, 2, 2]
    command = ["--config", DIGITS, "--tasks", "[[3], [cat]]", "--classes_per_task", "null", "--ewc_lambda", "2.5"]
    config = parse_config([*command, "--max_train_steps", "7"])
    assert config.tasks == [[3], ["cat"]] and config.classes_per_task is None and config.ewc_lambda == 2.5
    assert [config.num_steps_for_task(task) for task in range(2)] == [7, 7]


def test_text_on_the_command_line_stays_as_it_is_typed():
    command = ["--config", DIGITS, "--pretrained_model_name_or_path", "1e5", "--model_config_name_or_path", "null"]
    for revision in ("123", "12e4567", "007", "no", "[a", "a: b # c", "2024-01-01", "!x"):
        config = parse_config([*command, "--revision", revision])
        assert config.revision == revision and config.pretrained_model_name_or_path == "1e5"
    assert parse_config([*command, "--revision", "null"]).revision is None
    assert parse_config([*command, "--mixed_precision", "no"]).mixed_precision == "no"
    assert parse_config([*command, "--ewc_lambda", "0.1xauto"]).ewc_lambda == "0.1xauto"


@pytest.mark.parametrize(
    "name", ["a: b # c", "1e5", "no", "01", "2024-01-01", "1:30", "null", "0x1F", "=", "caf\u00e9", "*a"]
)
def test_what_is_written_is_read_again(write, name):
    tasks = ["--classes_per_task", "null", "--tasks", f"[[{name!r}, 5], [b]]"]
    config = parse_config(["--config", DIGITS, "--adam_epsilon", "1e-9", "--output_dir", name, *tasks])
    assert config.output_dir == name and config.tasks == [[name, 5], ["b"]]
    assert parse_config(["--config", write("config.yaml", to_yaml(config))]) == config
    # By any reader of YAML.
    assert yaml.safe_load(to_yaml(config))["tasks"] == config.tasks


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("generated_classifier_images: 1", ["generated_classifier_images", "1", "2 images and more"]),
        ("learning_rat: 1", ["learning_rat", "'learning_rate'"]),
        ("seed: abc", ["seed", "abc"]),
        ("seed: 1.5", ["seed", "1.5"]),
        ("seed: -1", ["seed", "-1", "from 0"]),
        ("seed: 1e3", ["seed", "1000.0", "whole number"]),
        ("seed: true", ["seed", "True", "whole number"]),
        ("seed: '5'", ["seed", "'5'", "whole number"]),
        ("learning_rate: '1e-4'", ["learning_rate", "'1e-4'", "number"]),
        ("learning_rate: null", ["learning_rate", "None", "number"]),
        ("output_dir: 5", ["output_dir", "5", "text", "quotes"]),
        ("output_dir: ''", ["output_dir", "''", "not empty"]),
        ("use_ema: 3", ["use_ema", "3"]),
        ("mixed_precision: fp8", ["mixed_precision", "'fp8'", "'fp16', 'bf16' or null"]),
        ("max_train_steps: ['5']", ["max_train_steps", "['5']", "whole number or [whole number, ...] or null"]),
        ("use_ema: yes", ["use_ema", "'yes'", "true or false"]),
        ("eval_num_inference_steps: 1001", ["eval_num_inference_steps", "1001", "1000"]),
        ("ddp_timeout: 100000000000000", ["ddp_timeout", "604800"]),
        ("logging_dir: ../logs", ["logging_dir", "inside output_dir"]),
        ("class_order: []", ["class_order", "[]", "seed"]),
        ("{seed: 1, seed: 2}", ["line 1", "'seed'", "once"]),
        ("penalty: l3", ["penalty", "l3", "rank1_ewc"]),
        ("replay: memories", ["replay", "memories", "generative_distillation"]),
        ("memory_bytes: 0", ["memory_bytes", "0"]),
        ("learning_rate: .nan", ["learning_rate", "nan"]),
        ("learning_rate: .inf", ["learning_rate", "inf"]),
        ("learning_rate: 0", ["learning_rate", "0", "positive"]),
        ("ewc_lambda: .nan", ["ewc_lambda", "nan"]),
        ("ewc_lambda: -1", ["ewc_lambda", "-1", "auto"]),
        ("ewc_lambda: strong", ["ewc_lambda", "strong", "10xauto"]),
        ("ewc_lambda: 0xauto", ["ewc_lambda", "0xauto", "10xauto"]),
        ("ewc_lambda: xauto", ["ewc_lambda", "xauto"]),
        ("ewc_lambda: 10auto", ["ewc_lambda", "10auto"]),
        ("ewc_lambda: 0x10", ["ewc_lambda", "'0x10'", "10xauto"]),
        ("ewc_lambda: [1, 2]", ["ewc_lambda", "1, 2"]),
        ("train_batch_size: 0", ["train_batch_size", "0"]),
        ("max_train_steps: []", ["max_train_steps", "[]"]),
        ("max_train_steps: 0", ["max_train_steps", "0"]),
        ("max_train_steps: [5, 0]", ["max_train_steps", "[5, 0]"]),
        ("eval_images_per_class: 0", ["eval_images_per_class", "0", "1"]),
        ("adam_beta2: 1.0", ["adam_beta2", "1.0"]),
        ("fisher_timesteps: [0, 1001]", ["fisher_timesteps", "1001", "1000"]),
        ("fisher_timesteps: [500, 500]", ["fisher_timesteps", "500"]),
        ("fisher_timesteps: [5]", ["fisher_timesteps", "[5]"]),
        ("checkpoints_total_limit: 0", ["checkpoints_total_limit", "0"]),
        ("dataset_name: null", ["dataset_name", "train_data_dir"]),
        ("train_data_dir: images", ["dataset_name", "train_data_dir", "images"]),
        ("classes_per_task: null", ["tasks", "classes_per_task"]),
        ("tasks: [[0], [1]]", ["tasks", "classes_per_task"]),
        ("{tasks: [[0], [1]], classes_per_task: null, class_order: 3}", ["class_order", "3"]),
        ("{tasks: [], classes_per_task: null}", ["tasks", "[]"]),
        ("{tasks: [[0], []], classes_per_task: null}", ["tasks", "[]"]),
        ("{tasks: [[0, 1], [1]], classes_per_task: null}", ["tasks", "'1'"]),
        ("{tasks: [[cat], [dog, cat]], classes_per_task: null}", ["tasks", "'cat'"]),
        ("stream: joint", ["replay", "generative_distillation", "joint"]),
        ("{stream: cumulative, replay: none, penalty: rank1_ewc}", ["penalty", "rank1_ewc", "cumulative"]),
        ("feature_extractor_weights_path: a.pth", ["feature_extractor", "classifier", "inception"]),
        ("- seed", ["mapping", "list"]),
        ("seed: [", ["bad.yaml"]),
        ("", ["bad.yaml"]),
    ],
)
def test_refused(write, line, words):
    with pytest.raises(ConfigError) as error:
        parse_config(["--config", DIGITS, "--config", write("bad.yaml", line + "\n")])
    message = str(error.value)
    assert [word for word in words if word not in message] == [] and len(message.splitlines()) <= 3


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["--learning_rat", "1"], ["learning_rat", "learning_rate"]),
        (["--learning_rat=1"], ["learning_rat", "learning_rate"]),
        (["--learning", "1"], ["'learning'", "learning_rate"]),
        (["--learning-rate", "1"], ["'learning-rate'", "'learning_rate'"]),
        (["--use_ema", "--no-debug"], ["no-debug", "debug"]),
        (["--debug", "yes"], ["debug", "yes", "true or false"]),
        (["--tasks", "[[0,"], ["tasks", "'[[0,'"]),
        (["--seed"], ["seed"]),
        (["--seed", "--use_ema"], ["seed"]),
        (["--config"], ["config"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml"]),
        (["configs/ewc.yaml"], ["configs/ewc.yaml"]),
        (["--seed", "x"], ["seed", "x"]),
    ],
)
def test_refused_on_the_command_line(command, words):
    with pytest.raises(ConfigError) as error:
        parse_config(["--config", DIGITS, *command])
    message = str(error.value)
    assert [word for word in words if word not in message] == [] and len(message.splitlines()) <= 3


@pytest.mark.parametrize("path", PRESETS + METHODS, ids=lambda path: path.stem)
def test_every_file_parses_and_has_known_keys(path):
    content = yaml.safe_load(path.read_text())
    assert content.keys() <= set(KEYS)
    config = parse_config(["--config", DIGITS, "--config", str(path)])
    if path in PRESETS:
        # A preset is whole: it needs no other file.
        config = parse_config(["--config", str(path)])
    # YAML 1.1 reads 1e-3 as a string.
    assert {key: getattr(config, key) for key in content} == {
        key: float(value) if isinstance(value, str) and re.fullmatch(r"\d+e-\d+", value) else value
        for key, value in content.items()
    }


@pytest.mark.parametrize("preset", PRESETS, ids=lambda path: path.stem)
def test_a_method_decides_stream_replay_and_penalty(preset):
    for method in METHODS:
        expected = yaml.safe_load(method.read_text())
        assert {"stream", "replay", "penalty"} <= expected.keys()
        config = parse_config(["--config", str(preset), "--config", str(method)])
        assert {key: getattr(config, key) for key in expected} == expected


def test_every_key_has_a_help_text(capsys):
    (definition,) = ast.parse(inspect.getsource(TrainingConfig)).body
    documented = [
        statement.target.id
        for statement, after in zip(definition.body, definition.body[1:], strict=False)
        if isinstance(statement, ast.AnnAssign) and isinstance(after, ast.Expr) and len(after.value.value) > 10
    ]
    assert documented == KEYS
    with pytest.raises(SystemExit) as end:
        parse_config(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert end.value.code == 0
    assert [key for key in KEYS if f"--{key}" not in text] == [] and "+" not in text
    # The parser finds the texts: they are not only in the source.
    assert "Peak learning rate" in text and "Rows of the class embedding" in text


def test_every_key_is_read():
    files = [ROOT / "train_continual.py", *Path(diffusers_cl.__file__).parent.glob("*.py")]
    source = "\n".join(file.read_text() for file in files if file != Path(config_module.__file__))
    # max_train_steps is read through num_steps_for_task.
    unread = [key for key in KEYS if not re.search(rf"\bconfig\.{key}\b|getattr\(config, \"{key}\"", source)]
    assert unread == []
    assert set(OPERATIONAL_KEYS) <= set(KEYS)


@pytest.mark.parametrize("overlay", EXPERIMENTS, ids=[path.stem for path in EXPERIMENTS])
def test_experiments_lie_over_the_digits(overlay):
    config = parse_config(["--config", DIGITS, "--config", str(overlay)])
    expected = yaml.safe_load(overlay.read_text())
    assert {key: getattr(config, key) for key in expected} == expected


def test_a_token_is_never_written():
    config = parse_config(
        ["--dataset_name", "digits", "--classes_per_task", "2", "--push_to_hub", "--hub_token", "hf_x"]
    )
    assert config.hub_token == "hf_x" and config.push_to_hub
    assert "hf_x" not in to_yaml(config) and "hub_token" not in to_yaml(config)
