"""A least saving in place of a depth: each token by its own score, in rows beside others that have a depth."""

import pytest
import torch

from lepton.errors import InputError
from lepton.model.timeline import Timeline
from lepton.values import Least
from tests.laws.lab import EOS, build, text


def route(model, tokens, score, depth, least):
    zero = torch.zeros(len(tokens), dtype=torch.int64)
    timeline = Timeline.read(tokens, zero, zero, eos_id=EOS, segment=4)
    return model.router.choose(score, depth, zero, timeline, least)


@pytest.mark.parametrize("least", [-9.0, -0.5, 0.0, 0.5, 9.0])
@pytest.mark.parametrize("tilt", [-2.0, 0.0, 2.0])
def test_a_token_goes_deep_if_its_own_score_is_above(least, tilt):
    model, tokens = build("complete"), text(1, rows=3, length=60)
    score = torch.randn(3, 60, dtype=torch.float64) + tilt
    deep, counts = route(model, tokens, score, 1.0, least)
    assert torch.equal(deep, score > least)
    assert counts.max() <= model.router.window


def test_each_row_by_a_rule_of_its_own():
    model, tokens = build("complete"), text(1, rows=3, length=60)
    score = torch.randn(3, 60, dtype=torch.float64)
    depth = torch.tensor([0.25, 1.0, 0.5], dtype=torch.float64)
    least = torch.tensor([torch.inf, 0.3, torch.inf], dtype=torch.float64)
    deep, counts = route(model, tokens, score, depth, least)
    by_depth, counts_by_depth = route(model, tokens, score, depth, None)
    for row in (0, 2):
        assert torch.equal(deep[row], by_depth[row])
        assert torch.equal(counts[row], counts_by_depth[row])
    assert torch.equal(deep[1], score[1] > 0.3)


@torch.no_grad()
@pytest.mark.parametrize("variant", ["complete", "odd edges", "no thoughts"])
def test_in_pieces_it_is_the_same(variant):
    model, tokens = build(variant), text(1, length=60)
    whole = model.trunk(tokens, depth=Least(0.1))
    score = whole.flow.contributions["router"].signal_BT
    assert torch.equal(whole.depth == model.config.layers, score > 0.1)
    assert 0.05 < (score > 0.1).double().mean() < 0.95
    state, hidden = None, []
    for piece in tokens.split([1, 7, 20, 1, 31], 1):
        out = model.trunk(piece, state, depth=Least(0.1))
        hidden.append(out.hidden)
        state = out.state
    torch.testing.assert_close(torch.cat(hidden, 1), whole.hidden, rtol=0, atol=1e-9)


@torch.no_grad()
def test_its_ends_are_depth_one_and_depth_zero():
    model, tokens = build("complete"), text(1)
    for least, depth in ((-1e9, 1.0), (1e9, 0.0)):
        found, expected = model.trunk(tokens, depth=Least(least)), model.trunk(tokens, depth=depth)
        torch.testing.assert_close(found.hidden, expected.hidden, rtol=0, atol=1e-9)
        assert torch.equal(found.depth, expected.depth)


def test_it_needs_a_router():
    with pytest.raises(InputError, match=r"depth=Least\(nats=0\.1\): this model has no router"):
        build("no router").trunk(text(1), depth=Least(0.1))


@pytest.mark.parametrize("nats", [float("nan"), float("inf"), "0.1", None, True])
def test_it_is_a_finite_number(nats):
    with pytest.raises(InputError, match=r"depth=Least\(.*must hold a finite number of nats"):
        build("complete").trunk(text(1), depth=Least(nats))
