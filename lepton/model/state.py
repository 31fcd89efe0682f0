"""The past of a batch of sequences, as a value: `forward` reads it and returns a new one."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lepton import tensors
from lepton.errors import InputError, reason
from lepton.model.kv_cache import KVCache
from lepton.model.trees import as_pytree
from lepton.model.weights import Origin

Part = TypeVar("Part")
WEIGHTS = "weights"
"""Key of the fingerprint of the weights in a file's metadata."""


@dataclass
class Memory:
    """What outlives the window: the states of the ideas that remember. Iterating gives each `Crystal`, oldest first.

    The rest of a state is never changed in place; `clear` is the one exception, and it is the user who asks for it.
    """

    parts: dict[str, Any]
    """By the ideas' names."""
    origin: Origin | None = None
    """The weights that made it, which `save` notes in the file."""

    def __iter__(self) -> Iterator[Any]:
        for part in self.parts.values():
            if isinstance(part, Sequence) or hasattr(part, "__iter__"):
                yield from part

    def clear(self) -> None:
        """Forget everything, in this state."""
        for name, part in self.parts.items():
            self.parts[name] = part.cleared()

    def save(self, path: str | Path) -> None:
        """Write the memory alone to a safetensors file; `Lepton.new_state` takes it into a new conversation."""
        _write(self, self.origin, path, "memory")


@as_pytree
@dataclass(frozen=True)
class State:
    """What the model keeps of the tokens it has read, a row for each sequence.

    Preallocated: its size does not depend on how much was read (law 9). The dense baseline is the exception:
    it attends to the whole document, so its caches grow with it.
    """

    position_B: Tensor
    """Tokens read of the current document; 0 means that the next token starts one."""
    phase_B: Tensor
    """Tokens since the segment opened, modulo its length; 0 means that the next token opens one."""
    stem: KVCache
    """Of the blocks of the stem."""
    deep: KVCache
    """Of the blocks behind it."""
    ideas: dict[str, Any]
    """What each idea keeps, by its name, but for what `memory` holds."""
    memory: Memory
    """What outlives the window."""

    @property
    def batch_size(self) -> int:
        """Sequences in the batch."""
        return self.position_B.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(value.nbytes for value in flatten(self).values())

    def part(self, name: str) -> Any:
        """Return what the idea called `name` keeps; None: nothing."""
        return self.memory.parts.get(name, self.ideas.get(name))

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
            if name.endswith("_BLRKH"):  # without a window each keeps as many entries as it has read
                most = max(each.shape[2] for each in values)
                values = [F.pad(each, (0, 0, 0, 0, most - each.shape[2], 0)) for each in values]
            return torch.cat(values)

        return rebuild(parts[0], stack)

    def save(self, path: str | Path) -> None:
        """Write the state to a safetensors file; `Lepton.load_state` goes on from it in another process."""
        _write(self, self.memory.origin, path, "state")


def of_parts(parts: Mapping[str, Any], origin: Origin | None) -> tuple[dict[str, Any], Memory]:
    """Return what ideas keep as `State.ideas` and `State.memory` hold it."""
    lasting = {name: part for name, part in parts.items() if getattr(part, "outlives_window", False)}
    return {name: part for name, part in parts.items() if name not in lasting}, Memory(lasting, origin)


def flatten(part: Any, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of nested dataclasses by their dotted names; what is in a dict goes by its key."""
    found: dict[str, Tensor] = {}
    values = (
        part if isinstance(part, dict) else {each.name: getattr(part, each.name) for each in dataclasses.fields(part)}
    )
    for name, value in values.items():
        if isinstance(value, Tensor):
            found[prefix + name] = value
        elif isinstance(value, dict):
            found |= flatten(value, prefix)
        elif dataclasses.is_dataclass(value):
            found |= flatten(value, f"{prefix}{name}.")
    return found


def rebuild(part: Part, change: Callable[[str, Tensor], Tensor], prefix: str = "") -> Part:
    """Return nested dataclasses with `change(dotted name, tensor)` in each tensor's place."""

    def renewed(name: str, value: Any) -> Any:
        if isinstance(value, Tensor):
            return change(prefix + name, value)
        if isinstance(value, dict):
            return {key: renewed(key, item) for key, item in value.items()}
        return rebuild(value, change, f"{prefix}{name}.") if dataclasses.is_dataclass(value) else value

    fields = dataclasses.fields(part)  # type: ignore[arg-type]
    return type(part)(**{each.name: renewed(each.name, getattr(part, each.name)) for each in fields})


def _write(part: Any, origin: Origin | None, path: str | Path, kind: str) -> None:
    weights = origin.fingerprint() if origin is not None else None
    # Clones, since the format takes no memory that two tensors share.
    values = {name: value.detach().clone() for name, value in flatten(part).items()}
    try:
        tensors.write(path, values, {"kind": kind} | ({WEIGHTS: weights} if weights else {}))
    except (OSError, tensors.SafetensorError) as problem:
        raise InputError(f"{path}: the {kind} could not be written ({problem}); give a writable path") from None
