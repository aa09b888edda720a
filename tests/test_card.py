"""The model card: its metadata and its numbers."""

import dataclasses
import json
import re

from diffusers import DDIMScheduler, DDPMScheduler, PNDMScheduler
from huggingface_hub import ModelCard
from pipeline_helpers import tiny_unet
from test_report import FINETUNE_0, JOINT, RANK1, RANK1_CONFIG, TASKS, make_run, row_of

from diffusers_cl.card import is_hub_id, model_card
from diffusers_cl.config import TrainingConfig
from diffusers_cl.pipeline import ClassConditionalPipeline
from diffusers_cl.plots import format_number
from diffusers_cl.report import key_table


REPO = "me/digits-task-02"


def parts(folder, distance=RANK1, tasks=TASKS, **config) -> tuple:
    """What a card is made of, after the last task in a run's metrics: pipeline, state, metrics, configuration."""
    metrics = json.loads((make_run(folder / "run", distance, tasks, **config) / "metrics.json").read_text())
    num_tasks = len(metrics["num_images"][-1])
    names = dict.fromkeys(name for task in tasks[:num_tasks] for name in task)
    class_ids = {name: class_id for class_id, name in enumerate(names)}
    unet = tiny_unet(num_class_embeds=len(class_ids))
    pipeline = ClassConditionalPipeline(unet, DDIMScheduler(), {i: name for name, i in class_ids.items()})
    state = {"task": len(distance["matrix"]) - 1, "tasks": tasks, "class_ids": class_ids, "dataset": "digits"}
    state |= {"fisher": metrics["fisher"], "lineage": {"previous": None}}
    known = {field.name for field in dataclasses.fields(TrainingConfig)}
    config = TrainingConfig(**{key: value for key, value in metrics["config"].items() if key in known})
    return pipeline, state, metrics, config


def table_after(card: str, start: str) -> list[list[str]]:
    """The cells of the table whose head starts so, without the line below the head."""
    lines = card[card.index(f"\n| {start} |") + 1 :].split("\n\n")[0].splitlines()
    return [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines if not line.startswith("|---")]


def section(card: str, title: str) -> str:
    return card.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def complaints(metadata: dict) -> list[str]:
    """What the Hub requires of a card's metadata (hub-docs, modelcard.md), as far as this card has it."""
    found = []

    def require(condition: bool, what: str) -> None:
        found.extend([] if condition else [what])

    def texts(entry, path: str = "") -> None:
        if isinstance(entry, dict):
            for key, value in entry.items():
                texts(value, f"{path}.{key}")
        elif isinstance(entry, list):
            for value in entry:
                texts(value, path)
        else:
            good = isinstance(entry, (int, float)) if path.endswith(".value") else re.fullmatch(".+", entry)
            require(bool(good), f"{path} is {entry!r}")

    texts(metadata)
    require(metadata.keys() >= {"license", "library_name", "pipeline_tag", "tags"}, "a field is missing")
    for model in metadata.get("model-index", []):
        require(bool(model["name"]) and bool(model["results"]), "model-index is empty")
        for result in model["results"]:
            require(result["task"].keys() >= {"type"}, "task.type is missing")
            require(bool(result["dataset"]["name"]), "dataset.name is missing")
            require(bool(re.fullmatch(r"(?:[\w-]+/)?[\w.-]+", result["dataset"]["type"], re.ASCII)), "dataset.type")
            require(all(metric.keys() >= {"type", "value"} for metric in result["metrics"]), "metrics")
    return found


def test_metadata(tmp_path):
    card = model_card(*parts(tmp_path, **RANK1_CONFIG), REPO)
    loaded = ModelCard(card)
    # As the Hub's client writes it back.
    assert str(loaded) == card
    task = {"type": "unconditional-image-generation"}
    values = [
        {"type": "fd_classifier", "value": 2.2, "name": "fd_classifier, average over the tasks"},
        {"type": "fd_classifier", "value": 1.1 / 3, "name": "fd_classifier, forgetting"},
        {"type": "accuracy", "value": 1 - 2.2 / 10, "name": "accuracy, average over the tasks"},
    ]
    result = {"task": task, "dataset": {"name": "digits", "type": "digits"}, "metrics": values}
    assert loaded.data.to_dict() == {
        "license": "apache-2.0",
        "library_name": "diffusers",
        "pipeline_tag": "unconditional-image-generation",
        "tags": ["diffusers-cl", "continual-learning", "class-conditional"],
        "model-index": [{"name": "digits-task-02", "results": [result]}],
    }
    assert not complaints(loaded.data.to_dict())


def test_metadata_of_a_dataset_on_the_hub(tmp_path):
    source = {"dataset_name": "uoft-cs/cifar10", "dataset_config_name": "1.0", "eval_split": "test", "license": "mit"}
    pipeline, state, metrics, config = parts(tmp_path, **source)
    state["dataset"] = "uoft-cs/cifar10"
    state["lineage"] = {"previous": {"model": "me/cifar10-task-01", "revision": "0123abcd"}}
    card = model_card(pipeline, state, metrics, config)
    metadata = ModelCard(card).data.to_dict()
    assert metadata["datasets"] == ["uoft-cs/cifar10"] and metadata["license"] == "mit"
    assert metadata["base_model"] == "me/cifar10-task-01"
    (model,) = metadata["model-index"]
    assert model["name"] == "cifar10-task-02"
    dataset = {"name": "uoft-cs/cifar10", "type": "uoft-cs/cifar10", "config": "1.0", "split": "test"}
    assert model["results"][0]["dataset"] == dataset
    assert not complaints(metadata)
    assert "It goes on from `me/cifar10-task-01` (revision `0123abcd`)." in card


def test_only_ids_of_the_hub_are_named_to_it(tmp_path, monkeypatch):
    (tmp_path / "data" / "birds").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    names = ["me/x-task-03", "task-03", "data/birds", "a/b/c", "../task-03", "/x", "me/x\n", "me/<b>", "", None]
    assert [name for name in names if is_hub_id(name)] == ["me/x-task-03"]
    pipeline, state, metrics, config = parts(tmp_path, dataset_name="data/birds")
    state |= {"dataset": "birds of 'mine'", "lineage": {"previous": {"model": "task-01", "revision": None}}}
    card = model_card(pipeline, state, metrics, config)
    metadata = ModelCard(card).data.to_dict()
    assert "base_model" not in metadata and "datasets" not in metadata
    assert metadata["model-index"][0]["results"][0]["dataset"] == {
        "name": "birds of -mine-",
        "type": "birds-of--mine-",
    }
    assert not complaints(metadata) and "It goes on from `task-01`." in card


def test_matrix_is_that_of_the_metrics(tmp_path):
    pipeline, state, metrics, config = parts(tmp_path, FINETUNE_0)
    card = model_card(pipeline, state, metrics, config, REPO)
    head, *rows, forgetting, floor = table_after(card, "model")
    assert head == ["model", "task-00", "task-01", "task-02", "average"]
    values = metrics["metrics"]["fd_classifier"]
    for task, (row, expected) in enumerate(zip(rows, values["matrix"], strict=True)):
        shown = [format_number(value) for value in expected] + [""] * (2 - task)
        assert row == [f"after task-{task:02d}", *shown, format_number(values["average"][task])]
    assert forgetting == ["**forgetting**", "+4.00", "+2.00", "+0.00", "**+2.00**"]
    assert floor == ["floor (real against real)", "0.400", "0.500", "0.600", "0.500 \u00b1 0.250"]
    assert "\n".join(key_table(metrics)) in section(card, "Results")
    assert "it has forgotten (fd_classifier of its tasks +2.00 on average" in section(card, "Limits")


def test_card_in_the_middle_of_a_stream(tmp_path):
    distance = {
        "matrix": [[1.0], [1.1, 2.0]],
        "average": [1.0, 1.55],
        "learning": 1.5,
        "forgetting": 0.05,
        "worst": 2.0,
    }
    card = model_card(*parts(tmp_path, distance), REPO)
    assert "# digits: 4 classes in 2 tasks\n" in card
    assert "- task-00: `0` (0), `1` (1)\n- task-01: `2` (2), `3` (3)\n\n" in card
    assert [row[0] for row in table_after(card, "model")][1:3] == ["after task-00", "after task-01"]
    limits = section(card, "Limits")
    assert "nor the classes of the 1 task still to come" in limits
    assert "none is shown (fd_classifier of its tasks +0.05 on average since each was learned, within" in limits
    assert "72 images in the smallest task." in limits and "gone on from" not in limits


def test_card_of_a_joint_run(tmp_path):
    card = model_card(*parts(tmp_path, JOINT, stream="joint"), REPO)
    assert table_after(card, "model")[1] == ["all tasks at once", "1.00", "2.00", "1.50", "1.50"]
    assert "forgetting**" not in card and "nothing to forget yet" in card
    assert "- task-02: `4` (4), `5` (5)" in card and "It learned them all at once" in card
    (result,) = ModelCard(card).data.to_dict()["model-index"][0]["results"]
    assert [metric["value"] for metric in result["metrics"]] == [1.5, 1 - 1.5 / 10]


def test_what_could_not_be_measured_is_not_available(tmp_path):
    pipeline, state, metrics, config = parts(tmp_path)
    unknown = {"average": [None, None, None], "learning": None, "forgetting": None, "worst": None}
    for name in ("recall", "accuracy"):
        metrics["metrics"][name] = {"matrix": [[None], [None, 0.5], [None, None, 0.5]], **unknown}
    metrics["num_images"][-1] = [72, 40, 72]
    card = model_card(pipeline, state, metrics, config, REPO)
    assert row_of(card, "recall (higher is better)")[1:5] == ["n/a"] * 4
    limits = section(card, "Limits")
    assert "The real images of task-00, task-01 were not there" in limits
    assert "40 images in the smallest task, which is few" in limits
    assert {result.metric_type for result in ModelCard(card).data.eval_results} == {"fd_classifier"}

    metrics["metrics"]["fd_classifier"] = {"matrix": [[None], [None, 2.0], [3.0, None, 2.5]], **unknown}
    card = model_card(pipeline, state, metrics, config, REPO)
    rows = table_after(card, "model")
    assert rows[3] == ["after task-02", "3.00", "n/a", "2.50", "n/a"]
    assert rows[4] == ["**forgetting**", "n/a", "n/a", "+0.00", "**n/a**"]
    metadata = ModelCard(card).data.to_dict()
    assert "model-index" not in metadata and "model_name" not in metadata and not complaints(metadata)
    assert "Forgetting: not known." in card


def test_settings_are_those_that_the_run_read(tmp_path):
    settings = {**RANK1_CONFIG, "ewc_lambda": "10xauto", "max_train_steps": [700, 500], "memory_images_per_class": 3}
    card = model_card(*parts(tmp_path, **settings, seed=7, mixed_precision="bf16"), REPO)
    method = section(card, "Method")
    assert "**rank-1 EWC + distillation (loss, 10xauto)**" in method
    shown = dict(table_after(card, "setting")[1:])
    expected = {"penalty": "rank1_ewc", "penalty_mode": "loss", "ewc_lambda": "10xauto", "seed": "7"}
    expected |= {"replay": "generative_distillation", "max_train_steps": "[700, 500]", "use_ema": "false"}
    expected |= {
        "stream": "sequential",
        "train_batch_size": "128",
        "learning_rate": "0.0002",
        "mixed_precision": "bf16",
    }
    assert shown.items() >= expected.items()
    unread = {"num_train_epochs", "memory_images_per_class", "ema_max_decay", "lr_warmup_steps", "fisher_rank"}
    assert not shown.keys() & unread
    finetune = dict(table_after(model_card(*parts(tmp_path / "2"), REPO), "setting")[1:])
    assert (
        "penalty_mode" not in finetune and "replay_refresh" not in finetune and finetune["num_train_epochs"] == "200"
    )


def test_fisher_diagnostics_have_a_line_each(tmp_path):
    pipeline, state, metrics, config = parts(tmp_path, **RANK1_CONFIG)
    several = {"num_samples": 8.0, "second_moment": [0.5, 0.25], "curvature": [None, 2.0]}
    # Of a task that came from a model without a penalty there is nothing.
    state["fisher"] = [None, state["fisher"][1], several]
    lines = section(model_card(pipeline, state, metrics, config, REPO), "Fisher diagnostics").strip().splitlines()
    assert lines[2:] == [
        "- task-01: gradients 144; signal ratio 10.0; second moment 0.500; its share of the trace 0.125; measured "
        "curvature 50.0",
        "- task-02: gradients 8; second moment 0.500, 0.250; measured curvature 2.00",
    ]
    for nothing in (None, [None, None, None]):
        assert "Fisher" not in model_card(pipeline, state | {"fisher": nothing}, metrics, config, REPO)


def test_nothing_of_the_machine_and_no_token(tmp_path):
    (tmp_path / "extractor").mkdir()
    pipeline, state, metrics, config = parts(tmp_path, train_data_dir=str(tmp_path / "birds"), dataset_name=None)
    metrics["feature_extractor"] = str(tmp_path / "extractor")
    config.hub_token, config.output_dir = "hf_secret", str(tmp_path)
    state["lineage"] = {"previous": {"model": str(tmp_path / "run" / "task-01"), "revision": None}}
    card = model_card(pipeline, state, metrics, config)
    assert str(tmp_path) not in card and "hf_secret" not in card
    assert "features: extractor." in card and "It goes on from `task-01`." in card


def test_the_route_without_trust_is_shown_where_there_is_one(tmp_path):
    pipeline, *rest = parts(tmp_path)
    for scheduler, num_blocks in ((DDPMScheduler(), 3), (PNDMScheduler(), 2)):
        other = ClassConditionalPipeline(pipeline.unet, scheduler, pipeline.known_classes)
        card = model_card(other, *rest, REPO)
        # Its step takes no generator, which the pipeline of diffusers passes.
        assert card.count("```python") == num_blocks
        assert (f"{type(scheduler).__name__}.from_pretrained(repo" in card) == (num_blocks == 3)
        assert ("All three draw the same image." in card) == (num_blocks == 3)


def test_without_a_repo_the_folder_is_named(tmp_path):
    card = model_card(*parts(tmp_path))
    assert card.count('"path/to/this/folder"') == card.count("# the folder that this file is in") == 3
    assert "--pretrained_model_name_or_path path/to/this/folder " in card


def test_real_images_that_are_kept_are_told_of(tmp_path):
    card = model_card(*parts(tmp_path, replay="memory"), REPO)
    assert "`consolidation/memory.safetensors` holds real training images." in card
    assert "but for a few real images of every class that are kept" in card
