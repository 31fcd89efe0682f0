"""The fast forward pass against the slow one, with everything on, with each idea off, and dense."""

import pytest
import torch

from tests.laws.lab import VARIANTS, build, text
from tests.model.slow import documents, slow_logits


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_equal_to_the_slow_reference(variant):
    model, tokens = build(variant), text(1, rows=1, length=64)
    expected = torch.cat([slow_logits(model, document) for document in documents(tokens[0].tolist())])
    torch.testing.assert_close(model(tokens).logits[0], expected, rtol=0, atol=1e-9)
