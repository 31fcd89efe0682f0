"""The state of a batch of sequences: `forward` takes one and returns a new one. Only `Memory.clear` changes one."""

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from lepton import tensors
from lepton.errors import InputError, reason
from lepton.model.kv_cache import KVCache
from lepton.model.kv_ring import KVRing
from lepton.model.trees import as_pytree
from lepton.model.weights import Origin

Part = TypeVar("Part")
WEIGHTS = "weights"
"""Key of the weights' fingerprint in the metadata of a state file."""


@dataclass
class Memory:
    """The part of a state that outlives the window: the states of working memory and crystals.

    Iteration yields each `Crystal`, oldest first. `clear` is the only method that changes a state in place.
    """

    parts: dict[str, Any]
    """States of ideas by their names."""
    origin: Origin | None = None
    """The weights that computed it; `save` writes their fingerprint."""

    def __iter__(self) -> Iterator[Any]:
        for part in self.parts.values():
            if isinstance(part, Iterable):  # crystals are
                yield from part

    def clear(self) -> None:
        """Empty it, in place."""
        for name, part in self.parts.items():
            self.parts[name] = part.cleared()

    def without(self, row: int, position: int) -> "Memory":
        """Return the memory without the crystal of sequence `row` whose token has `position`; this one stays as it is.

        Raises:
            InputError: there is no such crystal.
        """
        parts = {
            name: part.without(row, position) if hasattr(part, "without") else part  # crystals have
            for name, part in self.parts.items()
        }
        if sum(1 for _ in self) == sum(1 for _ in Memory(parts)):
            raise InputError(f"no crystal of row {row} has position {position}")
        return Memory(parts, self.origin)

    def save(self, path: str | Path) -> None:
        """Write only the memory to a safetensors file, for `Network.new_state`."""
        _write(self, self.origin, path, "memory")


@as_pytree
@dataclass(frozen=True)
class State:
    """What the model keeps of the tokens that it has read, one row per sequence.

    Its size does not depend on the number of tokens, except in the dense baseline, which attends to the whole document,
    so that its kv cache grows.
    """

    position_B: Tensor
    """Position of the next token in its document; 0: it starts one."""
    phase_B: Tensor
    """Tokens since the segment opened, modulo its length; 0: the next token opens one."""
    last_token_B: Tensor | None
    """The token before the next one, int64, for the token shift. None: the model has none, or nothing was read."""
    stem: KVCache | KVRing
    """kv cache of the stem; in decoding, rings that the pass writes to."""
    deep: KVCache | KVRing
    """kv cache of the deep blocks."""
    ideas: dict[str, Any]
    """States of ideas by their names, without those in `memory`."""
    memory: Memory
    """The states that outlive the window."""
    wide: KVCache | KVRing | None = None
    """kv cache of the wide blocks, which are not in `deep`; None: there are none."""

    @property
    def batch_size(self) -> int:
        """Sequences in the batch."""
        return self.position_B.shape[0]

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(value.nbytes for value in flatten(self).values())

    def part(self, name: str) -> Any:
        """Return the state of the idea `name`; None: it has none."""
        return self.memory.parts.get(name, self.ideas.get(name))

    def rows(self, index: Tensor) -> "State":
        """Return the state of the rows `index` (int64, one dimension), in that order; a row may appear more than once.

        Raises:
            InputError: there is no such row (checked on a CPU).
        """
        try:
            return rebuild(self, lambda _name, value: value[index])
        except IndexError as error:
            raise InputError(f"rows of a state of {self.batch_size}: {reason(error)}") from None

    def to(self, device: torch.device | str) -> "State":
        """Return the state on a device; tensors that are there already are shared."""
        return rebuild(self, lambda _name, value: value.to(device))

    @staticmethod
    def join(parts: "Sequence[State]") -> "State":
        """Return one state with the rows of several states of one model."""
        flat = [flatten(part) for part in parts]

        def stack(name: str, value: Tensor) -> Tensor:
            values = [each[name] for each in flat]
            if name.endswith("_BLRKH"):  # without a window, R differs
                most = max(each.shape[2] for each in values)
                values = [F.pad(each, (0, 0, 0, 0, most - each.shape[2], 0)) for each in values]
            return torch.cat(values)

        return rebuild(parts[0], stack)

    def save(self, path: str | Path, *, notes: Mapping[str, str] | None = None) -> None:
        """Write the state to a safetensors file, for `Network.load_state`; `notes` are kept in its metadata."""
        _write(self, self.memory.origin, path, "state", notes)


def of_parts(parts: Mapping[str, Any], origin: Origin | None) -> tuple[dict[str, Any], Memory]:
    """Split the states of ideas into `State.ideas` and `State.memory`."""
    lasting = {name: part for name, part in parts.items() if getattr(part, "outlives_window", False)}
    return {name: part for name, part in parts.items() if name not in lasting}, Memory(lasting, origin)


def flatten(part: Any, prefix: str = "") -> dict[str, Tensor]:
    """Return the tensors of nested dataclasses by dotted names, such as ``stem.keys_BLRKH``; in a dict, by keys."""
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
    """Return nested dataclasses in which each tensor is replaced by `change(dotted name, tensor)`."""

    fields = dataclasses.fields(part)  # type: ignore[arg-type]
    return type(part)(**{each.name: _rebuilt(each.name, getattr(part, each.name), change, prefix) for each in fields})


def _rebuilt(name: str, value: Any, change: Callable[[str, Tensor], Tensor], prefix: str) -> Any:
    """Return a field for `rebuild`.

    Not a function inside it: one that calls itself is in a cycle with all that it sees, so that the tensors of old
    states would stay until Python looks for cycles.
    """
    if isinstance(value, Tensor):
        return change(prefix + name, value)
    if isinstance(value, dict):
        return {key: _rebuilt(key, item, change, prefix) for key, item in value.items()}
    return rebuild(value, change, f"{prefix}{name}.") if dataclasses.is_dataclass(value) else value


def _write(
    part: Any, origin: Origin | None, path: str | Path, kind: str, notes: Mapping[str, str] | None = None
) -> None:
    weights = origin.fingerprint() if origin is not None else None
    # Clones, because safetensors refuses tensors that share memory.
    values = {name: value.detach().clone() for name, value in flatten(part).items()}
    try:
        tensors.write(path, values, {**(notes or {}), "kind": kind} | ({WEIGHTS: weights} if weights else {}))
    except (OSError, tensors.SafetensorError) as problem:
        raise InputError(f"{path}: the {kind} could not be written ({problem}); give a writable path") from None
