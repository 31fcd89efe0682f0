"""docs/report.md and the README's table of ideas are what the results give."""

import json

import pytest

from benchmarks import claims
from benchmarks.claims import NONE, Found, joined, newest, the
from benchmarks.report import PAGE, README, SECTIONS, gains, page, readme

AGAIN = "run python -m benchmarks.report"


def test_the_committed_page_is_what_the_results_give():
    assert PAGE.read_text(encoding="utf-8") == page(), AGAIN


def test_the_table_of_the_readme_is_what_the_results_give():
    assert README.read_text(encoding="utf-8") == readme(), AGAIN


@pytest.mark.parametrize("title", SECTIONS)
def test_a_figure_has_a_file_and_what_is_not_measured_has_none(title):
    for what, found in SECTIONS[title]():
        assert (found.text == NONE) == (found.files == ()), what
        assert all((claims.RESULTS / f"{file}.json").exists() for file in found.files), what


def test_each_idea_has_figures():
    for gives, costs in gains().values():
        assert gives.files
        assert costs.files


@pytest.fixture
def folder(tmp_path):
    for name, content in {
        "2026-11-26-speed": {"tokens": 1},
        "2026-11-28-speed": {"tokens": 2},
        "2026-11-28-speed-2": {"tokens": 3},
        "2026-11-28-speed-10": {"other": 4},
        "2026-11-28-speed-cpu": {"tokens": 5},
    }.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
    return tmp_path


def test_the_newest_file_that_has_the_figure_counts(folder):
    found = newest("speed", lambda content: str(content["tokens"]), folder=folder)
    assert found == Found("3", ("2026-11-28-speed-2",))
    (folder / "2026-11-28-speed.json").unlink()
    (folder / "2026-11-28-speed-2.json").unlink()
    found = newest("speed", lambda content: str(content["tokens"]), folder=folder)
    assert found == Found("1", ("2026-11-26-speed",), old=True)
    assert str(found) == "1†"
    assert newest("speed", lambda content: content["nothing"], folder=folder) == Found(NONE)


def test_figures_are_joined_with_their_files():
    one, two = Found("1", ("a", "b")), Found("2", ("b",), old=True)
    assert joined("{} and {}", one, two) == Found("1 and 2†", ("a", "b"))
    assert joined("{} and {}", one, Found(NONE)) == Found(NONE)


def test_the_last_row_that_fits_is_taken():
    rows = [{"case": "a", "ms": 1}, {"case": "b", "ms": 2}, {"case": "a", "ms": 3}]
    assert the(rows, case="a") == rows[2]
    with pytest.raises(LookupError):
        the(rows, case="c")
