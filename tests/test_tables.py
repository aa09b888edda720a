"""What is one method, what may stand in one table, and the table's cells, on numbers small enough to check by hand."""

import dataclasses
import json

import pytest
from test_report import FINETUNE_0, FINETUNE_1, JOINT, RANK1, RANK1_CONFIG, ROOT, TASKS, make_run, row_of

from diffusers_cl.comparison import compare, published_values, stored_bytes
from diffusers_cl.config import OPERATIONAL_KEYS, TrainingConfig
from diffusers_cl.results import (
    check_comparable,
    effective_config,
    group_runs,
    join_result,
    load_run,
    method_config,
    portable_config,
    portable_name,
)
from diffusers_cl.tables import escape_latex, format_bytes, render_latex, render_markdown, to_markdown


GD = {"replay": "generative_distillation"}
PAPER = {"dataset_name": "ylecun/mnist", "classes_per_task": 2, "tasks": None}


def effective(**changes) -> dict:
    return effective_config(dataclasses.asdict(TrainingConfig(**changes)))


@pytest.mark.parametrize(
    ("changes", "other"),
    [
        ({}, {"ewc_lambda": 1.0, "penalty_mode": "decoupled", "fisher_samples": 3, "fisher_diagnostics": False}),
        ({}, {"replay_weighting": "by_task", "distillation_weight": 2.0, "replay_images_per_class": 3}),
        ({}, {"memory_images_per_class": 3, "memory_bytes": 1000}),
        ({}, {"ema_max_decay": 0.5, "lr_warmup_steps": 7, "checkpointing_steps": 3, "output_dir": "elsewhere"}),
        ({"max_train_steps": 9}, {"max_train_steps": 9, "num_train_epochs": 3}),
        (
            {**GD, "replay_weighting": "by_task"},
            {**GD, "replay_weighting": "by_task", "distillation_weight": 2.0, "memory_images_per_class": 3},
        ),
        ({"replay": "lwf"}, {"replay": "lwf", "replay_images_per_class": 3, "replay_refresh": "once"}),
        (
            {"replay": "memory", "memory_bytes": 1000},
            {"replay": "memory", "memory_bytes": 1000, "memory_images_per_class": 3, "replay_batch_size": 3},
        ),
        ({"penalty": "l2"}, {"penalty": "l2", "fisher_samples": 3}),
        ({"penalty": "ewc"}, {"penalty": "ewc", "fisher_rank": 3}),
    ],
)
def test_keys_that_nothing_reads_make_no_other_method(changes, other):
    assert effective(**changes) == effective(**other)


@pytest.mark.parametrize(
    ("changes", "other"),
    [
        ({"penalty": "ewc"}, {"penalty": "ewc", "ewc_lambda": 1.0}),
        ({"penalty": "rank1_ewc"}, {"penalty": "rank1_ewc", "fisher_samples": 3}),
        ({"penalty": "rank1_ewc"}, {"penalty": "rank1_ewc", "penalty_mode": "decoupled"}),
        ({"penalty": "lowrank_ewc"}, {"penalty": "lowrank_ewc", "fisher_rank": 3}),
        ({"penalty": "l2", "ewc_lambda": "auto"}, {"penalty": "l2", "ewc_lambda": "auto", "fisher_samples": 3}),
        (GD, {**GD, "distillation_weight": 2.0}),
        (GD, {**GD, "replay_images_per_class": 3}),
        ({"replay": "lwf"}, {"replay": "lwf", "distillation_weight": 2.0}),
        ({"replay": "memory"}, {"replay": "memory", "memory_images_per_class": 3}),
        ({"use_ema": True}, {"use_ema": True, "ema_max_decay": 0.5}),
        ({"lr_scheduler": "cosine"}, {"lr_scheduler": "cosine", "lr_warmup_steps": 7}),
        ({}, {"num_train_epochs": 3}),
        ({}, {"learning_rate": 1.0}),
    ],
)
def test_keys_that_are_read_make_another_method(changes, other):
    assert effective(**changes) != effective(**other)


def test_a_result_of_an_older_version_has_the_defaults_of_keys_that_it_lacks():
    config = dataclasses.asdict(TrainingConfig(replay="memory"))
    older = {key: value for key, value in config.items() if key != "memory_images_per_class"}
    assert effective_config(older) == effective_config(config)
    assert not effective_config(config).keys() & set(OPERATIONAL_KEYS)


def test_unused_keys_seeds_and_class_orders_stay_in_one_row(tmp_path):
    order = [["4", "5"], ["0", "1"], ["2", "3"]]
    runs = [
        make_run(tmp_path / "a", FINETUNE_0, ewc_lambda=1.0),
        make_run(tmp_path / "b", FINETUNE_1, seed=1, num_threads=2, license="mit"),
        make_run(tmp_path / "c", FINETUNE_1, tasks=order),
    ]
    # class_order needs classes_per_task in a real run; here it only says that the tasks may differ.
    text = (runs[2] / "metrics.json").read_text().replace('"class_order": null', '"class_order": 1')
    for path, content in ((runs[0], (runs[0] / "metrics.json").read_text()), (runs[2], text)):
        (path / "metrics.json").write_text(content)
    for path in runs:
        metrics = json.loads((path / "metrics.json").read_text())
        metrics["config"]["tasks"] = None
        (path / "metrics.json").write_text(json.dumps(metrics))
    loaded = [load_run(path) for path in runs]
    check_comparable(loaded, "fd_classifier")
    assert {name: len(group) for name, group in group_runs(loaded).items()} == {"fine-tuning": 3}
    table = render_markdown(compare(loaded), per_task=True)
    assert row_of(table[: table.index("\n\n")], "fine-tuning")[1:3] == ["0, 1 x 2 orders (n=3)", "5.33 \u00b1 0.67"]
    # A class that the others do not have is no other order.
    metrics = json.loads((runs[2] / "metrics.json").read_text())
    metrics["tasks"][0][0] = "9"
    (runs[2] / "metrics.json").write_text(json.dumps(metrics))
    with pytest.raises(ValueError, match="classes is "):
        compare([load_run(path) for path in runs])


def test_the_network_counts_by_its_content(tmp_path):
    config = dataclasses.asdict(TrainingConfig(model_config_name_or_path="a.json"))
    first, second = {"block_out_channels": [8], "_class_name": "UNet2DModel"}, {"block_out_channels": [16]}
    other_path = config | {"model_config_name_or_path": "b.json"}
    assert method_config(config, first) == method_config(other_path, {"block_out_channels": [8]})
    assert method_config(config, first) != method_config(config, second)
    network = tmp_path / "net.json"
    network.write_text(json.dumps(first))
    run = load_run(make_run(tmp_path / "run", FINETUNE_0, model_config_name_or_path=str(network)))
    result = join_result(run, None)
    assert result["model_config"] == first and str(tmp_path) not in json.dumps(result)
    # The saved file needs the network's no more.
    (tmp_path / "saved.json").write_text(json.dumps(result))
    network.unlink()
    assert load_run(tmp_path / "saved.json").method == run.method


def test_paths_of_this_machine_stay_here(tmp_path):
    folder = tmp_path / "data" / "mnist"
    folder.mkdir(parents=True)
    config = dataclasses.asdict(TrainingConfig(dataset_name=str(folder), feature_extractor=str(tmp_path / "resnet")))
    assert portable_config(config)["dataset_name"] == "mnist"
    assert portable_config(config)["feature_extractor"] == "resnet"
    assert portable_config(config | {"dataset_name": "ylecun/mnist"})["dataset_name"] == "ylecun/mnist"
    assert portable_name(str(ROOT / "configs" / "digits.yaml")) == "configs/digits.yaml"
    assert [portable_name(text) for text in ("[[0, 1]]", "--seed", "a/b")] == ["[[0, 1]]", "--seed", "a/b"]


def test_pairs_have_one_seed_and_one_order(tmp_path):
    # Averages: distillation 4 (seed 0) and 6 (seed 1), rank-1 2.2 (seed 0), 6 (seed 1), 4 (seed 2).
    paths = [
        make_run(tmp_path / "gd0", FINETUNE_0, **GD),
        make_run(tmp_path / "gd1", FINETUNE_1, seed=1, **GD),
        make_run(tmp_path / "rank0", RANK1, **RANK1_CONFIG),
        make_run(tmp_path / "rank1", FINETUNE_1, seed=1, **RANK1_CONFIG),
        make_run(tmp_path / "rank2", FINETUNE_0, seed=2, **RANK1_CONFIG),
        make_run(tmp_path / "joint", JOINT, seed=5, stream="joint"),
    ]
    runs = [load_run(path) for path in paths]
    table = render_markdown(compare(runs))
    column = row_of(table, "method").index("average - distillation's")
    # Differences -1.8 and 0: mean -0.9, standard error (1.8 / sqrt(2)) / sqrt(2).
    assert row_of(table, "rank-1 EWC + distillation (loss, 15000)")[column] == "-0.90 \u00b1 0.90 (n=2)"
    assert row_of(table, "distillation")[column] == "" and row_of(table, "joint")[column] == "n/a"
    assert "over the n pairs of equal seed." in table
    runs[0].metrics["config"]["class_order"] = 3
    assert compare([runs[0], *runs[2:5]])["rows"][0]["paired"] is None
    assert "distillation's" not in render_markdown(compare(runs[2:]))


def test_stored_bytes_are_those_of_the_run_or_exactly_none(tmp_path):
    def stored(config: dict, **machine) -> int | None:
        run = load_run(make_run(tmp_path / f"{len(list(tmp_path.iterdir()))}", FINETUNE_0, **config))
        run.machine |= machine
        return stored_bytes(run)

    assert stored({}) == 0 and stored(GD) == 0
    assert stored(RANK1_CONFIG) is None and stored({**GD, "replay_refresh": "once"}) is None
    assert stored({"replay": "memory"}) is None
    assert stored(RANK1_CONFIG, stored_bytes={"penalty": 40, "memory": 2, "replay": 0}) == 42
    assert stored({"stream": "joint"}, stored_bytes={"penalty": 0, "memory": 0, "replay": 0}) is None
    numbers = (None, 0, 999, 1000, 1536, 37_200_000, 148_800_000, 2_500_000_000)
    assert list(map(format_bytes, numbers)) == (
        ["n/a", "0 B", "999 B", "1.00 kB", "1.54 kB", "37.2 MB", "148.8 MB", "2.50 GB"]
    )


def test_published_values_stand_only_beside_the_papers_setting(tmp_path):
    published = json.loads((ROOT / "results" / "published.json").read_text())
    paths = [
        make_run(tmp_path / "gd", FINETUNE_0, extractor="inception", **GD),
        make_run(tmp_path / "joint", JOINT, extractor="inception", stream="joint"),
        make_run(tmp_path / "none", FINETUNE_1, extractor="inception"),
    ]
    runs = [load_run(path) for path in paths]
    for run in runs:
        run.metrics["config"] |= PAPER
        run.metrics["num_images"][-1] = [4000, 4000, 2000]
    table = render_markdown(compare(runs, published=published))
    column = row_of(table, "method").index("published")
    assert row_of(table, "distillation")[column] == "10.1 / 2.3" and row_of(table, "joint")[column] == "2.6 / n/a"
    assert row_of(table, "fine-tuning")[column] == "" and "arXiv 2509.23593, Table 1" in table

    def shown(change) -> bool:
        copies = [dataclasses.replace(run, metrics=json.loads(json.dumps(run.metrics))) for run in runs]
        for run in copies:
            change(run)
        return "published" in render_markdown(compare(copies, published=published)).splitlines()[0]

    assert shown(lambda run: None) and shown(lambda run: run.config.update(dataset_name="mnist"))
    assert not shown(lambda run: setattr(run, "scale", 0.1))
    assert not shown(lambda run: run.metrics["num_images"].__setitem__(-1, [72, 72, 72]))
    for key, value in [
        ("dataset_name", "digits"),
        ("dataset_name", "cifar10"),
        ("resolution", 16),
        ("feature_extractor", "classifier"),
        ("num_train_epochs", 20),
        ("max_train_steps", 20),
        ("max_train_samples", 6000),
        ("classes_per_task", 5),
    ]:
        assert not shown(lambda run, change={key: value}: run.config.update(change)), key
    assert published_values("distillation", runs[:1], "kid", published) is None
    # What a method does not read cannot keep its published value away.
    runs[2].metrics["config"] |= {"penalty": "ewc", "replay_images_per_class": 3}
    assert published_values("diagonal EWC (loss, 15000)", runs[2:], "fid", published) == [62.2, 51.1]


def test_published_values_are_those_of_the_methods_file():
    # Beside the checkout on development machines only, so copied: the paper's Table 1, average FID.
    averages = {
        "joint": [2.6, 5.7, 23.3, 11.7],
        "diagonal EWC (loss, 15000)": [62.2, 99.9, 128.6, 86.1],
        "rank-1 EWC (loss, 15000)": [65.2, 96.9, 120.0, 74.3],
        "distillation": [10.1, 19.1, 61.2, 69.0],
        "diagonal EWC + distillation (loss, 15000)": [14.3, 27.7, 72.6, 73.8],
        "rank-1 EWC + distillation (loss, 15000)": [7.6, 15.4, 50.5, 48.5],
    }
    tables = json.loads((ROOT / "results" / "published.json").read_text())["tables"]
    found = {name: [table["average_and_forgetting"][name][0] for table in tables] for name in averages}
    assert found == averages


def test_scaled_results_say_so(tmp_path):
    run = load_run(make_run(tmp_path / "a", FINETUNE_0))
    assert "caled" not in render_markdown(compare([run]))
    run.scale = 0.1
    assert "**Scaled by 0.1**" in render_markdown(compare([run]))
    assert r"\textbf{Scaled by 0.1} (\texttt{reproduce.py --scale})" in render_latex(compare([run]))


def test_runs_of_two_classifiers_are_marked(tmp_path):
    runs = [load_run(make_run(tmp_path / "a", FINETUNE_0)), load_run(make_run(tmp_path / "b", RANK1, **RANK1_CONFIG))]
    for run, digest in zip(runs, ("0e0484f1c5", "d1147b531b"), strict=True):
        run.metrics["feature_extractor_info"] = {"name": "classifier", "sha256": digest}
    assert "2 feature extractors (sha256 0e0484f1, d1147b53)" in render_markdown(compare(runs))
    assert "feature extractors" not in render_markdown(compare(runs[:1]))


def test_latex_escapes():
    assert escape_latex("a_b & 5% #1 {x} $y$") == r"a\_b \& 5\% \#1 \{x\} \$y\$"
    assert escape_latex("a\\b~c^d") == r"a\textbackslash{}b\textasciitilde{}c\textasciicircum{}d"
    assert escape_latex("-0.06 \u00b1 0.01") == r"$-$0.06 $\pm$ 0.01"
    assert escape_latex("rank-1, 2509-1") == "rank-1, 2509-1"
    assert to_markdown([["a|b"], ["c"]]) == "| a\\|b |\n| --- |\n| c |\n"


def test_latex_table_has_the_cells_of_the_markdown_table(tmp_path):
    paths = [make_run(tmp_path / "a", FINETUNE_0), make_run(tmp_path / "b", FINETUNE_1, learning_rate=0.001, **GD)]
    table = compare([load_run(path) for path in paths])
    latex = render_latex(table)
    head = render_markdown(table).splitlines()[0].count("|") - 1
    rows = [line for line in latex.splitlines() if line.endswith(r" \\")]
    assert len(rows) == 4 and all(line.count(" & ") == head - 1 for line in rows)
    assert rf"\begin{{tabular}}{{ll{'r' * (head - 2)}}}" in latex and r"\texttt{fd\_classifier}" in latex
    assert latex.isascii() and latex.count("{") == latex.count("}")


def test_tasks_of_the_table_are_named(tmp_path):
    table = render_markdown(compare([load_run(make_run(tmp_path / "a", FINETUNE_0))]), per_task=True)
    assert f"task-00 ({', '.join(TASKS[0])})" in table
    assert row_of(table[table.index("at the end") :], "fine-tuning")[1:] == ["5.00", "4.00", "3.00"]
