"""How probable a text is after another one: what benchmarks of multiple choice and of last words ask.

Shapes: B rows, M positions of a slice, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lepton.engine.prefill import padded, read_prompts
from lepton.errors import InputError
from lepton.evals.positions import CHUNK, SLICE, SLICE_CPU
from lepton.model import Network, State


@dataclass(frozen=True)
class Likelihood:
    """What a model says of one continuation."""

    logprob: float
    """Sum of ln p over its tokens."""
    greedy: bool
    """Whether each of them is the most likely one, so that greedy decoding gives this text."""


@torch.no_grad()
def likelihoods(
    model: Network,
    pairs: Sequence[tuple[Sequence[int], Sequence[int]]],
    batch_size: int = 8,
    *,
    depth: float | None = None,
    think: int | None = None,
    done: Callable[[int], object] = lambda count: None,
) -> list[Likelihood]:
    """Return the likelihood of each continuation after its context.

    Contexts are read as `generate` reads prompts: the last token opens new thoughts. Each context is read once,
    whatever the number of its continuations; neither has a largest length.

    Args:
        model: in eval mode.
        pairs: token ids of contexts, at least one each, and of continuations. `[eos_id]` is the context of a text from
            its beginning.
        batch_size: rows at once.
        depth: share of the tokens that go past the stem, None for all.
        think: rounds of thinking, None for the model's own number.
        done: called after each batch, with the number of its continuations.

    Raises:
        InputError: a context is empty.
    """
    places: dict[tuple[int, ...], list[int]] = {}
    for place, (context, _) in enumerate(pairs):
        if not context:
            raise InputError(f"context {place} is empty: give at least one token, such as the end of a document")
        places.setdefault(tuple(context), []).append(place)
    found: list[Likelihood | None] = [None] * len(pairs)
    contexts = sorted(places, key=len, reverse=True)  # little padding, and what needs the most memory comes first
    for start in range(0, len(contexts), batch_size):
        some = contexts[start : start + batch_size]
        read = read_prompts(model, some, None, depth=1.0 if depth is None else depth, think=think)
        wanted = [(row, place) for row, context in enumerate(some) for place in places[context]]
        wanted.sort(key=lambda each: -len(pairs[each[1]][1]))
        for first in range(0, len(wanted), batch_size):
            rows, here = zip(*wanted[first : first + batch_size], strict=True)
            index_B = torch.tensor(rows, device=model.device)
            part = Continuations(model, [pairs[place][1] for place in here], depth, think)
            results = part.likelihoods(read.state.rows(index_B), read.hidden_BD[index_B])
            for place, result in zip(here, results, strict=True):
                found[place] = result
            done(len(here))
    return [each for each in found if each is not None]


class Continuations:
    """The continuations of a batch, one a row."""

    def __init__(self, model: Network, texts: Sequence[Sequence[int]], depth: float | None, think: int | None) -> None:
        self.model, self.texts = model, texts
        self.depth, self.think = depth, think

    def likelihoods(self, state: State, hidden_BD: Tensor) -> list[Likelihood]:
        """Return the likelihood of each row after `state`, of whose last tokens `hidden_BD` are the hidden states."""
        device = self.model.device
        logprob_B = torch.zeros(len(self.texts), dtype=torch.float64, device=device)
        wrong_B = torch.zeros(len(self.texts), dtype=torch.int64, device=device)
        for hidden_MD, target_M, row_M in self._positions(state, hidden_BD):
            logs_MV = self.model.head(hidden_MD).double().log_softmax(-1)
            logprob_B.index_add_(0, row_M, logs_MV.gather(1, target_M[:, None])[:, 0])
            wrong_B.index_add_(0, row_M, (logs_MV.argmax(-1) != target_M).long())
        pairs = zip(logprob_B.tolist(), wrong_B.tolist(), strict=True)
        return [Likelihood(logprob, wrong == 0) for logprob, wrong in pairs]

    def _positions(self, state: State, hidden_BD: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Yield hidden states, the tokens that follow them, and their rows, a slice at a time."""
        device, eos_id = self.model.device, self.model.config.eos_id
        filled = [row for row, text in enumerate(self.texts) if text]
        if filled:
            row_M = torch.tensor(filled, device=device)
            target_M = torch.tensor([self.texts[row][0] for row in filled], device=device)
            yield from self._slices(hidden_BD[row_M], target_M, row_M)
        for start in range(0, max(map(len, self.texts)) - 1, CHUNK):
            parts = [text[start : start + CHUNK + 1] for text in self.texts]
            counts_B = torch.tensor([max(len(part) - 1, 0) for part in parts], device=device)
            tokens_BT = padded([part or [eos_id] for part in parts], eos_id, device)
            target_BT, chunk_BT = tokens_BT[:, 1:], tokens_BT[:, :-1]
            out = self.model.trunk(chunk_BT, state, lengths=counts_B, depth=self.depth, think=self.think)
            state = out.state
            index_T = torch.arange(chunk_BT.shape[1], device=device)
            row_M, column_M = (index_T < counts_B[:, None]).nonzero(as_tuple=True)
            yield from self._slices(out.hidden[row_M, column_M], target_BT[row_M, column_M], row_M)

    def _slices(self, *values: Tensor) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        size = SLICE_CPU if self.model.device.type == "cpu" else SLICE
        yield from zip(*(value.split(size) for value in values), strict=True)
