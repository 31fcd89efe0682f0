"""What a forward pass returns: the predictions, and the chunk from which the state after any prefix of it follows."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lepton.errors import InputError
from lepton.model.checks import integers
from lepton.model.ideas.idea import SIGNALS, Flow
from lepton.model.kv_cache import KeysValues
from lepton.model.state import State, of_parts, rebuild
from lepton.model.timeline import Timeline
from lepton.model.trees import as_pytree
from lepton.model.weights import Origin


@dataclass(frozen=True)
class Chunk:
    """What a pass leaves of its tokens: `commit` makes the new state of it."""

    past: State
    timeline: Timeline
    stem: Sequence[KeysValues]
    """Keys and values of each block of the stem."""
    deep: Sequence[KeysValues]
    """Of each block behind it."""
    records: dict[str, Any]
    """Of the ideas that keep something, by their names."""
    window: int | None
    origin: Origin | None
    """The weights of the pass."""


def commit(chunk: Chunk, count_B: Tensor) -> State:
    """Return the state after the first `count_B` tokens of each row of a chunk."""
    past, timeline = chunk.past, chunk.timeline
    parts = {name: record.after(count_B, timeline) for name, record in chunk.records.items()}
    return State(
        timeline.position_after(count_B),
        timeline.phase_after(count_B),
        past.stem.after(chunk.stem, count_B, timeline, chunk.window),
        past.deep.after(chunk.deep, count_B, timeline, chunk.window),
        *of_parts(parts, chunk.origin),
    )


@as_pytree
@dataclass(frozen=True)
class Output:
    """Results of one chunk. `commit` and `state` compute the state only when they are asked for."""

    hidden: Tensor
    """Normed last states [B, T, width], the input of the head."""
    logits: Tensor | None
    """Next-token logits [B, T, vocab_size], fp32 (None from `Lepton.trunk`)."""
    uncertainty: Tensor | None
    """Chance in 0..1, [B, T], that the most likely next token is wrong (None without the idea, or from `trunk`)."""
    depth: Tensor
    """Blocks that each token went through, int64 [B, T]."""
    flow: Flow
    """What the ideas read and gave."""
    lengths: Tensor
    """Tokens of each row that are not padding, [B]."""
    chunk: Chunk
    """What the state is made of."""

    @property
    def signals(self) -> Tensor:
        """What `SIGNALS` names, [B, T, 3]: benefit of depth, change of the thoughts, strength of the memory."""
        return self.flow.signals(*SIGNALS)

    def commit(self, count_B: Tensor, *, keep_graph: bool = False) -> State:
        """Return the state after the first `count_B` tokens of each row.

        The chunk's length is prefill, a row's own length skips its right padding, 1 + accepted is the
        verification of drafts, and 0 leaves a row as it was.

        Args:
            count_B: integers [B], each in 0..T.
            keep_graph: whether gradients flow through the state into this chunk, as backpropagation through time wants
                it. A stream of such states keeps the activations of all its chunks in memory. Without it the state
                is a plain value, whatever the mode of autograd.

        Raises:
            InputError: `count_B` has not one entry for each row, or (seen on a CPU) a count is out of range.
        """
        rows = f"a count for each of {len(self.lengths)} rows"
        count_B = integers(count_B, tuple(self.lengths.shape), self.lengths.device, "commit", rows)
        if count_B.device.type == "cpu" and not 0 <= int(count_B.min()) <= int(count_B.max()) <= self.hidden.shape[1]:
            raise InputError(f"commit {count_B.tolist()}: counts must lie in 0..{self.hidden.shape[1]}")
        return self._after(count_B, keep_graph)

    @property
    def state(self) -> State:
        """The state after every token that is not padding, without a graph; see `commit`."""
        return self._after(self.lengths, False)

    def _after(self, count_B: Tensor, keep_graph: bool) -> State:
        if keep_graph:
            return commit(self.chunk, count_B)
        with torch.no_grad():
            return rebuild(commit(self.chunk, count_B), lambda _name, value: value.detach())
