"""The committed reports of results/geometry are those of the committed numbers, and README says what they say."""

import json
import re
from pathlib import Path

import pytest

from diffusers_cl.bands import BANDS
from diffusers_cl.geometry_report import to_markdown
from diffusers_cl.geometry_words import compared_rises
from diffusers_cl.plots import format_number


ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results" / "geometry"
README = " ".join((ROOT / "README.md").read_text().split())
REPORTS = sorted(path.parent for path in RESULTS.glob("*/geometry.json"))


def geometry(name: str) -> dict:
    return json.loads((RESULTS / name / "geometry.json").read_text())


@pytest.mark.parametrize("folder", REPORTS, ids=[folder.name for folder in REPORTS])
def test_a_report_is_that_of_its_numbers(folder):
    content = geometry(folder.name)
    report = (folder / "report.md").read_text()
    assert report == to_markdown(content)
    pictures = re.findall(r"\(plots/(\S+\.png)\)", report)
    assert pictures and all((folder / "plots" / name).exists() for name in pictures)
    assert not re.search(r"/(home|root|tmp|work)/", report + (folder / "geometry.json").read_text())


def test_what_is_committed_is_small():
    files = [path for path in RESULTS.rglob("*") if path.is_file()]
    assert files and sum(path.stat().st_size for path in files) < 2e6


def span(rows: list[dict], name: str) -> str:
    values = [row[name] for row in rows]
    return f"{min(values):.2f} to {max(values):.2f}"


def off_diagonal(matrix: list[list]) -> list[float]:
    return [value for i, row in enumerate(matrix) for value in row[:i] if value is not None]


def test_what_readme_says_was_found():
    for name, words in (("digits", "on digits"), ("mnist_small", "on MNIST")):
        content = geometry(name)
        rows = content["timesteps"]["rows"]
        assert f"{span(rows, 'best_rank1_error')} {words}" in README
        assert f"{span(rows, 'rank1_error')} {words}" in README
        (at_700,) = [row for row in rows if row["t"] == 700]
        assert f"{format_number(at_700['ratio'])} {words}" in README
        cosines = [sum(row["cosines"]) / len(row["cosines"]) for row in rows]
        assert f"{min(cosines):.2f} to {max(cosines):.2f} {words}" in README
        between = off_diagonal(content["bands"]["between_tasks"]["low_snr"]["corrected"])
        assert f"{sum(between) / len(between):.2f} {words}" in README
        share = content["bands"]["trace_share"][-1]
        assert f"{share['low_snr']:.0%} {words}" in README and share.keys() == BANDS.keys()
        rise = compared_rises(content["movement"])
        other = rise["others all"] / rise["own all"]
        assert f"{other:.1f} times {words}" in README
        assert rise["own all"] > 1e4 * rise["random"] and "ten thousand times faster than along random" in README
        assert (
            f"{span(rows, 'diagonal_error')} {words}" in README and f"{span(rows, 'residual_share')} {words}" in README
        )
        (at_500,) = [row for row in content["surrogate"] if row["t"] == 500]
        assert f"{at_500['scalar']:.0%} {words}" in README
