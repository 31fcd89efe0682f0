"""Uncertainties beside the tokens that they belong to."""

import pytest
import torch

from lepton.errors import InputError
from tests.generate.models import BATCH, PROMPT, lively
from tests.laws.lab import build


@pytest.mark.parametrize("speculative", [False, True])
def test_uncertainty_is_what_the_head_said_where_the_token_was_predicted(speculative):
    # Calibrated so that the chances, all near 1 in a model that has learned nothing, spread over 0..1.
    model = lively("complete")
    model.uncertainty.calibration.copy_(torch.tensor([6.0, -19.0]))
    options = {"temperature": 1.5, "seed": 2, "use_speculative": speculative}
    tokens, doubts = model.generate_with_uncertainty(PROMPT, 25, **options)
    assert tokens == model.generate(PROMPT, 25, **options)
    opens = torch.arange(len(tokens))[None] == len(PROMPT) - 1
    out = model(torch.tensor([tokens]), opens=opens)
    assert doubts == pytest.approx(out.uncertainty[0, len(PROMPT) - 1 : -1].tolist(), abs=1e-9)
    assert all(0 <= doubt <= 1 for doubt in doubts)
    assert max(doubts) - min(doubts) > 0.4


@pytest.mark.parametrize("variant", ["dense", "no uncertainty"])
def test_uncertainty_needs_its_head(variant):
    with pytest.raises(InputError, match="no uncertainty head: use generate, or a model"):
        build(variant).generate_with_uncertainty(PROMPT, 3)


def test_uncertainty_of_a_batch():
    model = lively("complete")
    tokens, doubts = model.generate_with_uncertainty(BATCH, 6, seed=2)
    assert tokens == model.generate(BATCH, 6, seed=2)
    assert [len(row) for row in doubts] == [len(row) - len(prompt) for row, prompt in zip(tokens, BATCH, strict=True)]
    for row in range(len(BATCH)):
        opens = torch.arange(len(tokens[row]))[None] == len(BATCH[row]) - 1
        out = model(torch.tensor([tokens[row]]), opens=opens)
        assert doubts[row] == pytest.approx(out.uncertainty[0, len(BATCH[row]) - 1 : -1].tolist(), abs=1e-9)
