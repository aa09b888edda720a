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


def test_the_farthest_classes_and_the_time():
    seconds = {}
    for folder in ("digits", "mnist_small"):
        for run in rows(folder)[1]["runs"]:
            key = (folder, run.config["adapter"], run.config["replay"], run.config["penalty"])
            if run.config["stream"] == "sequential" and run.config["funlora_function"] == "cosine":
                seconds[key] = seconds.get(key, 0.0) + run.machine["cpu_seconds"]["total"]
            if folder == "mnist_small" and run.config["adapter"] == "funlora":
                last = run.metrics["metrics"]["fd_classifier"]["matrix"][-1]
                assert max(last) == last[-1] and run.metrics["tasks"][-1] == ["8", "9"]
    shares = [
        seconds[folder, "funlora", "none", "none"] / seconds[folder, "none", "generative_distillation", "none"]
        for folder in ("digits", "mnist_small")
    ]
    assert f"{shares[0]:.2f} (digits) and {shares[1]:.2f} (MNIST) of the CPU seconds" in TEXT


def test_functions_on_every_seed():
    found, table = rows("digits")
    names = [f"FunLoRA ({function})" for function in ("cosine", "vanilla", "power")]
    cosine, vanilla, power = (found[name]["average"][0] for name in names)
    said = f"{cosine:.2f} with the cosine, {vanilla:.2f} with vanilla, {power:.2f} with powers"
    assert said in TEXT
    by_seed = {
        name: {r.seed: r.metrics["metrics"]["fd_classifier"]["average"][-1] for r in table["groups"][name]}
        for name in names
    }
    for seed in (0, 1, 2):
        first, second, third = (by_seed[name][seed] for name in names)
        assert first < second < third
    own, other = (table["groups"][name][0].metrics["parameters"]["per_class"] for name in names[:2])
    assert f"vanilla has {other:,} parameters a class in place of {own:,}" in TEXT


def test_flow_against_diffusion():
    flow = rows("mnist_small")[0]["distillation"]["average"][0]
    runs = [load_run(path) for path in sorted((ROOT / "results" / "mnist_small").glob("distillation-seed*.json"))]
    diffusion = compare(runs)["rows"][0]["average"][0]
    assert f"distillation on MNIST has {flow:.2f} with it and {diffusion:.2f} with diffusion" in TEXT
