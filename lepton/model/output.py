"""What a forward pass returns: the predictions, and the past that any prefix of the chunk leads to."""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from lepton.errors import InputError
from lepton.model.state import State


@dataclass(frozen=True)
class Output:
    """Results of one chunk. `commit` and `state` compute the state only when they are asked for."""

    hidden_BTD: Tensor
    """Normed states of the last block, the input of the head."""
    logits: Tensor | None
    """Next-token logits [B, T, vocab_size], fp32 (None from `Lepton.trunk`)."""
    lengths_B: Tensor
    """Tokens of each row that are not padding."""
    _commit: Callable[[Tensor], State]

    def commit(self, count_B: Tensor) -> State:
        """Return the state after the first `count_B` tokens of each row.

        The chunk's length is prefill, a row's own length skips its right padding, 1 + accepted is the
        verification of drafts, and 0 leaves a row as it was.

        Args:
            count_B: int64 [B], each in 0..T.

        Raises:
            InputError: `count_B` has not one entry for each row.
        """
        if count_B.shape != self.lengths_B.shape:
            raise InputError(f"commit takes a count for each of {len(self.lengths_B)} rows, not {tuple(count_B.shape)}")
        return self._commit(count_B)

    @property
    def state(self) -> State:
        """The state after every token that is not padding."""
        return self._commit(self.lengths_B)
