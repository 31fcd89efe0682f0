"""Held-out figures against the definition: one forward pass over each document, a token at a time."""

import math

import numpy as np
import pytest
import torch

from lepton.data.shards import Batch, ShardedDataset
from lepton.data.sources import Piece
from lepton.data.tokenizer import Tokenizer
from lepton.errors import InputError
from lepton.evals import heldout, positions
from lepton.evals.heldout import document_batches, evaluate
from tests.cli.tiny import TEXT, small_bpe, tiny_model


@pytest.fixture(scope="module")
def model():
    return tiny_model().double().eval()


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_json(small_bpe().to_str())


def naive(model, rows):
    """Sum of -ln p over every token of `rows` after the first."""
    nats = 0.0
    for row in rows:
        log_p = model(torch.tensor([row])).logits[0].log_softmax(-1)
        nats -= sum(log_p[i, token].item() for i, token in enumerate(row[1:]))
    return nats


def of_documents(model, pieces, tokenizer, max_tokens=None, **options):
    return evaluate(model, document_batches(pieces, tokenizer, max_tokens), tokenizer, carry=True, **options)


def set_chunk(monkeypatch, chunk):
    for module in (positions, heldout):
        monkeypatch.setattr(module, "CHUNK", chunk)


DOCUMENTS = [TEXT, "short", TEXT[::-1]]


def stream_of(tokenizer):
    eos = tokenizer.eos_id
    return [eos, *(token for text in DOCUMENTS for token in [*tokenizer.encode(text), eos])]


@pytest.mark.parametrize("chunk", [1, 7, 1024])
def test_documents_are_measured_whole_whatever_the_chunk(model, tokenizer, monkeypatch, chunk):
    set_chunk(monkeypatch, chunk)
    monkeypatch.setattr(positions, "SLICE", 5)
    pieces = [Piece(text, last=True) for text in DOCUMENTS]
    result = of_documents(model, iter(pieces), tokenizer)
    row = stream_of(tokenizer)
    assert result.nats == pytest.approx(naive(model, [row]), abs=1e-6)
    assert result.tokens == len(row) - 1
    assert result.bytes == sum(len(text.encode()) for text in DOCUMENTS)
    assert result.nats_per_token == result.nats / result.tokens
    assert result.bits_per_byte == pytest.approx(result.nats / math.log(2) / result.bytes)


def test_a_document_in_pieces_is_one_document(model, tokenizer):
    whole = of_documents(model, [Piece("a b\nc d\n", last=True)], tokenizer)
    cut = of_documents(model, [Piece("a b\n", last=False), Piece("c d\n", last=True)], tokenizer)
    assert cut == whole


@pytest.mark.parametrize("limit", [1, 6, 7, 8, 20])
def test_max_tokens_is_exact_for_documents(model, tokenizer, monkeypatch, limit):
    set_chunk(monkeypatch, 7)
    result = of_documents(model, [Piece(TEXT, last=True)], tokenizer, max_tokens=limit)
    assert result.tokens == limit
    assert result.nats == pytest.approx(naive(model, [stream_of(tokenizer)[: limit + 1]]), abs=1e-6)


def test_rows_are_measured_each_on_its_own(model, tokenizer, monkeypatch, tmp_path):
    set_chunk(monkeypatch, 10)
    ids = tokenizer.encode(TEXT)[:72]
    rows = np.array(ids, dtype=np.uint16).reshape(3, 24)
    (tmp_path / "val").mkdir()
    np.save(tmp_path / "shard_00000.npy", rows)
    np.save(tmp_path / "val" / "shard_00000.npy", rows)
    data = ShardedDataset(tmp_path, seq_len=23, seed=0, split="val", vocab_size=320)
    result = evaluate(model, data.batches(2), tokenizer)
    assert result.nats == pytest.approx(naive(model, rows.tolist()), abs=1e-6)
    assert result.tokens == 3 * 23
    assert result.bytes == sum(int(tokenizer.token_bytes()[row[1:]].sum()) for row in rows)


def test_short_rows_leave_their_padding_out(model, tokenizer):
    row = tokenizer.encode(TEXT)[:30]
    tokens = torch.tensor([row, [*row[:9], *[0] * 21]])
    result = evaluate(model, [Batch(tokens, torch.tensor([30, 9]))], tokenizer)
    assert result.nats == pytest.approx(naive(model, [row, row[:9]]), abs=1e-6)
    assert result.tokens == 29 + 8


def test_depth_and_thinking_are_passed_on(model, tokenizer):
    pieces = [Piece(TEXT, last=True)]
    full = of_documents(model, pieces, tokenizer)
    shallow = of_documents(model, pieces, tokenizer, depth=0)
    thoughtless = of_documents(model, pieces, tokenizer, think=0)
    assert full.mean_depth == model.config.layers
    assert shallow.mean_depth == model.config.stem_layers
    assert len({full.nats, shallow.nats, thoughtless.nats}) == 3
    row = torch.tensor([stream_of(tokenizer)[: full.tokens + 1]])
    log_p = model(row[:, :-1], depth=0).logits[0].log_softmax(-1)
    assert shallow.nats == pytest.approx(-log_p.gather(1, row[0, 1:, None]).sum().item(), abs=1e-6)


def test_measuring_changes_nothing(model, tokenizer):
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first = of_documents(model, [Piece(TEXT, last=True)], tokenizer)
    assert of_documents(model, [Piece(TEXT, last=True)], tokenizer) == first
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.gpu
def test_a_gpu_gives_the_same_figures(model, tokenizer):
    pieces = [Piece(text, last=True) for text in DOCUMENTS]
    on_gpu = of_documents(tiny_model().double().cuda(), pieces, tokenizer)
    assert on_gpu.nats == pytest.approx(of_documents(model, pieces, tokenizer).nats)


def test_nothing_to_predict(model, tokenizer):
    with pytest.raises(InputError, match="no token to predict"):
        of_documents(model, [], tokenizer)
