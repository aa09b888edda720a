"""The picture of strengths: every result at its place."""

import importlib.util
import json
from pathlib import Path

import pytest
from PIL import Image

import diffusers_cl
from diffusers_cl.comparison import compare
from diffusers_cl.results import load_run


ROOT = Path(diffusers_cl.__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("strengths", ROOT / "scripts" / "experiments" / "strengths.py")
strengths = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(strengths)
# Settings of a committed run, in which only these keys differ.
SETTINGS = [("decoupled", "10xauto"), ("decoupled", "auto"), ("loss", 15000.0), ("loss", "0.1xauto"), ("loss", "auto")]


@pytest.fixture
def files(tmp_path):
    without = ROOT / "results" / "digits" / "distillation-seed0.json"
    content = json.loads((ROOT / "results" / "digits" / "rank1_ewc_distillation-seed0.json").read_text())
    paths = [str(without)]
    for number, (mode, ewc_lambda) in enumerate(SETTINGS):
        content["metrics"]["config"] |= {"penalty_mode": mode, "ewc_lambda": ewc_lambda}
        paths.append(str(tmp_path / f"{number}.json"))
        Path(paths[-1]).write_text(json.dumps(content))
    return paths


def test_every_strength_has_its_place(files):
    order, modes, without = strengths.lines(compare([load_run(path) for path in files]))
    assert order == ["0.1xauto", "auto", "10xauto", 15000.0]
    assert {(mode, strength) for mode, rows in modes.items() for strength in rows} == set(SETTINGS)
    assert without["method"] == "distillation"


def test_changes_are_paired_by_seed(tmp_path):
    groups = {"with": [], "without": []}
    for seed in (0, 1, 2):
        path = ROOT / "results" / "digits" / f"distillation-seed{seed}.json"
        groups["without"].append(load_run(path))
        content = json.loads(path.read_text())
        values = content["metrics"]["metrics"]["fd_classifier"]
        values["average"][-1] += 0.1 * (seed + 1)
        values["forgetting"] += 1.0
        (tmp_path / path.name).write_text(json.dumps(content))
        groups["with"].append(load_run(tmp_path / path.name))

    def changes(quantity, number):
        return strengths.changes(groups["with"][:number], groups["without"], "fd_classifier", quantity)

    assert changes("average", 3) == pytest.approx((0.2, 0.1 / 3**0.5))
    # A seed that only one of the two has moves nothing, and one pair has no error.
    assert changes("forgetting", 1) == (pytest.approx(1.0), None)


def test_the_picture(files, tmp_path, capsys):
    strengths.main([*files, "--plot", str(tmp_path / "strengths.png")])
    with Image.open(tmp_path / "strengths.png") as picture:
        assert picture.size[0] > 800
    with pytest.raises(SystemExit):
        strengths.main([*files[1:], "--plot", str(tmp_path / "none.png")])
    assert "one method without a penalty, found 0" in capsys.readouterr().err
