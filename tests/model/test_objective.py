"""The auxiliary losses teach the ideas and move nothing else."""

import pytest
import torch

from lepton.model import objective
from lepton.model.peek import FADE, summary
from tests.laws.lab import EOS, build, text

OWN = ("peek.", "router.", "drafter.", "uncertainty.")


def gradients(model, tokens) -> dict[str, torch.Tensor | None]:
    model.zero_grad()
    model.loss(tokens).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_the_trunk_never_pays_for_an_auxiliary_loss(monkeypatch):
    """Law 6: without them its gradients are the same, and so is the forward pass, which they are no part of."""
    model, tokens = build("complete"), text(1, rows=3)
    together = gradients(model, tokens)
    monkeypatch.setattr(objective, "WEIGHTS", dict.fromkeys(objective.WEIGHTS, 0.0))
    alone = gradients(model, tokens)
    for name, gradient in together.items():
        if not name.startswith(OWN):
            torch.testing.assert_close(gradient, alone[name], rtol=0, atol=1e-12, msg=name)


def test_every_auxiliary_loss_reaches_its_own_parameters():
    model = build("complete")
    found = gradients(model, text(1, rows=3))
    for name, gradient in found.items():
        assert gradient is not None, name
        assert gradient.any(), name


def test_the_parts_are_reported():
    model = build("complete")
    parts = model.loss(text(1)).parts
    assert set(parts) == {"ce", "z", "exit", "router", "uncertainty", "draft", "peek"}
    assert all(torch.isfinite(part) for part in parts.values())


@pytest.mark.parametrize("shape", [(1, 2), (2, 3), (1, 40)])
def test_short_batches_work(shape):
    model = build("complete")
    loss = model.loss(text(1, rows=shape[0], length=shape[1]))
    loss.loss.backward()
    assert torch.isfinite(loss.loss)


def test_rounds_may_differ_from_row_to_row():
    """A row's thoughts do not depend on what its neighbours think."""
    model, tokens = build("complete"), text(2, rows=4)
    mixed = model.trunk(tokens, think=torch.tensor([0, 1, 2, 4])).hidden
    for row, rounds in enumerate((0, 1, 2, 4)):
        alone = model.trunk(tokens[row : row + 1], think=rounds).hidden
        torch.testing.assert_close(mixed[row : row + 1], alone, rtol=0, atol=1e-9)


def test_a_bound_on_the_groups_changes_nothing():
    model, tokens = build("complete"), text(3)
    exact, padded = model.trunk(tokens), model.trunk(tokens, groups=60)
    torch.testing.assert_close(exact.hidden, padded.hidden, rtol=0, atol=1e-9)
    torch.testing.assert_close(exact.state.keys_BLRKH, padded.state.keys_BLRKH, rtol=0, atol=1e-9)


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
