"""scripts/experiments/new_class.py: what it makes of its runs."""

import importlib.util
import json

import pytest
from script_helpers import ROOT


SPEC = importlib.util.spec_from_file_location("new_class", ROOT / "scripts" / "experiments" / "new_class.py")
new_class = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(new_class)


def row(seed: int, method: str, average: float, seconds: float, images: int, **more) -> dict:
    seen = {"trained": images, "replayed": 0, "generated": more.pop("generated", 0)}
    return {"seed": seed, "method": method, "average": average, "images": seen, "seconds": {"train": seconds}, **more}


@pytest.fixture
def rows() -> list[dict]:
    rows = []
    for seed, joint in ((0, 1.0), (1, 2.0)):
        rows += [row(seed, "joint", joint, 100.0, 1000), row(seed, "first nine", 9.0, 9.0, 9)]
        rows.append(row(seed, "lwf", joint * (1.0 + 0.2 * seed), 10.0, 50, steps=25))
        rows.append(row(seed, "lwf", joint * 1.04, 20.0, 100, steps=50, generated=30))
    return rows


def test_quality_and_cost_are_in_units_of_the_joint_model_of_the_same_seed(rows):
    first, second = new_class.summarize(rows)
    assert (first["method"], first["steps"], first["seeds"]) == ("lwf", 25, 2)
    assert first["average / joint's"] == pytest.approx(1.1) and first["range"] == pytest.approx([1.0, 1.2])
    assert first["seconds / joint's"] == pytest.approx(0.1) and first["images seen / joint's"] == pytest.approx(0.05)
    assert not first["near enough"] and second["near enough"] and second["images generated"] == 30


def test_table_and_picture(rows, tmp_path):
    summary = new_class.summarize(rows)
    table = new_class.table(summary).splitlines()
    assert table[2] == "| lwf | 25 | 1.10 (1.00 to 1.20) | 10.0% | 5.0% | 0 |"
    assert table[3] == "| lwf | 50 | **1.04 (1.04 to 1.04)** | 20.0% | 10.0% | 30 |"
    new_class.plot(tmp_path / "plot.png", summary, "One more class")
    assert (tmp_path / "plot.png").stat().st_size > 5000


@pytest.mark.parametrize("file", sorted((ROOT / "results" / "new_class").glob("*.json")), ids=lambda file: file.stem)
def test_the_tables_in_readme_are_those_of_the_results(file):
    content = json.loads(file.read_text())
    assert content["summary"] == new_class.summarize(content["rows"])
    assert new_class.table(content["summary"]) in (ROOT / "README.md").read_text()
