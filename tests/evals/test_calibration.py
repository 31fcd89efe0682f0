"""Figures of reliability against slow references, and what calibration does to a model."""

import math

import numpy as np
import pytest
import torch

from lepton.data.shards import Batch, ShardedDataset
from lepton.errors import InputError
from lepton.evals.calibration import auroc, brier, fit_temperature, measure_uncertainty, risk_coverage, score
from lepton.train import calibration
from lepton.train.calibration import (
    calibrate,
    calibration_batches,
    calibration_error,
    collect,
    evaluation_batches,
    fit_line,
    walk,
)
from tests.laws.lab import VOCAB, build, text


def batches(rows=4, length=40, seed=5):
    tokens = text(seed, rows=rows, length=length)
    return [Batch(tokens[i : i + 2], torch.tensor([length, length - 9])) for i in range(0, rows, 2)]


def chances(count, seed=0, ties=False):
    """Chances of being wrong, and outcomes that follow them somewhat."""
    generator = torch.Generator().manual_seed(seed)
    chance = torch.rand(count, generator=generator, dtype=torch.float64)
    if ties:
        chance = (chance * 4).round() / 4
    wrong = (torch.rand(count, generator=generator, dtype=torch.float64) < 0.2 + 0.6 * chance).double()
    return chance, wrong


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
    (slope,) = torch.autograd.grad(each, line)
    assert slope.abs().max() < 0.01  # what the prior leaves


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


@pytest.mark.parametrize("variant", ["complete", "no thoughts", "no router", "no uncertainty", "dense"])
def test_walking_gives_every_position_once(variant, monkeypatch):
    monkeypatch.setattr(calibration, "POSITIONS", 7)
    monkeypatch.setattr(calibration, "CHUNK", 16)
    model = build(variant)
    seen = collect(model, batches(), temperature=2.0)
    logits, targets, raw = [], [], []
    for batch in batches():
        out = model(batch.tokens[:, :-1])
        for row, length in enumerate(batch.lengths.tolist()):
            logits.append(out.logits[row, : length - 1])
            targets.append(batch.tokens[row, 1:length])
            if model.uncertainty is not None:
                raw.append(model.uncertainty.logit(out.hidden, out.logits, out.signals)[row, : length - 1])
    logits, targets = torch.cat(logits).detach(), torch.cat(targets)
    assert len(seen.wrong_N) == sum(int(batch.lengths.sum()) - 2 for batch in batches())

    def same(got, expected):
        # A walk takes a chunk of all rows and then the next: the positions come in another order.
        assert got.sort().values == pytest.approx(expected.double().sort().values, abs=1e-9)

    same(seen.wrong_N, logits.argmax(-1) != targets)
    same(seen.doubt_N, 1 - logits.softmax(-1).amax(-1))
    same(seen.scaled_doubt_N, 1 - (logits / 2).softmax(-1).amax(-1))
    assert (seen.logit_N is None) == (model.uncertainty is None)
    assert (seen.benefit_N is None) == (model.router is None)
    if seen.logit_N is not None:
        same(seen.logit_N, torch.cat(raw).detach())


def test_a_limit_is_exact_and_empty_text_is_a_mistake():
    model = build("complete")
    assert len(collect(model, batches(), 50).wrong_N) == 50
    assert sum(len(part.target_M) for part in walk(model, batches(), max_tokens=3)) == 3
    with pytest.raises(InputError, match="no token to predict"):
        collect(model, [])
    with pytest.raises(InputError, match="no token to predict"):
        fit_temperature(model, [])


def test_rows_beyond_the_limit_are_not_computed():
    model, rows = build("complete"), []
    trunk = model.trunk
    model.trunk = lambda tokens, *rest, **options: rows.append(len(tokens)) or trunk(tokens, *rest, **options)
    tokens = text(5, rows=4, length=40)
    batch = Batch(tokens, torch.tensor([40, 31, 40, 40]))
    limited = collect(model, [batch, batch], 50)
    assert rows == [2]
    whole = collect(model, [batch])
    assert rows == [2, 4]
    assert limited.doubt_N == pytest.approx(whole.doubt_N[:50], abs=1e-12)


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
    benefit = collect(model, batches()).benefit_N
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


def test_figures_of_both_sources_on_the_same_tokens():
    model = build("complete")
    report = measure_uncertainty(model, batches(), temperature=1.0)
    assert set(report.scores) == {"uncertainty", "max-probability", "scaled max-probability"}
    assert report.scores["max-probability"] == report.scores["scaled max-probability"]
    seen = collect(model, batches())
    assert report.wrong == seen.wrong_N.mean().item()
    assert report.scores["max-probability"] == score(seen.doubt_N, seen.wrong_N)
    assert report.to_dict()["scores"]["uncertainty"]["auroc"] == report.scores["uncertainty"].auroc


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


@pytest.mark.parametrize("row_count", [1, 2, 3, 7])
@pytest.mark.parametrize(("batch_size", "max_tokens"), [(1, 1), (2, 1000), (3, 40)])
def test_halves_do_not_meet(tmp_path, row_count, batch_size, max_tokens):
    rows = np.arange(1, 1 + row_count * 21, dtype=np.uint16).reshape(row_count, 21)
    (tmp_path / "val").mkdir()
    np.save(tmp_path / "shard_00000.npy", rows)
    np.save(tmp_path / "val" / "shard_00000.npy", rows)
    data = ShardedDataset(tmp_path, seq_len=10, seed=0, split="val", vocab_size=200)
    first, second = (
        {int(row[0]) for batch in half(data, batch_size, max_tokens) for row in batch.tokens}
        for half in (calibration_batches, evaluation_batches)
    )
    assert max(first) < min(second)
    if max_tokens == 1000:
        assert len(first) == len(second) == row_count


def test_a_single_window_is_measured_and_not_fitted(tmp_path):
    rows = np.arange(1, 22, dtype=np.uint16).reshape(1, 21)
    (tmp_path / "val").mkdir()
    np.save(tmp_path / "shard_00000.npy", rows)
    np.save(tmp_path / "val" / "shard_00000.npy", rows)
    data = ShardedDataset(tmp_path, seq_len=20, seed=0, split="val", vocab_size=200)
    assert list(calibration_batches(data, 4)) == []
    assert [len(batch.lengths) for batch in evaluation_batches(data, 4)] == [1]
