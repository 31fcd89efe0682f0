"""Law 1: the future changes nothing. No output at a position <= t depends on a token after t."""

import pytest
import torch

from lepton.ops import attention_plan
from tests.laws.lab import (
    EOS,
    LENGTH,
    VARIANTS,
    VOCAB,
    assert_close,
    assert_outputs,
    build,
    cut,
    half_depth,
    text,
    views,
)

BOTH = slice(None)


def check_perturbation(variant: str, training: bool = False, **options) -> None:
    with torch.set_grad_enabled(training):  # as generation and training compute
        check_each_change(variant, training, **options)


def check_each_change(variant: str, training: bool, **options) -> None:
    model = build(variant).train(training)
    tokens, opens = text(1), torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(2)) < 0.06
    before = views(model(tokens, opens=opens, **options))
    for t in (1, 7, 8, 33, 50, 64, LENGTH - 1):
        for change in (text(100 + t)[:, t:], torch.full_like(tokens[:, t:], EOS)):
            changed, reopened = torch.cat([tokens[:, :t], change], 1), opens.clone()
            reopened[:, t:] ^= True
            after = views(model(changed, opens=reopened, **options))
            assert_outputs(cut(before, BOTH, slice(t)), cut(after, BOTH, slice(t)), f"change from {t}")
        single = tokens.clone()
        single[:, t] = (single[:, t] + 1) % VOCAB
        after = views(model(single, opens=opens, **options))
        assert_outputs(cut(before, BOTH, slice(t)), cut(after, BOTH, slice(t)), f"token {t}")
        assert (after["logits"][:, t] - before["logits"][:, t]).abs().max() > 1e-6, "the token itself must matter"


@pytest.mark.parametrize("variant", VARIANTS)
def test_changing_the_future_changes_no_past_output(variant):
    check_perturbation(variant)
    check_perturbation(variant, training=True)


@pytest.mark.parametrize("variant", VARIANTS)
def test_changing_the_future_changes_no_route(variant):
    check_perturbation(variant, **half_depth(variant))


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_gradient_reaches_no_future_embedding(variant):
    model = build(variant)
    tokens = text(2, rows=1, length=40, documents=False)
    embedded = []
    model.embed.register_forward_hook(lambda _module, _inputs, output: embedded.append(output))
    out, routed = model(tokens), model(tokens, **half_depth(variant))
    for s in range(0, 40, 3):
        for source, passed in zip(embedded, (out, routed), strict=True):
            for name, value in views(passed).items():
                if value.requires_grad:
                    loss = value[0, s].square().sum()
                    (gradient,) = torch.autograd.grad(loss, source, retain_graph=True, allow_unused=True)
                    assert gradient is None or not gradient[0, s + 1 :].any(), f"{name} at {s} sees the future"
        (gradient,) = torch.autograd.grad(out.logits[0, s].square().sum(), embedded[0], retain_graph=True)
        assert gradient[0, s].any(), f"position {s} does not see itself"


def test_drafts_from_a_state_do_not_see_what_follows():
    """A draft is a function of the hidden state and the tokens drafted so far, both of which law 1 covers."""
    model, tokens = build("complete"), text(3)
    changed = torch.cat([tokens[:, :60], text(4)[:, 60:]], 1)
    drafts = []
    for version in (tokens, changed):
        hidden = model.trunk(version).hidden[:, 59]
        prepared = model.drafter.prepared(model.embed, model.dtype, model.config.eos_id)
        drafts.append(prepared.logits(prepared.begin(hidden, model.embed(version[:, 59]))))
    assert_close(drafts[0], drafts[1], "draft")


def test_the_law_would_notice_a_leak(monkeypatch):
    """A mask that shows one token of the future must fail the perturbation test."""
    honest = attention_plan.visible

    def leaky(*arguments):
        return honest(*arguments) | honest(*arguments).roll(1, -1)

    monkeypatch.setattr(attention_plan, "visible", leaky)
    with pytest.raises(AssertionError, match="differs"):
        check_perturbation("complete")
