"""The loss: cross-entropy where it is measured, and in training all that LEPTON itself learns from."""

import math

import pytest
import torch
from torch.nn.functional import cross_entropy

from tests.hf.small import left_padded, pair, text


def own_loss(model, rows):
    """The loss of `Network.loss` over a batch in which the last token of each row predicts nothing."""
    width = max(map(len, rows)) + 1
    tokens = torch.stack([torch.nn.functional.pad(row, (0, width - len(row)), value=1) for row in rows])
    targets = torch.stack([torch.arange(1, width) < len(row) for row in rows])
    lengths = torch.tensor([len(row) for row in rows])
    return model.train().loss(tokens, lengths=lengths, targets=targets)


@pytest.mark.parametrize("variant", ["complete", "no uncertainty", "dense"])
def test_loss_and_gradients_of_training_are_those_of_lepton(variant):
    model, wrapped = pair(variant, torch.float64)
    rows = [text(length, seed=length)[0] for length in (40, 23, 2)]
    tokens, mask = left_padded(rows, 50)
    own = own_loss(model, rows)
    own.loss.backward()
    gradients = {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}
    model.zero_grad()  # the same tensors
    loss = wrapped.train()(tokens, attention_mask=mask, labels=tokens.masked_fill(mask == 0, -100)).loss
    loss.backward()
    assert loss.item() == pytest.approx(own.loss.item(), abs=1e-6)
    for name, value in wrapped.network.named_parameters():
        if name in gradients:
            torch.testing.assert_close(value.grad, gradients[name], rtol=1e-4, atol=1e-6, msg=name)


def test_without_training_it_is_the_cross_entropy():
    model, wrapped = pair()
    tokens = text(40, rows=2)
    labels = tokens.masked_fill(torch.rand(2, 40) < 0.3, -100)
    with torch.no_grad():
        found = wrapped(tokens, labels=labels)
        expected = cross_entropy(model(tokens).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    assert found.loss.item() == pytest.approx(expected.item(), abs=1e-5)
    assert found.logits.shape[:2] == (2, 40)
    assert found.cache is None


def test_padding_predicts_nothing_whatever_its_labels():
    _, wrapped = pair()
    tokens, mask = left_padded([text(30)[0], text(9, seed=4)[0]], 1)
    with torch.no_grad():
        losses = [wrapped(tokens, attention_mask=mask, labels=labels).loss for labels in (tokens, tokens * mask)]
        alone = [
            wrapped(row[-count:][None], labels=row[-count:][None]).loss
            for row, count in zip(tokens, (30, 9), strict=True)
        ]
    mean = (29 * alone[0] + 8 * alone[1]) / 37
    assert [loss.item() for loss in losses] == pytest.approx([mean.item()] * 2, abs=1e-5)


def test_steps_that_are_accumulated_add_up():
    """`num_items_in_batch` is the number of predictions in all of them."""
    _, wrapped = pair("complete", torch.float64)
    wrapped.train()
    parts = [text(30, rows=2), text(11, seed=5)]
    means = [wrapped(part, labels=part).loss.item() for part in parts]
    counts = [part.shape[0] * (part.shape[1] - 1) for part in parts]
    shares = [wrapped(part, labels=part, num_items_in_batch=sum(counts)).loss.item() for part in parts]
    for mean, count, share in zip(means, counts, shares, strict=True):
        assert share == pytest.approx(mean * count / sum(counts), rel=1e-6)
    assert all(map(math.isfinite, shares))
