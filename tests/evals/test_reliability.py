"""Scores against slow references."""

import math

import pytest
import torch

from lepton.evals.positions import collect_outcomes
from lepton.evals.reliability import (
    auroc,
    brier,
    calibration_error,
    measure_uncertainty,
    risk_coverage,
    score,
)
from tests.evals.samples import batches, chances
from tests.laws.lab import build


def slow_auroc(chance, wrong):
    pairs = [
        (a, b) for a, w in zip(chance, wrong, strict=True) if w for b, v in zip(chance, wrong, strict=True) if not v
    ]
    return sum((a > b) + (a == b) / 2 for a, b in pairs) / len(pairs)


def slow_error(chance, wrong, bins):
    order = sorted(range(len(chance)), key=lambda i: chance[i])
    size, extra = divmod(len(order), bins)
    total = 0.0
    for b in range(bins):
        start = b * size + min(b, extra)
        members = order[start : start + size + (b < extra)]
        total += abs(sum(chance[i] - wrong[i] for i in members))
    return total / len(order)


def slow_risk(chance, wrong):
    order = sorted(range(len(chance)), key=lambda i: chance[i])
    risks = [sum(wrong[i] for i in order[:k]) / k for k in range(1, len(order) + 1)]
    return sum(risks) / len(risks)


@pytest.mark.parametrize("count", [2, 16, 97])
@pytest.mark.parametrize("ties", [False, True])
def test_auroc_equals_all_pairs(count, ties):
    chance, wrong = chances(count, seed=count, ties=ties)
    wrong[0], wrong[-1] = 0, 1
    assert auroc(chance, wrong) == pytest.approx(slow_auroc(chance.tolist(), wrong.tolist()), abs=1e-12)


def test_auroc_of_known_rankings():
    wrong = torch.tensor([0.0, 0, 1, 1])
    assert auroc(torch.tensor([0.1, 0.2, 0.3, 0.4]), wrong) == 1
    assert auroc(torch.tensor([0.4, 0.3, 0.2, 0.1]), wrong) == 0
    assert auroc(torch.full((4,), 0.3), wrong) == 0.5
    assert math.isnan(auroc(torch.rand(3), torch.ones(3)))


@pytest.mark.parametrize("count", [15, 31, 200])
def test_calibration_error_and_risk_equal_the_definitions(count):
    chance, wrong = chances(count)
    assert calibration_error(chance, wrong) == pytest.approx(slow_error(chance.tolist(), wrong.tolist(), 15))
    assert risk_coverage(chance, wrong) == pytest.approx(slow_risk(chance.tolist(), wrong.tolist()))


def test_fewer_tokens_than_bins():
    assert calibration_error(torch.tensor([0.25, 1.0]), torch.tensor([0.0, 1.0])) == pytest.approx(0.125)


@pytest.mark.parametrize("figure", [calibration_error, risk_coverage, auroc, brier])
def test_the_order_of_equal_chances_does_not_matter(figure):
    chance, wrong = chances(60, ties=True)
    order = torch.argsort(wrong)
    assert figure(chance[order], wrong[order]) == pytest.approx(figure(chance, wrong), abs=1e-12)


def test_right_chances_score_well():
    chance = torch.rand(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    wrong = (torch.rand(40_000, dtype=torch.float64, generator=torch.Generator().manual_seed(2)) < chance).double()
    scores = score(chance, wrong)
    assert scores.ece < 0.01
    assert scores.brier == pytest.approx(1 / 6, abs=0.005)
    assert scores.auroc == pytest.approx(5 / 6, abs=0.01)


def test_figures_of_both_sources_on_the_same_tokens():
    model = build("complete")
    report = measure_uncertainty(model, batches(), temperature=1.0)
    assert set(report.scores) == {"uncertainty", "max-probability", "scaled max-probability"}
    assert report.scores["max-probability"] == report.scores["scaled max-probability"]
    outcomes = collect_outcomes(model, batches())
    assert report.wrong == outcomes.wrong_M.mean().item()
    assert report.scores["max-probability"] == score(outcomes.least_confidence_M, outcomes.wrong_M)
    assert report.to_dict()["scores"]["uncertainty"]["auroc"] == report.scores["uncertainty"].auroc
