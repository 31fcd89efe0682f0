"""The past of a batch of sequences, as a value: `forward` reads it and returns a new one."""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lepton import tensors
from lepton.errors import InputError, reason
from lepton.model.crystals import EMPTY, Store
from lepton.model.thoughts import Group
from lepton.model.weights import Origin

Part = TypeVar("Part")
WEIGHTS = "weights"
"""Key of the fingerprint of the weights in a file's metadata."""


class Crystal(NamedTuple):
    """One crystal, as a person looks at it."""

    row: int
    """Sequence of the batch."""
    position: int
    """Where its token stands in the document; negative if it was carried over from an earlier stream."""
    score: float
    """What the model gave it, in 0..1."""
    tokens: list[int]
    """The token and up to 15 before it."""


@dataclass
class Memory:
    """What outlives the window: the working memory and the crystals. Iterating gives each `Crystal`, oldest first.

    The rest of a state is never changed in place; `clear` is the one exception, and it is the user who asks for it.
    """

    matrix_BHKV: Tensor | None
    """The working memory, fp32 or better."""
    tail_BXC: Tensor | None
    """The last inputs of its convolution."""
    store: Store | None
    """The crystals."""
    origin: Origin | None = None
    """The weights that made it, which `save` notes in the file."""

    def __iter__(self) -> Iterator[Crystal]:
        if self.store is None:
            return
        kept = self.store.kept
        for row, index in (kept.position_BC > EMPTY).nonzero().tolist():
            ids = [token for token in kept.ids_BCX[row, index].tolist() if token >= 0]
            position, score = int(kept.position_BC[row, index]), kept.log_score_BC[row, index].exp().item()
            yield Crystal(row, position, score, ids)

    def clear(self) -> None:
        """Forget everything, in this state."""
        if self.matrix_BHKV is not None and self.tail_BXC is not None:
            self.matrix_BHKV = torch.zeros_like(self.matrix_BHKV)
            self.tail_BXC = torch.zeros_like(self.tail_BXC)
        if self.store is not None:
            self.store = Store(self.store.kept.cleared(), self.store.pending.cleared(), self.store.ids_BX)

    def save(self, path: str | Path) -> None:
        """Write the memory alone to a safetensors file; `Lepton.new_state` takes it into a new conversation."""
        _write(self, self.origin, path, "memory")


@dataclass(frozen=True)
class State:
    """What the model keeps of the tokens it has read, a row for each sequence.

    Preallocated: its size does not depend on how much was read (law 9). The dense baseline is the exception:
    it attends to the whole document, so its columns grow with it.
    """

    position_B: Tensor
    """Tokens read of the current document; 0 means that the next token starts one."""
    phase_B: Tensor
    """Tokens since the segment opened, modulo its length; 0 means that the next token opens one."""
    keys_BLRKH: Tensor
    """Keys of the last R tokens, oldest first, of each block and then of the thinking block; zeros from before the
    document."""
    values_BLRKH: Tensor
    """Values of the same tokens."""
    taken_B: Tensor
    """Tokens of the current capacity window that went deep."""
    group: Group | None
    """The thoughts of the open segment."""
    memory: Memory
    """Working memory and crystals."""

    @property
    def batch_size(self) -> int:
        """Sequences in the batch."""
        return self.position_B.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(value.nbytes for value in flatten(self).values())

    def rows(self, index: Tensor) -> "State":
        """Return the state of the rows `index` (int64 [n]), in that order; a row may appear more than once.

        Raises InputError on a CPU for a row that there is not.
        """
        try:
            return rebuild(self, lambda _name, value: value[index])
        except IndexError as error:
            raise InputError(f"rows of a state of {self.batch_size}: {reason(error)}") from None

    @staticmethod
    def join(parts: "Sequence[State]") -> "State":
        """Return the rows of several states of one model as one state, in their order."""
        flat = [flatten(part) for part in parts]

        def stack(name: str, value: Tensor) -> Tensor:
            values = [each[name] for each in flat]
            if name.endswith("_BLRKH"):  # without a window each keeps as many columns as it has read
                most = max(each.shape[2] for each in values)
                values = [F.pad(each, (0, 0, 0, 0, most - each.shape[2], 0)) for each in values]
            return torch.cat(values)

        return rebuild(parts[0], stack)

    def save(self, path: str | Path) -> None:
        """Write the state to a safetensors file; `Lepton.load_state` goes on from it in another process."""
        _write(self, self.memory.origin, path, "state")


def flatten(part: Any, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of nested dataclasses by their dotted names."""
    found: dict[str, Tensor] = {}
    for field in dataclasses.fields(part):
        value, name = getattr(part, field.name), prefix + field.name
        if isinstance(value, Tensor):
            found[name] = value
        elif dataclasses.is_dataclass(value):
            found |= flatten(value, name + ".")
    return found


def rebuild(part: Part, change: Callable[[str, Tensor], Tensor], prefix: str = "") -> Part:
    """Return nested dataclasses with `change(dotted name, tensor)` in each tensor's place."""
    values: dict[str, Any] = {}
    for field in dataclasses.fields(part):  # type: ignore[arg-type]
        value, name = getattr(part, field.name), prefix + field.name
        if isinstance(value, Tensor):
            values[field.name] = change(name, value)
        else:
            values[field.name] = rebuild(value, change, name + ".") if dataclasses.is_dataclass(value) else value
    return type(part)(**values)


def _write(part: Any, origin: Origin | None, path: str | Path, kind: str) -> None:
    weights = origin.fingerprint() if origin is not None else None
    # Clones, since the format takes no memory that two tensors share.
    values = {name: value.detach().clone() for name, value in flatten(part).items()}
    try:
        tensors.write(path, values, {"kind": kind} | ({WEIGHTS: weights} if weights else {}))
    except (OSError, tensors.SafetensorError) as problem:
        raise InputError(f"{path}: the {kind} could not be written ({problem}); give a writable path") from None


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
