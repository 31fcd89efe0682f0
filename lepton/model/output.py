"""What a pass returns: predictions, and what `commit` needs to compute the state after any number of its tokens."""

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
    """Everything from which `commit` computes the new state."""

    past: State
    """The state before the chunk."""
    timeline: Timeline
    stem: Sequence[KeysValues]
    """Keys and values of the chunk in each block of the stem."""
    deep: Sequence[KeysValues]
    """The same in each deep block that is not wide."""
    wide: Sequence[KeysValues]
    """The same in each wide block."""
    tokens_BT: Tensor | None
    """The tokens, if a token shift needs the last of them."""
    updates: dict[str, Any]
    """`Contribution.update` of the ideas that have state, by their names."""
    remembered: int | None
    """`LeptonConfig.remembered`."""
    remembered_wide: int | None
    """`LeptonConfig.remembered_wide`."""
    origin: Origin | None
    """The weights that computed it."""


def commit(chunk: Chunk, count_B: Tensor) -> State:
    """Return the state after the first `count_B` tokens of each row of a chunk."""
    past, timeline = chunk.past, chunk.timeline
    parts = {name: update.after(count_B, timeline) for name, update in chunk.updates.items()}
    last_token_B = None
    if chunk.tokens_BT is not None:
        before = 0 if past.last_token_B is None else past.last_token_B
        last_token_B = timeline.at(chunk.tokens_BT.long(), count_B, before)
    return State(
        timeline.position_after(count_B),
        timeline.phase_after(count_B),
        last_token_B,
        past.stem.after(chunk.stem, count_B, timeline, chunk.remembered),
        past.deep.after(chunk.deep, count_B, timeline, chunk.remembered),
        *of_parts(parts, chunk.origin),
        past.wide and past.wide.after(chunk.wide, count_B, timeline, chunk.remembered_wide),
    )


@as_pytree
@dataclass(frozen=True)
class Output:
    """Results of one chunk. States are computed when `commit` or `state` is called."""

    hidden: Tensor
    """Last hidden states, normed [B, T, width]: the input of the head."""
    logits: Tensor | None
    """Next-token logits [B, T, vocab_size], fp32 (None from `Network.trunk`)."""
    uncertainty: Tensor | None
    """Chance in 0..1 that the most likely next token is wrong, [B, T] (None without the idea, or from `trunk`)."""
    depth: Tensor
    """Number of blocks that computed each token, int64 [B, T]."""
    flow: Flow
    """What the ideas read and contributed."""
    lengths: Tensor
    """Number of tokens of each row that are not padding, [B]."""
    chunk: Chunk
    """What `commit` needs."""

    @property
    def signals(self) -> Tensor:
        """The signals of the ideas in `SIGNALS`, [B, T, 3]; see there."""
        return self.flow.signals(*SIGNALS)

    def commit(self, count_B: Tensor, *, keep_graph: bool = False) -> State:
        """Return the state after the first `count_B` tokens of each row.

        - T: the state after the whole chunk, as in prefill.
        - The length of a row: its right padding is left out.
        - 1 + accepted drafts: the state after a verification.
        - 0: the row keeps the state that it had before the chunk.

        Args:
            count_B: integers [B], each in 0..T.
            keep_graph: whether gradients flow through the state into this chunk, for backpropagation through time. A
                stream of such states keeps the activations of all its chunks. Otherwise the state is detached.

        Raises:
            InputError: `count_B` has not one entry per row, or a count is out of range (checked on a CPU).
        """
        rows = f"a count for each of {len(self.lengths)} rows"
        count_B = integers(count_B, tuple(self.lengths.shape), self.lengths.device, "commit", rows)
        if count_B.device.type == "cpu" and not 0 <= int(count_B.min()) <= int(count_B.max()) <= self.hidden.shape[1]:
            raise InputError(f"commit {count_B.tolist()}: counts must lie in 0..{self.hidden.shape[1]}")
        return self._after(count_B, keep_graph)

    @property
    def state(self) -> State:
        """The state after all tokens that are not padding, detached; see `commit`."""
        return self._after(self.lengths, False)

    def _after(self, count_B: Tensor, keep_graph: bool) -> State:
        if keep_graph:
            return commit(self.chunk, count_B)
        with torch.no_grad():
            return rebuild(commit(self.chunk, count_B), lambda _name, value: value.detach())
