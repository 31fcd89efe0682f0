"""Drafts: drawn one after the other from what the cell says, over the whole vocabulary."""

import pytest
import torch
from lepton.generate.drafting import draft, no_drafts

from lepton.generate.sampling import probabilities
from tests.laws.lab import VOCAB, build

ROWS, COUNT = 3, 4


@pytest.fixture(scope="module")
def model():
    return build("complete")


def start(seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(ROWS, 32, generator=generator, dtype=torch.float64)
    token = torch.randint(1, VOCAB, (ROWS,), generator=generator)
    return hidden, token, torch.rand(ROWS, COUNT, generator=generator, dtype=torch.float64)


@torch.no_grad()
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_each_draft_follows_the_one_before(model, temperature):
    drafter = model.drafter
    drafter.learn_frequencies(lambda: torch.arange(VOCAB))  # the last ids, so that places and ids differ

    def distribution(logits):
        return probabilities(logits, temperature=temperature)

    hidden, token, draws = start()
    ids, q = draft(model, hidden, token, draws, distribution)
    assert (ids.shape, q.shape) == ((ROWS, COUNT), (ROWS, COUNT, VOCAB))
    for row in range(ROWS):
        cell, newest = drafter.begin(hidden[row]), token[row]
        for i in range(COUNT):
            cell = drafter.step(cell, model.embed(newest))
            expected = torch.zeros(VOCAB, dtype=torch.float64)
            expected[drafter.ids] = distribution(drafter.logits(cell, drafter.rows(model.embed)))
            torch.testing.assert_close(q[row, i], expected, rtol=0, atol=1e-12)
            newest = ids[row, i]
            assert q[row, i, newest] > 0, "it can have been drawn"
            if temperature == 0:
                assert newest == expected.argmax()


def test_plain_decoding_has_no_drafts(model):
    ids, q = no_drafts(2, VOCAB, torch.device("cpu"))
    assert (ids.shape, q.shape, q.dtype) == ((2, 0), (2, 0, VOCAB), torch.float64)
    hidden, token, draws = start()
    none = draft(model, hidden, token, draws[:, :0], lambda logits: logits)
    assert none[0].shape == (ROWS, 0)
