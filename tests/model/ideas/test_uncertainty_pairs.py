"""Ignorance: which positions have two answers, what pairs of them say, and that the trunk does not notice."""

import math

import pytest
import torch
import torch.nn.functional as F

from lepton.errors import InputError
from lepton.model.ideas.uncertainty import (
    FEATURES,
    SURE,
    Ignorance,
    knowledge_loss,
    paired,
    prediction_features,
    self_agreement,
)
from lepton.model.objective import objective
from lepton.model.parameters import initialise
from tests.laws.lab import EOS, build, text

PAIRS = {"uncertainty.pairs": 1}


def pairs_of_rows(seed, rows=4, length=100):
    """Random documents; each second row differs from the one before it in every twentieth token."""
    tokens = text(seed, 2 * rows, length)
    tokens[torch.rand(len(tokens), length, generator=torch.Generator().manual_seed(seed)) < 0.1] = EOS
    tokens[1::2] = tokens[::2]
    tokens[1::2, 9::20] = tokens[1::2, 9::20] % 90 + 1
    return tokens[:rows]


def slowly(tokens, following):
    """Where the documents of two rows are equal so far, one place after the other."""
    found = torch.zeros(len(tokens) // 2, tokens.shape[1], dtype=torch.bool)
    for half in range(len(found)):
        one, other = tokens[2 * half].tolist(), tokens[2 * half + 1].tolist()
        for t in range(len(one)):
            starts = [max((i + 1 for i in range(t) if row[i] == EOS), default=0) for row in (one, other)]
            equal = starts[0] == starts[1] and one[starts[0] : t + 1] == other[starts[0] : t + 1]
            found[half, t] = equal and bool((following[2 * half : 2 * half + 2, t] >= 0).all())
    return found


@pytest.mark.parametrize("rows", [1, 2, 5])
def test_pairs_are_where_documents_are_equal_so_far(rows):
    model, tokens = build("complete", **PAIRS), pairs_of_rows(1, rows)
    inputs, following = tokens[:, :-1], tokens[:, 1:].clone()
    following[:, 40:50] = -100
    position = model.trunk(inputs).flow.timeline.position_BT
    found = paired(inputs, following, position)
    assert torch.equal(found.cpu(), slowly(inputs.cpu(), following.cpu()))
    assert rows == 1 or 0.1 < found.double().mean() < 0.9
    assert not paired(inputs, following, torch.full_like(position, -1)).any(), "padding has no answers"


@pytest.mark.parametrize("scale", [1e-3, 1, 10])
def test_agreement_with_itself(scale):
    logits = (scale * torch.randn(2, 3, 50, dtype=torch.float64)).requires_grad_()
    found = self_agreement(logits)
    assert not found.requires_grad
    torch.testing.assert_close(found.exp(), logits.softmax(-1).square().sum(-1).detach())
    torch.testing.assert_close(self_agreement(logits.float() - 1e3).double(), found, rtol=1e-3, atol=1e-3)


def test_the_loss_of_an_answer_is_a_cross_entropy():
    right, agree = torch.randn(2, 50, dtype=torch.float64).requires_grad_()
    chance = torch.rand(50, 2, dtype=torch.float64)
    found = knowledge_loss(right, agree, chance)
    agreeing = right.sigmoid() * agree.sigmoid()
    torch.testing.assert_close(found, F.binary_cross_entropy(agreeing, chance.mean(-1), reduction="none"))
    assert torch.autograd.grad(found.sum(), (right, agree), allow_unused=True)[1] is None


def test_the_loss_is_finite_where_the_head_is_sure():
    sure = torch.tensor([-200.0, 200.0])
    right, agree = (each.flatten().requires_grad_() for each in torch.meshgrid(sure, sure, indexing="ij"))
    for chance in (0.0, 0.5, 1.0):
        loss = knowledge_loss(right, agree, torch.full((4, 2), chance)).sum()
        assert loss.isfinite()
        assert torch.autograd.grad(loss, right)[0].isfinite().all()


def questions(count, kinds, seed=0):
    """Questions [N] of several kinds; each has right answers, which are drawn alike, and a prediction over 8 answers.

    A kind is (number of right answers, number of likely ones, share of the prediction for these): the likely ones are
    the first, as the right ones. The state says which kind it is.
    """
    generator = torch.Generator().manual_seed(seed)
    kind_N = torch.randint(len(kinds), (count,), generator=generator)
    right_KV = torch.stack([(torch.arange(8) < right) / right for right, _, _ in kinds])
    rows = [[share / likely] * likely + [(1 - share) / (8 - likely)] * (8 - likely) for _, likely, share in kinds]
    chance_NV = torch.tensor(rows)[kind_N]
    answer_N2 = right_KV[kind_N].multinomial(2, replacement=True, generator=generator)
    return F.one_hot(kind_N, 16).float(), chance_NV, answer_N2, kind_N


def test_pairs_tell_ignorance_from_open_choice():
    """Who knows four answers predicts the same as who guesses among four."""
    kinds = [(4, 4, 0.96), (1, 4, 0.96), (1, 1, 0.9), (2, 2, 0.5)]
    hidden, chance, answer, kind = questions(4000, kinds)
    torch.manual_seed(0)
    head = Ignorance(16)
    initialise(head)
    inputs = torch.cat([torch.zeros(4000, FEATURES), self_agreement(chance.log())[:, None]], 1)
    pairs = (answer[:, 0] == answer[:, 1], chance.gather(1, answer))
    optimizer = torch.optim.AdamW(head.parameters(), lr=3e-3)
    for _ in range(300):
        head.loss(hidden, inputs, *pairs).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    right, agree = (each.detach().sigmoid() for each in head(hidden, inputs))
    for number, (count, likely, share) in enumerate(kinds):
        assert right[kind == number].mean().item() == pytest.approx(share * count / likely, abs=0.05)
        assert agree[kind == number].mean().item() == pytest.approx(1 / count, abs=0.05)


def test_it_starts_from_a_model_that_agrees_with_the_data_as_with_itself():
    """With no weights yet, two answers agree one time in two."""
    torch.manual_seed(0)
    head = Ignorance(16)
    initialise(head)
    inputs = torch.cat([torch.randn(3, FEATURES), torch.tensor([[0.1], [0.4], [0.9]]).log()], 1)
    right, agree = head(torch.randn(3, 16), inputs)
    torch.testing.assert_close(agree.detach(), torch.zeros(3))
    torch.testing.assert_close(right.detach().sigmoid(), torch.tensor([0.2, 0.8, SURE]))


def slow_pairs_loss(model, tokens):
    """The loss of all pairs of a batch, and how many there are."""
    out, head = model.trunk(tokens[:, :-1]), model.uncertainty
    following = tokens[:, 1:]
    losses = []
    for half, t in slowly(tokens[:, :-1].cpu(), following.cpu()).nonzero().tolist():
        hidden, signals = out.hidden[2 * half, t], out.signals[2 * half, t]
        logits = model.head(hidden)
        chance = logits.softmax(-1)
        inputs = torch.cat([prediction_features(logits)[0], signals, chance.square().sum().log()[None]])
        answers = following[2 * half : 2 * half + 2, t]
        right, agree = head.pairs(hidden, inputs)
        same = (answers[0] == answers[1]).to(chance)
        agreeing = F.binary_cross_entropy(right.sigmoid() * agree.sigmoid().detach(), chance[answers].mean())
        losses.append(F.binary_cross_entropy_with_logits(agree, same) + agreeing)
    return torch.stack(losses).mean(), len(losses)


@pytest.mark.parametrize("variant", ["complete", "factorised, own keys"])
def test_training_looks_at_every_pair(variant):
    model, tokens = build(variant, **PAIRS), pairs_of_rows(3)
    expected, count = slow_pairs_loss(model, tokens)
    assert count > 50
    found = model.loss(tokens).parts["pairs"]
    torch.testing.assert_close(found, expected.detach(), rtol=0, atol=1e-10)


def test_it_may_look_at_fewer():
    """One in 8 of the positions of half of the rows, and of those only pairs."""
    model, tokens = build("complete", **{"uncertainty.pairs": 8}), pairs_of_rows(3)
    _, count = slow_pairs_loss(model, tokens)
    seen = []
    model.uncertainty.pair_loss = lambda *given: seen.append(given[-1]) or given[0].sum() * 0
    model.loss(tokens)
    assert len(seen[0]) == -(-2 * 99 // 8)
    assert int(seen[0].sum()) == min(count, len(seen[0]))


def test_text_without_pairs_is_no_loss():
    model = build("complete", **PAIRS)
    tokens = text(1, rows=2)
    tokens[1] = (tokens[0] + 1) % 90 + 1
    assert model.loss(tokens).parts["pairs"].item() == 0
    assert model.loss(tokens[:1]).parts["pairs"].item() == 0, "a row by itself"


def test_no_gradient_leaves_the_head():
    model, tokens = build("complete", **PAIRS), pairs_of_rows(3)
    out = model.trunk(tokens[:, :-1])
    grads = {}
    for weight in (0.0, 0.1):
        model.uncertainty.loss_weights = {"uncertainty": 0.1, "pairs": weight}
        loss = objective(model, out.hidden, out.flow, tokens, None, None, auxiliary=True).loss
        names, parameters = zip(*model.named_parameters(), strict=True)
        found = torch.autograd.grad(loss, parameters, allow_unused=True, retain_graph=True)
        grads[weight] = dict(zip(names, found, strict=True))
    for name, before in grads[0.0].items():
        own = name.startswith("uncertainty.pairs.")
        if before is not None and not own:
            torch.testing.assert_close(grads[0.1][name], before, rtol=0, atol=0)
        assert own == (before is not None and not torch.equal(grads[0.1][name], before)), name


def test_ignorance_is_a_chance_by_a_line():
    model, tokens = build("complete", **PAIRS), text(1)
    out, head = model.trunk(tokens), model.uncertainty
    logits = model.head(out.hidden)
    before = head.ignorance(out.hidden, logits, out.signals)
    assert before.shape == tokens.shape
    assert 0 < before.min() < before.max() < 1
    head.pairs.line.copy_(torch.tensor([2.0, 0.5]))
    after = head.ignorance(out.hidden, logits, out.signals)
    torch.testing.assert_close(torch.logit(after), 2 * torch.logit(before) - 0.5)


def test_it_is_off_by_default():
    model, tokens = build("complete"), pairs_of_rows(3)
    assert not [name for name in model.state_dict() if "pairs" in name]
    assert "pairs" not in model.loss(tokens).parts
    out = model.trunk(tokens)
    with pytest.raises(InputError, match=r"uncertainty\.pairs=0"):
        model.uncertainty.ignorance(out.hidden, model.head(out.hidden), out.signals)


def test_with_it_the_predictions_are_the_same():
    tokens = text(1)
    off, on = (build("complete", **changes) for changes in ({}, PAIRS))
    on.load_state_dict({**on.state_dict(), **off.state_dict()})
    one, other = off(tokens), on(tokens)
    assert torch.equal(one.logits, other.logits)
    assert torch.equal(one.uncertainty, other.uncertainty)


@pytest.mark.parametrize(("value", "message"), [(-1, "at least 0"), (1 << 21, "at most"), (0.5, "whole number")])
def test_a_wrong_stride_is_refused(value, message):
    with pytest.raises(InputError, match=rf"uncertainty\.pairs={value}: must be .*{message}"):
        build("complete", **{"uncertainty.pairs": value})


def test_a_graph_of_the_whole_loss():
    model = build("complete", **PAIRS)
    head, width = model.uncertainty, model.config.padded_vocab_size
    hidden, signals = torch.randn(12, model.config.width).to(model.dtype), torch.randn(12, 3).to(model.dtype)
    raw = 20 * torch.randn(12, width, dtype=model.dtype)
    target = raw[:, : model.config.vocab_size].topk(2).indices
    target[::2, 1] = target[::2, 0]
    given = (hidden, raw, signals, target, torch.arange(12) % 3 > 0)
    compiled = torch.compile(head.pair_loss, fullgraph=True, dynamic=False, backend="aot_eager")
    both = []
    for function in (head.pair_loss, compiled):
        loss = function(*given)
        both.append((loss.detach(), *torch.autograd.grad(loss, [*head.pairs.parameters()])))
    torch.testing.assert_close(*both)
    assert math.isfinite(both[0][0])
