"""Held-out text: nats per token and bits per byte, over whole documents whose state is carried from chunk to chunk.

Shapes: M positions of a slice, V vocabulary.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import cross_entropy

from lepton.data.shards import Batch
from lepton.data.sources import Piece
from lepton.data.tokenizer import Tokenizer
from lepton.errors import InputError
from lepton.evals.positions import CHUNK, iterate_positions
from lepton.model import Network


@dataclass(frozen=True)
class HeldOut:
    """Totals over a text."""

    nats: float
    """Sum of -ln p over all predicted tokens, ends of documents included."""
    tokens: int
    """Predicted tokens."""
    bytes: int
    """UTF-8 bytes of their text."""
    blocks: int
    """Sum over them of the blocks that the token read before each went through."""

    @property
    def nats_per_token(self) -> float:
        """Mean cross-entropy."""
        return self.nats / self.tokens

    @property
    def bits_per_byte(self) -> float:
        """Compression: comparable between tokenizers."""
        return self.nats / math.log(2) / self.bytes if self.bytes else math.nan

    @property
    def mean_depth(self) -> float:
        """Blocks per token, on average."""
        return self.blocks / self.tokens


def document_batches(pieces: Iterable[Piece], tokenizer: Tokenizer, max_tokens: int | None = None) -> Iterator[Batch]:
    """Yield the documents as one row, CHUNK predictions at a time, for `evaluate` with `carry`.

    Every token is predicted, the end of each document included. The model itself starts anew at a document's end.
    The batches end after `max_tokens` predictions. Memory does not grow with the length of a document.
    """

    def ids() -> Iterator[int]:
        yield tokenizer.eos_id
        for piece in pieces:
            yield from tokenizer.encode(piece.text)
            if piece.last:
                yield tokenizer.eos_id

    stream = itertools.islice(ids(), None if max_tokens is None else max_tokens + 1)
    row = list(itertools.islice(stream, CHUNK + 1))
    while len(row) > 1:
        yield Batch(torch.tensor([row]), torch.tensor([len(row)]))
        row = [row[-1], *itertools.islice(stream, CHUNK)]


@torch.no_grad()
def evaluate(
    model: Network,
    batches: Iterable[Batch],
    tokenizer: Tokenizer,
    *,
    carry: bool = False,
    depth: float | None = None,
    think: int | None = None,
) -> HeldOut:
    """Measure `model` on all positions of `batches`; `carry`, `depth` and `think` as in `iterate_positions`.

    Raises:
        InputError: there is nothing to predict.
    """
    bytes_V = torch.zeros(model.config.vocab_size, dtype=torch.int64)
    bytes_V[: tokenizer.size] = torch.from_numpy(tokenizer.token_bytes())
    nats, tokens, text_bytes, blocks = 0.0, 0, 0, 0
    for part in iterate_positions(model, batches, carry=carry, depth=depth, think=think):
        nats += cross_entropy(part.logits_MV, part.target_M, reduction="sum").item()
        tokens += len(part.target_M)
        text_bytes += int(bytes_V[part.target_M.cpu()].sum())
        blocks += int(part.depth_M.sum())
    if not tokens:
        raise InputError("the text holds no token to predict: give a longer one")
    return HeldOut(nats, tokens, text_bytes, blocks)
