"""The past of a batch of sequences, as a value: `forward` reads it and returns a new one."""

from dataclasses import dataclass, fields

import torch
from torch import Tensor


@dataclass(frozen=True)
class State:
    """What the model keeps of the tokens it has read, a row for each sequence.

    Preallocated: its size does not depend on how much was read (law 9). The dense baseline is the exception:
    it attends to the whole document, so its columns grow with it.
    """

    position_B: Tensor
    """Tokens read of the current document; 0 means that the next token starts one."""
    keys_BLRKH: Tensor
    """Keys of the last R tokens, oldest first; columns from before the document hold zeros."""
    values_BLRKH: Tensor
    """Values of the same tokens."""

    @property
    def batch_size(self) -> int:
        """Sequences in the batch."""
        return self.position_B.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(getattr(self, field.name).nbytes for field in fields(self))

    def rows(self, index: Tensor) -> "State":
        """Return the state of the rows `index` (int64 [n]), in that order; a row may appear more than once."""
        return State(**{field.name: getattr(self, field.name)[index] for field in fields(self)})


def advance(column_BLRKH: Tensor, chunk_BLTKH: Tensor, count_B: Tensor, position_B: Tensor, keep: int) -> Tensor:
    """Return the `keep` columns that end with the first `count_B` tokens of the chunk.

    Columns from before the current document, of which `position_B` tokens are read, become zeros.
    """
    joined_BLJKH = torch.cat([column_BLRKH, chunk_BLTKH], 2)
    past = column_BLRKH.shape[2]
    source_BR = torch.arange(past - keep, past, device=count_B.device) + count_B[:, None]
    in_document_BR = torch.arange(keep, device=count_B.device) >= keep - position_B[:, None]
    index_B1R11 = source_BR.clamp(min=0)[:, None, :, None, None]
    _, blocks, _, heads, width = joined_BLJKH.shape
    kept_BLRKH = joined_BLJKH.gather(2, index_B1R11.expand(-1, blocks, -1, heads, width))
    return kept_BLRKH.where(in_document_BR[:, None, :, None, None], 0)
