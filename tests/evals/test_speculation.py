"""Tokens per pass on held-out prompts."""

import pytest
import torch

from lepton.data.shards import Batch
from lepton.errors import InputError
from lepton.evals.speculation import measure_speculation, prompts_of
from tests.laws.lab import build, text


def test_prompts_are_beginnings_of_rows():
    tokens = torch.arange(60).view(3, 20)
    batches = [Batch(tokens[:2], torch.tensor([20, 3])), Batch(tokens[2:], torch.tensor([20]))]
    assert prompts_of(batches, 3, length=5) == [[0, 1, 2, 3, 4], [20, 21, 22], [40, 41, 42, 43, 44]]
    assert prompts_of(iter(batches), 1, length=2) == [[0, 1]]
    with pytest.raises(InputError, match="too short"):
        prompts_of([], 2)


def test_counts_at_both_temperatures():
    model = build("complete")
    prompts = text(1, rows=3, length=10, documents=False).tolist()
    found = measure_speculation(model, prompts, max_new_tokens=12)
    assert list(found) == [0.0, 1.0]
    greedy = model.generate(prompts, 12, temperature=0.0, use_speculative=False)
    assert found[0.0].new_tokens == sum(map(len, greedy)) - 30
    for stats in found.values():
        assert 1 <= stats.tokens_per_step <= 5
