"""The hint about the next tokens, and the summary of them that it is taught."""

import pytest
import torch

from lepton.model.ideas.peek import FADE, summary
from tests.laws.lab import EOS, build, text


def test_the_summary_fades_over_the_tokens_ahead_and_stops_at_the_document():
    embedded = torch.randn(1, 12, 6)
    tokens = torch.ones(1, 12, dtype=torch.int64)
    tokens[0, 6] = EOS
    position = torch.tensor([[0, 1, 2, 3, 4, 5, 6, 0, 1, 2, 3, 4]])
    total, has = summary(embedded, position, 4)
    unit = torch.nn.functional.rms_norm(embedded, (6,))[0]
    torch.testing.assert_close(total[0, 2], unit[4] + FADE * unit[5] + FADE**2 * unit[6], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(total[0, 4], unit[6], rtol=1e-4, atol=1e-4)
    assert has[0].tolist() == [True] * 5 + [False] * 2 + [True] * 3 + [False] * 2
    assert not total[0, ~has[0]].any()


@torch.no_grad()
def test_the_loss_is_the_distance_from_the_summary_where_there_is_a_future():
    peek = build("complete").peek
    inputs = torch.randn(2, 9, peek.up.in_features, dtype=torch.float64)
    embedded = torch.randn(2, 9, peek.summary.out_features, dtype=torch.float64)
    position = torch.tensor([list(range(9)), [0, 1, 2, 3, 0, 1, 0, 1, 2]])
    total, has = summary(embedded.float(), position, peek.horizon)
    said = peek.summary(peek.hint(inputs)).float()
    distances = [
        1 - torch.nn.functional.cosine_similarity(said[row, t], total[row, t], dim=0)
        for row, t in has.nonzero().tolist()
    ]
    assert 0 < len(distances) < 18
    assert peek.loss(inputs, embedded, position).item() == pytest.approx(torch.stack(distances).mean().item(), abs=1e-6)


@torch.no_grad()
def test_the_hint_enters_the_stream_by_one_matrix():
    """Where it is zero, the model is that without the idea."""
    model, tokens = build("complete"), text(1)
    with model.without("peek"):
        expected = model(tokens).logits
    assert (model(tokens).logits - expected).abs().max() > 1e-3
    model.peek.back.weight.zero_()
    torch.testing.assert_close(model(tokens).logits, expected)


@pytest.mark.parametrize("into_trunk", [False, True])
def test_the_trunk_learns_from_the_hint_only_if_it_is_to(into_trunk):
    model, tokens = build("complete", **{"peek.into_trunk": into_trunk}), text(1)
    for idea in model.ideas.values():
        idea.loss_weights = {name: 1.0 if name == "peek" else 0.0 for name in idea.loss_weights}
    with_hint, without = [], []
    for found, weight in ((with_hint, 1.0), (without, 0.0)):
        model.peek.loss_weights = {"peek": weight}
        model.zero_grad()
        model.loss(tokens).loss.backward()
        found += [block.mlp.up.weight.grad.clone() for block in model.stem]
    for ours, theirs in zip(with_hint, without, strict=True):
        assert torch.equal(ours, theirs) is not into_trunk
