"""`python -m lepton sizes`, and the README's table that comes from it."""

from pathlib import Path

import pytest

from lepton.api import create_lepton_nano
from lepton.cli.sizes import markdown, measure, table
from lepton.presets import SIZES
from tests.cli.tiny import run, run_json

README = Path(__file__).parents[2] / "README.md"


@pytest.fixture(scope="module")
def sizes():
    return measure()


def test_json_is_a_list_with_every_size(sizes):
    assert run_json("sizes") == sizes
    assert [size["name"] for size in sizes] == list(SIZES)
    for size in sizes:
        preset = SIZES[size["name"]]
        assert size["target"] == preset.target_params
        assert (size["width"], size["layers"]) == (preset.width, preset.layers)
        assert size["purpose"] == preset.purpose


def test_parameters_are_counted_on_the_model(sizes):
    model = create_lepton_nano()
    assert sizes[0]["params"] == sum(parameter.numel() for parameter in model.parameters())
    assert sizes[0]["state_bytes"] == model.new_state(1).nbytes


def test_the_table_is_aligned(sizes):
    code, out, err = run("sizes")
    assert (code, out, err) == (0, table(sizes) + "\n", "")
    head, *rows = out.splitlines()
    assert len(rows) == len(SIZES)
    assert len({line.index(" M ") for line in rows}) == 1
    assert all(line.index(size["purpose"]) == head.index("for") for line, size in zip(rows, sizes, strict=True))


def test_the_readme_shows_the_present_table(sizes):
    assert run("sizes", "--markdown") == (0, markdown(sizes) + "\n", "")
    text = README.read_text(encoding="utf-8")
    shown = text.partition("<!-- sizes:start -->")[2].partition("<!-- sizes:end -->")[0]
    assert shown.strip() == markdown(sizes), "bring it up to date with: python -m lepton sizes --markdown"
