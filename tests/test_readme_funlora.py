"""What README says of FunLoRA's results is in the committed files."""

from pathlib import Path

import pytest

from diffusers_cl.comparison import compare
from diffusers_cl.results import load_run


ROOT = Path(__file__).parents[1]
TEXT = " ".join((ROOT / "README.md").read_text().split())


def rows(folder: str) -> tuple[dict[str, dict], dict]:
    runs = [load_run(path) for path in sorted((ROOT / "results" / "funlora" / folder).glob("*-seed*.json"))]
    table = compare(runs)
    return {row["method"]: row for row in table["rows"]}, table


@pytest.mark.parametrize("folder", ["digits", "mnist_small"])
def test_adapted_runs_forgot_nothing(folder):
    _, table = rows(folder)
    adapted = [run for run in table["runs"] if run.config["adapter"] == "funlora"]
    assert len({run.seed for run in adapted}) == 3
    for run in adapted:
        for values in run.metrics["metrics"].values():
            assert all(row == values["matrix"][-1][: len(row)] for row in values["matrix"])


def spread(value: tuple) -> str:
    return f"{value[0]:+.2f} \u00b1 {value[1]:.2f}"


@pytest.mark.parametrize(("folder", "place"), [("digits", "on digits"), ("mnist_small", "on MNIST")])
def test_differences_from_distillation(folder, place):
    found, table = rows(folder)
    for name in ("FunLoRA (cosine)", "rank-1 EWC + distillation (decoupled, auto)"):
        assert found[name]["paired"][2] == 3 and f"{spread(found[name]['paired'])} {place}" in TEXT
    la = [found[name]["la"][0] for name in ("FunLoRA (cosine)", "distillation")]
    assert f"LA {la[0]:.3f} against {la[1]:.3f} {place}" in TEXT
    assert f"{table['floor']['std']:.2f} {place}" in TEXT


def test_functions_on_one_seed():
    runs = {run.path.stem: run for run in rows("digits")[1]["runs"]}
    average, per_class = {}, {}
    for name in ("funlora", "funlora_vanilla", "funlora_power"):
        metrics = runs[f"{name}-seed0"].metrics
        average[name] = metrics["metrics"]["fd_classifier"]["average"][-1]
        per_class[name] = metrics["parameters"]["per_class"]
    said = "{funlora:.2f} with the cosine, {funlora_vanilla:.2f} with vanilla, {funlora_power:.2f} with powers"
    assert said.format_map(average) in TEXT
    assert f"{per_class['funlora_vanilla']:,} parameters a class in place of {per_class['funlora']:,}" in TEXT
