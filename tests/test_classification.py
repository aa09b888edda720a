"""LA and AIA: classifiers that learn from generated images alone, in a run, in its report and in the comparison of runs."""

import contextlib
import json

import numpy as np
import pytest
import torch
from script_helpers import arguments, finished_run, interrupted_copy, run
from test_report import FINETUNE_0, FINETUNE_1, JOINT, make_run, row_of

from diffusers_cl.arguments import parse_config
from diffusers_cl.classification import Classification, create_network, predict, shift_and_flip, train_on
from diffusers_cl.comparison import compare
from diffusers_cl.data import cap_per_class, load_splits
from diffusers_cl.errors import NonFiniteError
from diffusers_cl.metrics import summarize_classification
from diffusers_cl.report import write_report
from diffusers_cl.results import Run, load_run
from diffusers_cl.tables import render_latex, render_markdown


CPU = torch.device("cpu")
GD = {"replay": "generative_distillation"}
TASKS, CLASS_IDS = [["0", "1"], ["2", "3"]], {"0": 0, "1": 1, "2": 2, "3": 3}


def row(generated: list, real: list | None = None) -> dict:
    """A metric row of a model with what its classifiers have."""
    found = {"images_per_class": 10, "network": "resnet8", "generated": generated, "real": real}
    return {"num_images": [4] * len(generated), "classification": found | {"real_images": real and [9, 10]}}


def test_averages_by_hand():
    # arXiv 2510.02631, Eq. 22: 0.5; (1 + 0.5) / 2; (0.9 + 0.6 + 0.3) / 3. Eq. 23: their mean, with the real 0.95 first.
    rows = [row([0.5], [0.95]), row([1.0, 0.5]), row([0.9, 0.6, 0.3], [1.0, 1.0, 0.7])]
    found = summarize_classification(rows)
    assert found["average_accuracy"] == pytest.approx([0.5, 0.75, 0.6]) and found["la"] == pytest.approx(0.6)
    assert found["aia"] == pytest.approx((0.95 + 0.75 + 0.6) / 3)
    assert found["aia_generated"] == pytest.approx((0.5 + 0.75 + 0.6) / 3)
    assert found["real"]["average_accuracy"] == [0.95, None, pytest.approx(0.9)]
    assert found["real"]["matrix"] == [[0.95], None, [1.0, 1.0, 0.7]] and found["real"]["images_per_class"] == [9, 10]
    assert found["matrix"] == [[0.5], [1.0, 0.5], [0.9, 0.6, 0.3]] and found["images_per_class"] == 10
    # Of an unfinished stream, up to now.
    assert summarize_classification(rows[:2])["aia"] == pytest.approx(0.85)


def test_averages_that_cannot_be_known():
    joint = summarize_classification([row([0.9, 0.7], [1.0, 1.0])])
    assert joint["la"] == pytest.approx(0.8) and joint["aia"] is joint["aia_generated"] is None
    # Gone on from a model that was not measured so, without its images.
    found = summarize_classification([{"num_images": [4]}, row([None, 0.5])])
    assert found["matrix"] == [[None], [None, 0.5]] and found["average_accuracy"] == [None, None]
    assert found["la"] is found["aia"] is found["aia_generated"] is found["real"]["images_per_class"] is None


def test_shifts_and_flips_are_slices_of_a_black_border():
    images = torch.randint(1, 256, (5, 3, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    shifts, flips = torch.tensor([[0, 1, 2, 4, 4], [2, 1, 2, 0, 4]]), torch.tensor([False, True, False, True, False])
    found = shift_and_flip(images, shifts, flips, padding=2)
    for image, down, right, flip, cut in zip(images, *shifts.tolist(), flips, found, strict=True):
        bordered = np.pad(image.numpy(), [(0, 0), (2, 2), (2, 2)])
        expected = bordered[:, down : down + 8, right : right + 8]
        assert (cut.numpy() == (expected[..., ::-1] if flip else expected)).all()
    assert found[2].equal(images[2]) and (found[0][:, :2] == 0).all()


def test_networks():
    # Known counts: ResNet-18 with the small stem and ten classes; ResNet-8 has 6 3x3 layers and two shortcuts.
    large = create_network(3, 10, 32)
    assert sum(parameter.numel() for parameter in large.parameters()) == 11_173_962
    features = torch.nn.Sequential(*list(large.children())[:-2])
    assert features(torch.zeros(2, 3, 32, 32)).shape == (2, 512, 4, 4)
    small = create_network(1, 10, 31)
    weights = [9 * a * b for a, b in ((1, 16), (16, 16), (16, 16), (16, 32), (32, 32), (32, 64), (64, 64))]
    norms = 2 * (3 * 16 + 3 * 32 + 3 * 64)
    assert sum(p.numel() for p in small.parameters()) == sum(weights) + 16 * 32 + 32 * 64 + norms + 64 * 10 + 10
    assert small(torch.zeros(2, 1, 8, 8)).shape == (2, 10)


@pytest.fixture(scope="module")
def splits(files, tmp_path_factory):
    settings = {"eval_images_per_class": 20, "generated_classifier_images": 3, "seed": 5}
    config = parse_config(arguments(files, tmp_path_factory.mktemp("run"), **settings))
    return config, *load_splits(config)


def test_digits_are_learned(splits):
    _, train, test = splits
    part = cap_per_class(train, train.names, 40)
    network = train_on(part.decode(range(400)), torch.from_numpy(part.labels), 10, 0, CPU, disable_progress_bar=True)
    found = predict(network, test.decode(range(len(test.labels))), CPU)
    assert (found.numpy() == test.labels).mean() > 0.9


def test_training_is_a_function_of_its_seed(splits):
    images = splits[1].decode(range(12))

    def weights(seed: int, **options) -> torch.Tensor:
        network = train_on(images, torch.arange(12) % 4, 4, seed, CPU, disable_progress_bar=True, **options)
        assert not network.training
        return torch.cat([parameter.flatten() for parameter in network.parameters()])

    torch.manual_seed(1)
    before, first = torch.get_rng_state(), weights(0)
    assert torch.get_rng_state().equal(before)
    torch.manual_seed(2)
    assert first.equal(weights(0)) and not first.equal(weights(1))
    assert not first.equal(weights(0, random_flip=True))


def test_a_loss_that_is_no_number_stops_the_run(splits, monkeypatch):
    monkeypatch.setattr("diffusers_cl.classification.MAX_LEARNING_RATE", 1e30)
    with pytest.raises(NonFiniteError, match="Training a classifier: the loss is nan"):
        train_on(splits[1].decode(range(8)), torch.arange(8) % 4, 4, 0, CPU, disable_progress_bar=True)


def test_a_model_is_asked_for_images_of_all_classes_so_far(splits):
    config, train, test = splits
    asked, phases = [], []

    def sample(class_ids, keys):
        asked.append((class_ids, keys))
        return train.decode(range(len(keys)))

    @contextlib.contextmanager
    def phase(name):
        phases.append(name)
        yield

    options = {"gather": lambda tensor: torch.cat([tensor, tensor + 1]), "quiet": True}
    classification = Classification(train, test, TASKS, CLASS_IDS, config, CPU, **options)
    rows = [classification(sample, num_tasks, phase)["classification"] for num_tasks in (1, 2)]
    assert asked[0] == ([0, 0, 0, 1, 1, 1], [("classify", name, index) for name in "01" for index in range(3)])
    assert len(asked[1][0]) == 12 and phases == ["classify_generate", "classify_train"] * 2
    # Of several processes, the first one's.
    assert [len(row["generated"]) for row in rows] == [1, 2] and all(0 <= x <= 1 for x in rows[1]["generated"])
    assert [row["real_images"] for row in rows] == [[3, 3], [3, 3]] and rows[0]["real"][0] > 0.8

    # Task 0's images are not here.
    rest = Classification(train, test, TASKS, CLASS_IDS, config, CPU, first_task=1, quiet=True)
    found = rest(sample, 2, phase)["classification"]
    assert found["generated"] == [None, rows[1]["generated"][1]] and found["real"] is None


# A run


def test_a_run_measures_what_is_learned_and_goes_on_as_if_it_had_not_stopped(tmp_path_factory, files, tmp_path):
    whole = finished_run(tmp_path_factory, "classified", generated_classifier_images=3)
    metrics = json.loads((whole / "metrics.json").read_text())
    found = metrics["classification"]
    assert found["images_per_class"] == 3 and found["network"] == "resnet8"
    assert [len(row) for row in found["matrix"]] == [1, 2] and found["la"] == found["average_accuracy"][-1]
    assert found["real"]["images_per_class"] == [3, 3] and None not in found["real"]["average_accuracy"]
    assert found["aia"] == pytest.approx((found["real"]["average_accuracy"][0] + found["la"]) / 2)
    seconds = json.loads((whole / "run.json").read_text())["seconds"]
    assert seconds["classify_generate"] > 0 and seconds["classify_train"] > 0
    assert "LA " in (whole / "report.md").read_text() and "LA " in (whole / "task-01" / "README.md").read_text()

    output_dir = interrupted_copy(whole, tmp_path / "run", 10, 1, True)
    assert run(arguments(files, output_dir, generated_classifier_images=3)) == 0
    assert (output_dir / "metrics.json").read_bytes() == (whole / "metrics.json").read_bytes()


# Its table and its report


def classified(run: Run, la: float, aia: float | None, count: int = 145) -> Run:
    """The run with the values of classifiers in it, as train_continual.py writes them."""
    run.config["generated_classifier_images"] = count
    real = {"images_per_class": [140, 145], "average_accuracy": [1.0, None, 0.99], "matrix": [[1.0], None, [0.99] * 3]}
    found = {"images_per_class": count, "network": "resnet8", "average_accuracy": [0.9, 0.8, la], "matrix": []}
    found |= {"real": real, "la": la, "aia": aia, "aia_generated": None if aia is None else aia - 0.1}
    run.metrics["classification"] = found
    run.machine["seconds"] |= {"classify_generate": 30.0, "classify_train": 60.0}
    return run


def test_what_classifiers_learned_stands_beside_the_distance(tmp_path):
    paths = [
        make_run(tmp_path / "gd0", FINETUNE_0, **GD),
        make_run(tmp_path / "gd1", FINETUNE_1, seed=1, **GD),
        make_run(tmp_path / "joint", JOINT, stream="joint"),
        make_run(tmp_path / "none", FINETUNE_0),
    ]
    plain = [load_run(path) for path in paths]
    before = render_markdown(compare(plain))
    assert not any(name in before for name in ("LA", "AIA", "PPC"))
    values = ((0.8, 0.9), (0.9, 0.94), (0.95, None))
    runs = [classified(load_run(path), *value) for path, value in zip(paths, values, strict=False)]
    for one, per_class in zip(runs, (10030, 10030, 0), strict=True):
        one.metrics["parameters"] = {"network": 10**6, "per_class": per_class}
    table = render_markdown(compare([*runs, plain[3]]))
    columns = ["LA", "AIA", "AIA, all generated", "PPC", "of these for LA, AIA"]
    places = [row_of(table, "method").index(name) for name in columns]

    def cells(method: str) -> list[str]:
        return [row_of(table, method)[place] for place in places]

    # Means over two seeds; standard errors of 0.1 and 0.04 apart.
    assert cells("distillation") == ["0.850 \u00b1 0.050", "0.920 \u00b1 0.020", "0.820 \u00b1 0.020", "10.0K", "1.5"]
    assert cells("joint") == ["0.950", "n/a", "n/a", "0", "1.5"]
    assert cells("fine-tuning") == ["n/a"] * 5
    assert "a resnet8 trained on 145 generated images a class alone" in table
    assert "On at most 145 real images a class it has 0.990 \u00b1 0.000 (classifier multitask)." in table
    assert "0.850 $\\pm$ 0.050" in render_latex(compare(runs))
    # It is one method whatever is measured of it, but what is measured is one thing in one table.
    assert plain[0].method == runs[0].method
    with pytest.raises(ValueError, match="gd0 and .*gd1 cannot .* generated_classifier_images is 145 and 200"):
        compare([plain[3], runs[0], classified(runs[1], 0.9, 0.9, 200)])


def test_a_report_tells_what_classifiers_learned(tmp_path):
    folder = make_run(tmp_path / "run", FINETUNE_0, **GD)
    metrics = classified(load_run(folder), 0.8, 0.9).metrics
    (folder / "metrics.json").write_text(json.dumps(metrics))
    text = write_report(folder).read_text()
    assert "the accuracy 0.900, 0.800, 0.800 on the real test images" in text and "LA 0.800, AIA 0.900" in text
    assert "real images, at most 145 a class: 1.00, n/a, 0.990." in text
    assert "plots/classification.png" in text and (folder / "plots" / "classification.png").exists()
