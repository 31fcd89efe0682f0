"""The figures of docs/ideas are those that the results give."""

import pytest

from benchmarks.figures import FIGURES, FOLDER


@pytest.mark.parametrize("name", FIGURES)
def test_a_committed_figure_is_the_one_that_the_results_give(name):
    drawn = FIGURES[name]()
    assert (FOLDER / f"{name}.svg").read_text(encoding="utf-8") == drawn, "run python -m benchmarks.figures"
    assert drawn.count("<text") > 4


def test_each_page_shows_its_figure():
    assert {path.stem for path in FOLDER.glob("*.svg")} == {*FIGURES}
    for page in FOLDER.glob("*.md"):
        figure = "effects" if page.stem == "index" else page.stem
        assert f"({figure}.svg)" in page.read_text(encoding="utf-8")
