import math

import pytest
import torch

from lepton.train.held_out_loss import HeldOutLoss
from lepton.train.sample import sample_text
from lepton.train.validation import in_words, validation_loss
from tests.train.small import opened


def plain(model):
    return HeldOutLoss(model, None, print)


def test_it_is_the_mean_over_targets_and_the_bytes_of_their_text(data, model):
    held_out, tokenizer = opened(data)  # rows of 128 targets: windows of 50, 50 and 28
    loss, bpb = validation_loss(model, held_out, tokenizer, batch_size=3, limit=None, loss_of=plain(model))
    nats, targets, text = 0.0, 0, b""
    with torch.no_grad():
        for tokens, lengths, _ in held_out.batches(1):
            row = tokens[:, : int(lengths[0])]
            log_p = model(row[:, :-1]).logits.log_softmax(-1)
            nats -= float(log_p.gather(-1, row[:, 1:, None]).sum())
            targets += row.shape[1] - 1
            text += b"".join(tokenizer._bytes_of_id[i] for i in row[0, 1:].tolist())
    assert targets == held_out.tokens
    assert loss == pytest.approx(nats / targets, rel=1e-5)
    assert bpb == pytest.approx(nats / math.log(2) / len(text), rel=1e-5)


def test_the_limit_counts_batches(data, model):
    train, tokenizer = opened(data, split="train")
    seen = []
    loss = model.loss
    model.loss = lambda tokens, **rest: seen.append(tokens.shape[0]) or loss(tokens, **rest)
    validation_loss(model, train, tokenizer, batch_size=2, limit=3, loss_of=plain(model))
    assert seen == [2, 2, 2]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_keeps_its_mode_and_weights(data, model, training):
    held_out, tokenizer = opened(data)
    model.train(training)
    before = [parameter.clone() for parameter in model.parameters()]
    state = torch.get_rng_state()
    validation_loss(model, held_out, tokenizer, batch_size=2, limit=1, loss_of=plain(model))
    sample_text(model, held_out, tokenizer, prompt=None, max_new_tokens=3, seed=0)
    assert model.training is training
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_the_figures_of_a_validation_are_in_plain_words():
    figures = {
        "val_loss": 5.0932,
        "val_bpb": 1.8862,
        "tokens_per_step": 1.033,
        "mean_depth": 7,
        "calibration_error": 0.0315,
    }
    assert in_words({"step": 1000, **figures}, layers=7) == (
        "step 1,000: validation loss 5.0932 nats per token, 1.8862 bits per byte; 1.03 tokens per model pass when "
        "drafting; 7.0 of 7 blocks per token; chance of error misjudged by 3.1% on average"
    )
    assert in_words({"step": 0, "val_loss": 5.0, "val_bpb": 2.0}, layers=7).endswith("bits per byte")
