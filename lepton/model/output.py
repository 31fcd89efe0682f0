"""What a forward pass returns: the predictions, and the past that any prefix of the chunk leads to."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lepton.errors import InputError
from lepton.model.checks import integers
from lepton.model.state import State, rebuild
from lepton.model.timeline import Timeline


@dataclass(frozen=True)
class Traces:
    """What the ideas did, position by position: for losses, features and tests."""

    timeline: Timeline
    embedded_BTE: Tensor
    """Token embeddings."""
    early_BTD: Tensor
    """States that enter the blocks behind the stem."""
    hint_inputs_BTX: Tensor | None
    """What the hint is made of: stem state, memory read, current thought."""
    hint_BTP: Tensor | None
    """The hint about what comes."""
    read_BTM: Tensor | None
    """What the working memory answered, normed."""
    thought_BTD: Tensor | None
    """Mean of the token's thoughts, normed."""
    benefit_BT: Tensor | None
    """Nats that depth is expected to save."""
    signals_BT3: Tensor
    """Benefit, thought change, memory strength: what uncertainty reads beside the prediction."""


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
    traces: Traces
    lengths: Tensor
    """Tokens of each row that are not padding, [B]."""
    _commit: Callable[[Tensor], State]

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
            return self._commit(count_B)
        with torch.no_grad():
            return rebuild(self._commit(count_B), lambda _name, value: value.detach())
