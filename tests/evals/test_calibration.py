"""What is fitted, and what it does to a model."""

import math

import pytest
import torch

from lepton.data.shards import Batch
from lepton.errors import InputError
from lepton.evals.calibration import calibrate, fit_line, fit_temperature
from lepton.evals.positions import collect_outcomes
from lepton.evals.reliability import (
    measure_uncertainty,
)
from tests.evals.samples import batches, chances
from tests.laws.lab import VOCAB, build, text


def test_the_line_is_found():
    generator = torch.Generator().manual_seed(3)
    logit = 2 * torch.randn(100_000, dtype=torch.float64, generator=generator)
    wrong = (torch.rand(100_000, dtype=torch.float64, generator=generator) < torch.sigmoid(0.6 * logit - 0.8)).double()
    scale, shift = fit_line(logit, wrong)
    assert (scale, shift) == (pytest.approx(0.6, abs=0.02), pytest.approx(-0.8, abs=0.03))


def test_the_line_is_a_stationary_point():
    chance, wrong = chances(300)
    logit = torch.logit(chance.clamp(0.01, 0.99))
    line = torch.tensor(fit_line(logit, wrong), dtype=torch.float64, requires_grad=True)
    wrongs = wrong.sum()
    target = torch.where(wrong > 0, (wrongs + 1) / (wrongs + 2), 1 / (len(wrong) - wrongs + 2))
    each = torch.nn.functional.binary_cross_entropy_with_logits(line[0] * logit + line[1], target, reduction="sum")
    (gradient,) = torch.autograd.grad(each, line)
    assert gradient.abs().max() < 0.01  # what the prior leaves


@pytest.mark.parametrize(
    ("logit", "wrong"),
    [
        ([-9.0, -8.0, 8.0, 9.0], [0, 0, 1, 1]),  # separable
        ([900.0, 800.0, -800.0, -900.0], [0, 0, 1, 1]),  # far off, and the wrong way round
        ([0.5] * 4, [0, 1, 0, 0]),  # constant
        ([0.1, -2.0], [1, 1]),  # always wrong
        ([3.0], [0]),
    ],
)
def test_the_line_stays_finite(logit, wrong):
    logit, wrong = torch.tensor(logit, dtype=torch.float64), torch.tensor(wrong, dtype=torch.float64)
    scale, shift = fit_line(logit, wrong)
    assert math.isfinite(scale)
    assert math.isfinite(shift)
    chance = torch.sigmoid(scale * logit + shift)
    assert chance.mean().item() == pytest.approx((wrong.sum().item() + 1) / (len(wrong) + 2), abs=0.3)


def test_few_tokens_leave_the_model_as_it_is():
    """Four tokens would make the calibration worse than none at all."""
    model = build("complete")
    before = {name: value.clone() for name, value in model.named_buffers()}
    for data, tokens in (([], 0), ([Batch(text(5, rows=1, length=5), torch.tensor([5]))], 4), (batches(), 138)):
        fitted = calibrate(model, data)
        assert (fitted.tokens, fitted.line, fitted.quantiles) == (tokens, None, None)
    assert all(torch.equal(value, before[name]) for name, value in model.named_buffers())
    assert model.uncertainty.calibration.tolist() == [1, 0]


def test_calibration_lowers_the_error_and_sets_the_quantiles():
    model = build("complete")
    assert model.uncertainty is not None
    assert model.router is not None
    before = measure_uncertainty(model, batches())
    parameters = {name: value.clone() for name, value in model.named_parameters()}
    fitted = calibrate(model, batches(), min_tokens=138)
    after = measure_uncertainty(model, batches())
    assert after.scores["uncertainty"].brier < before.scores["uncertainty"].brier
    assert after.scores["uncertainty"].ece < before.scores["uncertainty"].ece
    assert after.scores["max-probability"] == before.scores["max-probability"]
    assert fitted.tokens == after.tokens == 2 * (39 + 30)
    assert model.uncertainty.calibration.tolist() == pytest.approx(fitted.line)
    assert all(torch.equal(value, parameters[name]) for name, value in model.named_parameters())
    benefit = collect_outcomes(model, batches()).router_score_M
    for depth in (0.25, 0.5, 0.75):
        assert (benefit > model.router.threshold(depth)).double().mean() == pytest.approx(depth, abs=0.01)
    assert calibrate(model, batches(), min_tokens=1).line == pytest.approx(fitted.line)  # it reads the raw logit


def test_calibrating_a_model_without_the_ideas_leaves_it_alone():
    model = build("dense")
    assert calibrate(model, []) == calibrate(model, batches())
    report = measure_uncertainty(model, batches())
    assert set(report.scores) == {"max-probability"}
    without_router = calibrate(build("no router"), batches(), min_tokens=1)
    assert without_router.quantiles is None
    assert without_router.line is not None


def test_the_temperature_is_where_the_loss_is_lowest():
    """Text is drawn from logits four times as large as the model's: its own factor says how far it is off."""
    model = build("complete")
    head, tokens = model.head, []
    generator = torch.Generator().manual_seed(0)
    state, last = None, torch.randint(1, VOCAB, (8, 1), generator=generator)
    with torch.no_grad():
        for _ in range(160):
            tokens.append(last)
            out = model(last, state)
            state = out.state
            last = torch.multinomial((4 * out.logits[:, -1]).softmax(-1), 1, generator=generator)
    rows = torch.cat(tokens, 1)
    sampled = [Batch(rows, torch.full((8,), rows.shape[1]))]
    for factor in (3.0, 4.0, 5.5):
        model.head = lambda hidden, factor=factor: factor * head(hidden)
        assert fit_temperature(model, sampled) == pytest.approx(factor / 4, rel=0.1)


def test_no_text_has_no_temperature():
    with pytest.raises(InputError, match="no token to predict"):
        fit_temperature(build("complete"), [])
