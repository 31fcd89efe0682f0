"""Figures as rows for people."""

import pytest

from lepton.cli import figures

REPORT = {
    "checkpoint": "a.pt", "step": 7, "data": "shards", "nats_per_token": 1.5, "bits_per_byte": 0.75,
    "mean_depth": 2.5, "layers": 3, "tokens": 12345, "bytes": 54321,
}  # fmt: skip


def test_how_well_a_text_is_predicted():
    lines = figures.prediction(REPORT, 2.04)
    assert lines == [
        "a.pt (step 7) on shards",
        "nats per token  1.5000",
        "bits per byte   0.7500",
        "mean depth      2.50 of 3 blocks",
        "tokens          12,345 (54,321 bytes, 2.0 s)",
    ]
    assert figures.prediction({**REPORT, "bits_per_byte": None}, 0)[2] == "bits per byte   -"


@pytest.mark.parametrize("temperature", [None, 1.25])
def test_a_figure_that_is_not_defined_is_a_dash(temperature):
    scores = {"ece": 0.1, "brier": 0.2, "auroc": None, "risk_coverage": 0.4}
    doubt = {"wrong": 0.5, "tokens": 2000, "scores": {"uncertainty": scores}, "temperature": temperature}
    lines = figures.uncertainty(doubt)
    cells = next(line for line in lines if line.startswith("uncertainty")).split()
    assert cells == ["uncertainty", "0.1000", "0.2000", "-", "0.4000"]
    assert any("temperature 1.250" in line for line in lines) == (temperature is not None)
    assert lines[-len(scores) :] == figures.legend(*scores)


def test_rows_are_aligned():
    assert figures.row("a", ["1", "22"]) == f"a{'1':>35}{'22':>14}"
    assert figures.ablated("peek", 1.0, -0.25).split() == ["peek", "1.0000", "-0.2500"]


def test_drafting_has_a_row_for_each_temperature():
    rows = [
        {"temperature": 0.0, "tokens_per_step": 1.82, "forward_calls": 40, "acceptance": [0.5, 0.25]},
        {"temperature": 1.0, "tokens_per_step": 2.1, "forward_calls": 30, "acceptance": []},
    ]
    lines = figures.speculation(rows)
    assert lines[2].split() == ["temperature", "0", "1.82", "40", "0.50", "0.25"]
    assert lines[3].split() == ["temperature", "1", "2.10", "30"]
