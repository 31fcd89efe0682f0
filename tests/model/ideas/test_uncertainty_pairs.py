"""Ignorance: which positions have two answers, what pairs of them say, and that the trunk does not notice."""

import math

import pytest
import torch

from lepton.errors import InputError
from lepton.model.ideas.uncertainty import pair_loss, paired, prediction_features
from lepton.model.objective import objective
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


def test_the_loss_is_the_likelihood_of_the_pair():
    valid, again = torch.randn(2, 50, dtype=torch.float64)
    total = torch.zeros(50, dtype=torch.float64)
    v, b = valid.sigmoid(), again.sigmoid()
    expected = {(True, True): v * b**2, (True, False): v * b * (1 - b), (False, False): 1 - v * b * (2 - b)}
    for first in (True, False):
        for second in (True, False):
            agrees = torch.tensor([first, second]).expand(50, 2)
            likelihood = (-pair_loss(valid, again, agrees)).exp()
            torch.testing.assert_close(likelihood, expected[max(first, second), min(first, second)])
            total += likelihood
    torch.testing.assert_close(total, torch.ones_like(total))


def test_the_loss_is_finite_where_the_head_is_sure():
    sure = torch.tensor([-200.0, 200.0])
    valid, again = (each.flatten() for each in torch.meshgrid(sure, sure, indexing="ij"))
    for agrees in ((True, True), (True, False), (False, False)):
        assert pair_loss(valid, again, torch.tensor(agrees).expand(4, 2)).isfinite().all()


@pytest.mark.parametrize(("right", "drawn"), [(0.7, 0.25), (0.3, 1.0), (0.9, 0.5)])
def test_pairs_tell_ignorance_from_open_choice(right, drawn):
    """The best answer is right in a share of the questions, and is then drawn with a chance: the loss finds both."""
    both, one = right * drawn**2, 2 * right * drawn * (1 - drawn)
    weights = torch.tensor([both, one, 1 - both - one], dtype=torch.float64)
    agrees = torch.tensor([[True, True], [True, False], [False, False]])
    logits = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([logits], max_iter=300, line_search_fn="strong_wolfe", tolerance_change=1e-14)

    def mean():
        optimizer.zero_grad()
        loss = (weights * pair_loss(logits[:1].expand(3), logits[1:].expand(3), agrees)).sum()
        loss.backward()
        return loss

    optimizer.step(mean)
    found = logits.detach().sigmoid()
    torch.testing.assert_close(found, torch.tensor([right, drawn], dtype=torch.float64), rtol=0, atol=2e-3)
    assert found[0].item() == pytest.approx((both + one / 2) ** 2 / both, abs=2e-3)


def slow_pairs_loss(model, tokens):
    """The loss of all pairs of a batch, and how many there are."""
    out, head = model.trunk(tokens[:, :-1]), model.uncertainty
    following = tokens[:, 1:]
    losses = []
    for half, t in slowly(tokens[:, :-1].cpu(), following.cpu()).nonzero().tolist():
        hidden, signals = out.hidden[2 * half, t], out.signals[2 * half, t]
        logits = model.head(hidden)
        features = torch.cat([prediction_features(logits)[0], signals])
        agrees = following[2 * half : 2 * half + 2, t] == logits.argmax()
        losses.append(pair_loss(*head.pairs(hidden, features), agrees))
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
    target = raw[:, : model.config.vocab_size].topk(2).indices.flip(1)
    given = (hidden, raw, signals, target, torch.arange(12) % 3 > 0)
    compiled = torch.compile(head.pair_loss, fullgraph=True, dynamic=False, backend="aot_eager")
    both = []
    for function in (head.pair_loss, compiled):
        loss = function(*given)
        both.append((loss.detach(), *torch.autograd.grad(loss, [*head.pairs.parameters()])))
    torch.testing.assert_close(*both)
    assert math.isfinite(both[0][0])
