"""Law 1: the future changes nothing. No output at a position <= t depends on a token after t."""

import pytest
import torch

from lepton.model import timeline
from tests.laws.lab import EOS, LENGTH, VARIANTS, VOCAB, assert_outputs, build, cut, text, views

BOTH = slice(None)


def check_perturbation(variant: str, training: bool = False) -> None:
    model = build(variant).train(training)
    tokens = text(1)
    before = views(model(tokens))
    for t in (1, 7, 8, 33, 50, 64, LENGTH - 1):
        for change in (text(100 + t)[:, t:], torch.full_like(tokens[:, t:], EOS)):
            changed = torch.cat([tokens[:, :t], change], 1)
            assert_outputs(cut(before, BOTH, slice(t)), cut(views(model(changed)), BOTH, slice(t)), f"change from {t}")
        single = tokens.clone()
        single[:, t] = (single[:, t] + 1) % VOCAB
        after = views(model(single))
        assert_outputs(cut(before, BOTH, slice(t)), cut(after, BOTH, slice(t)), f"token {t}")
        assert (after["logits"][:, t] - before["logits"][:, t]).abs().max() > 1e-6, "the token itself must matter"


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("training", [True, False])
def test_changing_the_future_changes_no_past_output(variant, training):
    check_perturbation(variant, training)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_reaches_no_future_embedding(variant):
    model = build(variant)
    tokens = text(2, rows=1, length=40, documents=False)
    embedded = []
    model.embed.register_forward_hook(lambda _module, _inputs, output: embedded.append(output))
    out = model(tokens)
    for s in range(0, 40, 3):
        for value in views(out).values():
            (gradient,) = torch.autograd.grad(value[0, s].square().sum(), embedded[0], retain_graph=True)
            assert not gradient[0, s + 1 :].any(), f"position {s} sees the future"
            assert gradient[0, s].any(), f"position {s} does not see itself"


def test_the_law_would_notice_a_leak(monkeypatch):
    """A mask that opens one column of the future must fail the perturbation test."""
    honest = timeline.bands

    def leaky(*arguments):
        return [
            timeline.Band(band.queries, band.columns, band.mask_B1TJ | band.mask_B1TJ.roll(1, -1))
            for band in honest(*arguments)
        ]

    monkeypatch.setattr("lepton.model.lepton.bands", leaky)
    with pytest.raises(AssertionError, match="differs"):
        check_perturbation("complete")
