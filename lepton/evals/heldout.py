"""Held-out text: nats a token and bits a byte, over whole documents whose state is carried from chunk to chunk.

Shapes: B rows, N tokens of a text, T tokens of a chunk, V vocabulary.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from lepton.data.shards import Batch
from lepton.data.sources import Piece
from lepton.data.tokenizer import Tokenizer
from lepton.errors import InputError
from lepton.model import Lepton, State

CHUNK = 1024
"""Tokens of a row in one forward pass."""
POSITIONS = 256
"""Positions whose logits exist at once: more take memory and, on a CPU, time."""
_IGNORED = -100


@dataclass(frozen=True)
class HeldOut:
    """What a model made of a text."""

    nats: float
    """Sum of -ln p over all predicted tokens, ends of documents included."""
    tokens: int
    """Predicted tokens."""
    bytes: int
    """UTF-8 bytes of their text."""

    @property
    def nats_per_token(self) -> float:
        """Mean cross-entropy."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Compression: comparable between tokenizers."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan


def evaluate_rows(model: Lepton, batches: Iterable[Batch], tokenizer: Tokenizer) -> HeldOut:
    """Measure `model` on rows of tokens, each row on its own from its first token on.

    Raises:
        InputError: there is nothing to predict.
    """
    return _evaluate(model, ((batch, True) for batch in batches), tokenizer)


def evaluate_documents(
    model: Lepton, pieces: Iterable[Piece], tokenizer: Tokenizer, max_tokens: int | None = None
) -> HeldOut:
    """Measure `model` on documents: every token of each, its end included, given all of the document before it.

    Stops after `max_tokens` predictions. Memory does not grow with a document's length.

    Raises:
        InputError: there is nothing to predict.
    """
    return _evaluate(model, _stream(pieces, tokenizer, max_tokens), tokenizer)


def _stream(pieces: Iterable[Piece], tokenizer: Tokenizer, max_tokens: int | None) -> Iterator[tuple[Batch, bool]]:
    """Yield the documents as one row, CHUNK predictions at a time; the model itself starts anew at a document's end."""

    def ids() -> Iterator[int]:
        yield tokenizer.eos_id
        for piece in pieces:
            yield from tokenizer.encode(piece.text)
            if piece.last:
                yield tokenizer.eos_id

    stream = itertools.islice(ids(), None if max_tokens is None else max_tokens + 1)
    row, first = list(itertools.islice(stream, CHUNK + 1)), True
    while len(row) > 1:
        yield Batch(torch.tensor([row]), torch.tensor([len(row)])), first
        row, first = [row[-1], *itertools.islice(stream, CHUNK)], False


@torch.no_grad()
def _evaluate(model: Lepton, batches: Iterable[tuple[Batch, bool]], tokenizer: Tokenizer) -> HeldOut:
    """Sum over `batches`; the flag of each says whether its rows start fresh or go on where the last ones ended."""
    device = model.embed.weight.device
    bytes_V = torch.zeros(model.config.vocab_size, dtype=torch.int64)
    bytes_V[: tokenizer.size] = torch.from_numpy(tokenizer.token_bytes())
    nats, tokens, text_bytes = torch.zeros((), dtype=torch.float64, device=device), 0, 0
    state: State | None = None
    for batch, fresh in batches:
        valid_BN = torch.arange(batch.tokens.shape[1] - 1) < (batch.lengths - 1)[:, None]
        tokens += int(valid_BN.sum())
        text_bytes += int(bytes_V[batch.tokens[:, 1:]][valid_BN].sum())
        target_BN = batch.tokens[:, 1:].masked_fill(~valid_BN, _IGNORED).to(device)
        input_BN = batch.tokens[:, :-1].to(device)
        counts_B = (batch.lengths - 1).to(device)
        state = None if fresh else state
        for start in range(0, input_BN.shape[1], CHUNK):
            chunk_BT = input_BN[:, start : start + CHUNK]
            out = model.trunk(chunk_BT, state, lengths=(counts_B - start).clamp(0, chunk_BT.shape[1]))
            nats += _nats(model, out.hidden_BTD, target_BN[:, start : start + CHUNK])
            state = out.state
    if not tokens:
        raise InputError("the text holds no token to predict: give a longer one")
    return HeldOut(nats.item(), tokens, text_bytes)


def _nats(model: Lepton, hidden_BTD: Tensor, target_BT: Tensor) -> Tensor:
    parts = zip(hidden_BTD.flatten(0, 1).split(POSITIONS), target_BT.flatten().split(POSITIONS), strict=True)
    sums = [cross_entropy(model.head(x), target, ignore_index=_IGNORED, reduction="sum") for x, target in parts]
    return torch.stack(sums).double().sum()
