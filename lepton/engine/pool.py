"""The states of many sequences, in place: a sequence keeps its place in the pool for as long as it runs."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, TypeVar, cast

import torch
from torch import Tensor

from lepton.engine.lookup import remembered
from lepton.model import Network, State
from lepton.model.block import Block
from lepton.model.fresh_state import fresh_state
from lepton.model.kv_cache import KVCache
from lepton.model.kv_ring import KVRing
from lepton.ops.choose import Sampling

Part = TypeVar("Part")


@dataclass(frozen=True)
class Rows:
    """What a cycle reads and changes of each sequence, beside the state of the model; in the pool, a row a place."""

    token_B: Tensor
    """The newest token, which no pass has read."""
    seen_BF: Tensor
    """What drafts after it are made from."""
    text_BL: Tensor
    """The newest tokens of the text, that one included, in which drafts are looked up."""
    index_B: Tensor
    """Number of new tokens."""
    stream_B2: Tensor
    """The two words of its noise."""
    temperature_B: Tensor
    top_p_B: Tensor
    top_k_B: Tensor
    """0: all."""
    rounds_B: Tensor
    """Rounds of thinking."""
    depth_B: Tensor
    """Share of the tokens that may go through the deep blocks, fp64."""
    least_B: Tensor
    """Predicted saving in nats above which a token goes through them, fp64; infinite where the share decides."""

    @property
    def sampling(self) -> Sampling:
        """How each row is sampled."""
        return Sampling(self.temperature_B, self.top_p_B, self.top_k_B)


@dataclass(frozen=True)
class Held:
    """State of the model, and rows."""

    state: State
    rows: Rows


def renewed(part: Part, tensors: Callable[[Tensor], Tensor], caches: Callable[[Any], Any]) -> Part:
    """Return nested dataclasses in which kv caches and other tensors are replaced by what the functions return."""

    changed = {each.name: _renewed(getattr(part, each.name), tensors, caches) for each in fields(part)}  # type: ignore
    return replace(part, **changed)  # type: ignore


def _renewed(value: Any, tensors: Callable[[Tensor], Tensor], caches: Callable[[Any], Any]) -> Any:
    """Return a field for `renewed`; not a function inside it, which would be in a cycle with the tensors."""
    if isinstance(value, Tensor):
        return tensors(value)
    if isinstance(value, KVCache | KVRing):
        return caches(value)
    if isinstance(value, dict):
        return {key: _renewed(item, tensors, caches) for key, item in value.items()}
    return renewed(value, tensors, caches) if is_dataclass(value) else value


def leaves(part: Any) -> list[Any]:
    """Return the tensors and kv caches of nested dataclasses, in order."""
    found: list[Any] = []

    def note(value: Any) -> Any:
        found.append(value)
        return value

    renewed(part, note, note)
    return found


class Pool:
    """Rings and other tensors with a first dimension of `places`.

    `columns` is the number of columns of a ring: the window and the largest chunk, less one. A model without a window
    needs one for each token of its longest text. The rings of wide blocks have as many more as their window is wider.
    """

    def __init__(self, model: Network, places: int, columns: int) -> None:
        self.places, self.columns = places, columns
        device = model.device
        like = fresh_state(model, 1)
        self._slot_count = 0
        slots = model.lasting_slots(like)

        def ring(cache: KVCache) -> KVRing:
            window = model.config.wide_window if cache is like.wide else model.config.window
            return KVRing.empty(cache, places, columns + (window or 0) - (model.config.window or 0), window)

        def empty(value: Tensor) -> Tensor:
            return value.expand(places, *value.shape[1:]).clone()

        state = renewed(like, empty, ring)
        if slots is not None and len(model.blocks):
            self._slot_count = slots[0].shape[1]
            for name, rings in _deep_rings(state):
                state = replace(state, **{name: _with_slots(rings, self._slot_count)})  # type: ignore[arg-type]
        whole = torch.zeros(places, dtype=torch.int64, device=device)
        real = torch.zeros(places, dtype=torch.float32, device=device)
        drafter, width = model.idea("drafter"), model.config.width
        seen = torch.zeros(places, drafter.seen_width if drafter else width, dtype=model.dtype, device=device)
        text = remembered([[]], device).expand(places, -1).clone()
        index, top_k, rounds = whole.clone(), whole.clone(), whole.clone()
        stream, depth = whole.new_zeros(places, 2), real.double()
        rows = Rows(whole, seen, text, index, stream, real, real.clone(), top_k, rounds, depth, depth.clone())
        self.held = Held(state, rows)

    @property
    def keeps_slots(self) -> bool:
        """Whether keys and values of slots are kept."""
        return self._slot_count > 0

    @property
    def nbytes(self) -> int:
        """Bytes of all sequences."""
        return sum(each.nbytes for each in self.tensors())

    def tensors(self) -> list[Tensor]:
        """Return all tensors, in an order that does not change."""
        found: list[Tensor] = []

        def of_ring(ring: KVRing) -> KVRing:
            found.extend([*ring.keys, *ring.values, *(each for pair in ring.slots for each in pair)])
            return ring

        def of_tensor(value: Tensor) -> Tensor:
            found.append(value)
            return value

        renewed(self.held, of_tensor, of_ring)
        return found

    @contextmanager
    def holding(self, tensors: list[Tensor]) -> Iterator[None]:
        """Hold other tensors inside the block, in the order of `tensors()`."""
        own, others = self.held, iter(tensors)

        def of_ring(ring: KVRing) -> KVRing:
            keys, values = (tuple(next(others) for _ in part) for part in (ring.keys, ring.values))
            slots = tuple((next(others), next(others)) for _ in ring.slots)
            return replace(ring, keys=keys, values=values, slots=slots)

        try:
            self.held = renewed(own, lambda _value: next(others), of_ring)
            yield
        finally:
            self.held = own

    def take(self, place_B: Tensor, *, read_slots: bool, whole: bool) -> Held:
        """Return the rows in some places: tensors as copies, kv caches as rings that a pass writes to.

        Args:
            place_B: places in rising order.
            read_slots: whether the pass may use the keys and values of slots that are kept.
            whole: whether these are all places.
        """
        position_B = self.held.state.position_B if whole else self.held.state.position_B[place_B]
        return renewed(
            self.held,
            lambda value: value if whole else value.index_select(0, place_B),
            lambda ring: ring.of_rows(place_B, position_B, read_slots=read_slots, whole=whole),
        )

    def put(self, place_B: Tensor, taken: Held, changed: Held) -> None:
        """Write back what has changed of what `take` returned. The pass has written to the rings already."""
        for own, before, value in zip(*map(leaves, (self.held, taken, changed)), strict=True):
            if isinstance(own, Tensor) and value is not before:
                own.index_copy_(0, place_B, value.to(own.dtype))

    def load(self, place_B: Tensor, held: Held) -> None:
        """Write states with caches as a pass over prompts returns them."""
        position_B = held.state.position_B
        for own, value in zip(leaves(self.held), leaves(held), strict=True):
            if isinstance(own, Tensor):
                own.index_copy_(0, place_B, value.to(own.dtype))
            else:
                own.load(place_B, value, position_B)

    def read(self, place: int, model: Network) -> State:
        """Return the state of one sequence, in the form of `Network.new_state`."""
        position = int(self.held.state.position_B[place])
        shift = model.config.shifted_keys
        return renewed(
            self.held.state,
            lambda value: value[place : place + 1].clone(),
            lambda ring: ring.read(place, position, position if ring.window is None else ring.window - 1 + shift),
        )

    def keep_slots(self, model: Network, place_B: Tensor, state: State) -> None:
        """Compute the keys and values of the slots of some rows, whose state is given, and keep them."""
        slots = model.lasting_slots(state)
        if slots is None:
            return
        kept = {name: iter(ring.slots) for name, ring in _deep_rings(self.held.state)}
        for block, is_wide in zip(model.blocks, model.config.wide_layers, strict=True):
            keys, values = next(kept["wide" if is_wide else "deep"])
            attention = cast(Block, block).attention
            k_BCKH, v_BCKH = attention.key_value(slots[0], None, slots[1])
            keys.index_copy_(0, place_B, k_BCKH)
            values.index_copy_(0, place_B, v_BCKH)


def _deep_rings(state: State) -> list[tuple[str, KVRing]]:
    """Return the rings of the deep blocks by the names of their fields."""
    return [(name, ring) for name in ("deep", "wide") if isinstance(ring := getattr(state, name), KVRing)]


def _with_slots(ring: KVRing, count: int) -> KVRing:
    """Return a ring that also keeps the keys and values of `count` slots."""

    def nothing(like: Tensor) -> Tensor:
        return like.new_zeros(like.shape[0], count, *like.shape[2:])

    return replace(ring, slots=tuple((nothing(each), nothing(each)) for each in ring.keys))
