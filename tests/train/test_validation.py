import math

import pytest
import torch

from lepton.api import Lepton
from lepton.config import LeptonConfig
from lepton.data.shards import ShardedDataset
from lepton.data.tokenizer import load_tokenizer
from lepton.train.validation import evaluate, sample_text
from tests.train.small import SHAPE


@pytest.fixture
def model():
    model = Lepton(LeptonConfig.from_dict(SHAPE))
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    return model


def opened(data, seq_len=50, split="val"):
    tokenizer = load_tokenizer(data / "tokenizer.json")
    return ShardedDataset(data, seq_len=seq_len, seed=0, split=split, vocab_size=300), tokenizer


def test_it_is_the_mean_over_targets_and_the_bytes_of_their_text(data, model):
    held_out, tokenizer = opened(data)  # rows of 128 targets: windows of 50, 50 and 28
    loss, bpb = evaluate(model, held_out, tokenizer, batch_size=3, limit=None)
    nats, targets, text = 0.0, 0, b""
    with torch.no_grad():
        for tokens, lengths in held_out.batches(1):
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
    evaluate(model, train, tokenizer, batch_size=2, limit=3)
    assert seen == [2, 2, 2]


@pytest.mark.parametrize("training", [True, False])
def test_the_model_keeps_its_mode_and_weights(data, model, training):
    held_out, tokenizer = opened(data)
    model.train(training)
    before = [parameter.clone() for parameter in model.parameters()]
    state = torch.get_rng_state()
    evaluate(model, held_out, tokenizer, batch_size=2, limit=1)
    sample_text(model, held_out, tokenizer, prompt=None, max_new_tokens=3, seed=0)
    assert model.training is training
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert all(parameter.grad is None for parameter in model.parameters())
    assert torch.equal(state, torch.get_rng_state())


def test_a_sample_continues_the_prompt_or_the_data(data, model):
    held_out, tokenizer = opened(data)
    options = {"max_new_tokens": 5, "seed": 0}
    text = sample_text(model, held_out, tokenizer, prompt="The lazy", **options)
    assert text.startswith("The lazy")
    assert text == sample_text(model, held_out, tokenizer, prompt="The lazy", **options)
    first = next(held_out.batches(1)).tokens[0, :16].tolist()
    assert sample_text(model, held_out, tokenizer, prompt=None, **options).startswith(tokenizer.decode(first))
