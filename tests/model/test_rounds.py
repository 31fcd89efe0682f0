"""A block in rounds: as a plain loop, with keys and values for every round whatever a row's own number is."""

import pytest
import torch

from lepton.model.layers import norm
from lepton.model.rounds import Tokens, in_rounds
from tests.laws.lab import build, text

MOST = 4


def given(each):
    """Return the thinking block, tokens with so many rounds a row, and an empty cache for each round."""
    model = build("over tokens")
    flow = model.trunk(text(1, rows=len(each)), think=0).flow
    tokens = Tokens(flow.h_BTD, torch.randn_like(flow.h_BTD), torch.tensor(each), flow.rotary, flow.causal.plan())
    past = model.thoughts.fresh(len(each), torch.float64, flow.h_BTD.device, allocate=False).kv
    return model.thoughts.block, tokens, past


def plain(block, tokens, past, row, rounds):
    """Return the stream of a row after a plain loop, and its keys in every round."""
    own, x, keys = tokens.of_rows(torch.tensor([row])), tokens.x_BTD[row : row + 1], []
    for round_ in range(MOST):
        inputs = norm(x) + own.again_BTD if round_ else x
        y, k, _ = block(inputs, tuple(each[row : row + 1] for each in past.layer(round_)), own.rotary, own.plan)
        keys.append(k)
        x = y if round_ < rounds else x
    return x, keys


@torch.no_grad()
@pytest.mark.parametrize("usual", [0, 1, 2, 4])
def test_it_is_a_plain_loop_over_each_row(usual):
    each = [min(usual, rounds) for rounds in (0, 1, 2, 4)]
    block, tokens, past = given(each)
    stream, chunk = in_rounds(block, tokens, past, usual, MOST)
    assert len(chunk) == MOST
    for row, rounds in enumerate(each):
        x, keys = plain(block, tokens, past, row, rounds)
        torch.testing.assert_close(stream[row : row + 1], x)
        for round_ in range(MOST):
            torch.testing.assert_close(chunk[round_][0][row : row + 1], keys[round_])


@torch.no_grad()
def test_late_rows_go_on():
    each = [2, 4, 1, 3]
    block, tokens, past = given(each)
    stream, chunk = in_rounds(block, tokens, past, 2, MOST, torch.tensor([1, 3]))
    for row, rounds in enumerate(each):
        x, keys = plain(block, tokens, past, row, rounds)
        torch.testing.assert_close(stream[row : row + 1], x)
        for round_ in range(MOST):
            torch.testing.assert_close(chunk[round_][0][row : row + 1], keys[round_])
