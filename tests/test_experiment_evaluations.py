"""scripts/experiments/evaluations.py: what it measures, and that README says what its results do."""

import importlib.util
import json
import re

import pytest
from diffusers import DDIMScheduler, FlowMatchEulerDiscreteScheduler
from script_helpers import ROOT, finished_run


SPEC = importlib.util.spec_from_file_location("evaluations", ROOT / "scripts" / "experiments" / "evaluations.py")
evaluations = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(evaluations)

README = (ROOT / "README.md").read_text()
RESULTS = sorted((ROOT / "results" / "flow_matching").glob("*.json"))


def row(objective: str, scheduler: str, count: int, distance: float, recall: float, seed: int = 0) -> dict:
    named = {"objective": objective, "scheduler": scheduler, "evaluations": count, "seed": seed}
    return {**named, "average": {"fd": distance, "recall": recall, "accuracy": 1.0}}


def test_means_over_seeds_and_the_table():
    rows = [row("flow_matching", "Euler", count, 2.0 / count, 0.5, seed) for seed in (0, 1) for count in (1, 2)]
    rows += [row("flow_matching", "Heun", 3, 1.5, 0.25), row("diffusion", "DDIM", 1, 40.0, 0.75)]
    rows[0]["average"]["fd"] = 4.0
    first, second, heun, _ = summary = evaluations.summarize(rows, "fd")
    assert (
        first["distance"] == pytest.approx([3.0, 1.0]) and first["seeds"] == [0, 1] and second["distance"] == [1.0, 0]
    )
    assert heun["distance"] == [1.5, None] and heun["accuracy"] == [1.0, None] and heun["recall"] == [0.25, None]
    assert evaluations.table(summary).splitlines() == [
        "| evaluations | flow, Euler | flow, Heun | diffusion, DDIM |",
        "| --- | --- | --- | --- |",
        "| 1 | 3.00 \u00b1 1.00 (0.50) |  | 40.0 (0.75) |",
        "| 2 | 1.00 \u00b1 0.00 (0.50) |  |  |",
        "| 3 |  | 1.50 (0.25) |  |",
    ]


def test_schedulers_take_the_steps_that_fit():
    flow = evaluations.schedulers(FlowMatchEulerDiscreteScheduler(shift=2.0), [1, 2, 3, 4, 10])
    assert flow["Euler"][1] == [1, 2, 3, 4, 10] and flow["Heun"][1] == [1, 2, 5]
    assert flow["Heun"][0].config.shift == 2.0
    diffusion = evaluations.schedulers(DDIMScheduler(prediction_type="sample"), [1, 2])
    assert [steps for _, steps in diffusion.values()] == [[1, 2], [1, 2]]
    assert diffusion["DDIM trailing"][0].config.timestep_spacing == "trailing"
    assert diffusion["DDIM trailing"][0].config.prediction_type == "sample"


def test_models_are_measured_as_their_runs_measured_them(tmp_path_factory, tmp_path):
    flow = finished_run(tmp_path_factory, "flow-matching", objective="flow_matching")
    plain = finished_run(tmp_path_factory, "plain")
    command = [str(flow), str(plain / "task-01"), "--evaluations", "2", "3", "--output", str(tmp_path / "file.json")]
    assert evaluations.main(command) == 0
    content = json.loads((tmp_path / "file.json").read_text())
    for about, name in zip(content["models"], ("Euler", "DDIM"), strict=True):
        found = [r for r in content["rows"] if (r["scheduler"], r["steps"]) == (name, 2)]
        assert [r["objective"] for r in found] == [about["objective"]]
        # The runs took two steps.
        assert found[0]["average"][about["metric"]] == pytest.approx(about["as the run measured it"], rel=1e-9)
    counted = [(r["scheduler"], r["evaluations"]) for r in content["rows"]]
    ddim = [(name, count) for name in ("DDIM", "DDIM trailing") for count in (2, 3)]
    assert counted == [("Euler", 2), ("Euler", 3), ("Heun", 1), ("Heun", 3), *ddim]
    assert content["summary"] == evaluations.summarize(content["rows"], content["models"][0]["metric"])
    assert str(tmp_path) not in json.dumps(content) and content["made_by"].endswith("flow-matching task-01")
    assert evaluations.main([str(tmp_path), "--output", str(tmp_path / "none.json")]) == 2


@pytest.mark.parametrize("file", RESULTS, ids=lambda file: file.stem)
def test_the_table_in_readme_is_that_of_the_results(file):
    content = json.loads(file.read_text())
    metric = content["models"][0]["metric"]
    assert content["summary"] == evaluations.summarize(content["rows"], metric)
    assert evaluations.table(content["summary"]) in README
    for about in content["models"]:
        name = {"flow_matching": "Euler", "diffusion": "DDIM"}[about["objective"]]
        (own,) = (
            r
            for r in content["rows"]
            if (r["seed"], r["scheduler"], r["steps"])
            == (about["seed"], name, about["config"]["eval_num_inference_steps"])
        )
        assert own["average"][metric] == pytest.approx(about["as the run measured it"], rel=1e-6)


def test_the_settings_of_the_two_objectives_are_the_same():
    (content,) = (json.loads(file.read_text()) for file in RESULTS)
    configs: dict[str, list[dict]] = {}
    for about in content["models"]:
        kept = {key: value for key, value in about["config"].items() if key not in ("objective", "prediction_type")}
        configs.setdefault(about["objective"], []).append(kept)
    assert configs["flow_matching"] == configs["diffusion"]
    assert len(re.findall(r"results/flow_matching/digits.json", README)) == 1


def test_what_readme_says_of_the_table_is_in_the_results():
    (content,) = (json.loads(file.read_text()) for file in RESULTS)

    def means(objective: str, scheduler: str, count: int) -> list[str]:
        key = (objective, scheduler, count)
        (row,) = (r for r in content["summary"] if (r["objective"], r["scheduler"], r["evaluations"]) == key)
        return [f"{row[name][0]:.2f}" for name in ("distance", "recall")]

    flow, ddim = means("flow_matching", "Euler", 50), means("diffusion", "DDIM", 50)
    heun, one = means("flow_matching", "Heun", 9), means("flow_matching", "Euler", 1)
    text = " ".join(README.split())
    runs = {(about["objective"], about["seed"]): about["as the run measured it"] for about in content["models"]}
    assert set(runs) == {(objective, seed) for objective in ("flow_matching", "diffusion") for seed in (0, 1)}
    assert all(runs["flow_matching", seed] < runs["diffusion", seed] for seed in (0, 1))
    assert (
        f"nearer on both seeds ({flow[0]} against {ddim[0]}) at a lower recall ({flow[1]} against {ddim[1]})" in text
    )
    assert f"Heun's method is at {heun[0]} and {heun[1]} after 9" in text
    assert f"all images of a class are about the same (recall {one[1]})" in text
