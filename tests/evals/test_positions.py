"""Every held-out position once, and halves that do not overlap."""

import numpy as np
import pytest
import torch

from lepton.data.shards import Batch, ShardedDataset
from lepton.errors import InputError
from lepton.evals import positions
from lepton.evals.positions import calibration_batches, collect_outcomes, evaluation_batches, iterate_positions
from tests.evals.samples import batches
from tests.laws.lab import build, text


@pytest.mark.parametrize("variant", ["complete", "no thoughts", "no router", "no uncertainty", "dense"])
def test_every_position_comes_once(variant, monkeypatch):
    monkeypatch.setattr(positions, "SLICE", 7)
    monkeypatch.setattr(positions, "CHUNK", 16)
    model = build(variant)
    outcomes = collect_outcomes(model, batches(), temperature=2.0)
    logits, targets, raw = [], [], []
    for batch in batches():
        out = model(batch.tokens[:, :-1])
        for row, length in enumerate(batch.lengths.tolist()):
            logits.append(out.logits[row, : length - 1])
            targets.append(batch.tokens[row, 1:length])
            if model.uncertainty is not None:
                raw.append(model.uncertainty.logit(out.hidden, out.logits, out.signals)[row, : length - 1])
    logits, targets = torch.cat(logits).detach(), torch.cat(targets)
    assert len(outcomes.wrong_M) == sum(int(batch.lengths.sum()) - 2 for batch in batches())

    def same(got, expected):
        # Positions come chunk by chunk over all rows, so in another order than here.
        assert got.sort().values == pytest.approx(expected.double().sort().values, abs=1e-9)

    same(outcomes.wrong_M, logits.argmax(-1) != targets)
    same(outcomes.least_confidence_M, 1 - logits.softmax(-1).amax(-1))
    same(outcomes.scaled_least_confidence_M, 1 - (logits / 2).softmax(-1).amax(-1))
    assert (outcomes.uncertainty_logit_M is None) == (model.uncertainty is None)
    assert (outcomes.router_score_M is None) == (model.router is None)
    if outcomes.uncertainty_logit_M is not None:
        same(outcomes.uncertainty_logit_M, torch.cat(raw).detach())


def test_the_windows_of_the_positions_are_numbered(monkeypatch):
    monkeypatch.setattr(positions, "SLICE", 7)
    monkeypatch.setattr(positions, "CHUNK", 16)
    counts = collect_outcomes(build("complete"), batches()).window_M.bincount()
    assert counts.tolist() == [39, 30, 39, 30]


def test_a_limit_is_exact_and_empty_text_is_a_mistake():
    model = build("complete")
    assert len(collect_outcomes(model, batches(), 50).wrong_M) == 50
    assert sum(len(part.target_M) for part in iterate_positions(model, batches(), max_tokens=3)) == 3
    with pytest.raises(InputError, match="no token to predict"):
        collect_outcomes(model, [])
    assert len(collect_outcomes(model, [], allow_none=True).wrong_M) == 0


def test_rows_beyond_the_limit_are_not_computed():
    model, rows = build("complete"), []
    trunk = model.trunk
    model.trunk = lambda tokens, *rest, **options: rows.append(len(tokens)) or trunk(tokens, *rest, **options)
    tokens = text(5, rows=4, length=40)
    batch = Batch(tokens, torch.tensor([40, 31, 40, 40]))
    limited = collect_outcomes(model, [batch, batch], 50)
    assert rows == [2]
    whole = collect_outcomes(model, [batch])
    assert rows == [2, 4]
    assert limited.least_confidence_M == pytest.approx(whole.least_confidence_M[:50], abs=1e-12)


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
