"""The kv cache of decoding: keys and values of many sequences, written in place.

The token at position p of a sequence lies in column p mod R of its place in the pool. A ring has room for the window
and for one chunk after it, so a rejected draft needs no work: the position does not advance, and the column is written
again. Which columns a query sees follows from its position alone, whatever lies in the others.
"""

from dataclasses import dataclass, replace
from typing import TypeAlias

import torch
from torch import Tensor

from lepton.model.kv_cache import KeysValues, KVCache
from lepton.model.timeline import Timeline
from lepton.ops.attention_plan import CausalWindow
from lepton.ops.products import PRODUCTS
from lepton.ops.ring_attention import RING_ATTENTION


@dataclass(frozen=True)
class RingLayer:
    """The ring of one layer, and the rows of the pass that it is about."""

    keys: Tensor
    """Keys of all sequences of the pool, [places, R, K, H]."""
    values: Tensor
    place_B: Tensor
    """Place in the pool of each row."""
    position_B: Tensor
    """Position of the first token of the chunk."""
    slots: KeysValues | None
    """Keys and values of the slots, [places, C, K, H] each, if they are kept; None: the pass computes them."""
    whole: bool
    """Whether the rows are all places of the pool, in order."""
    window: int | None
    """Largest number of tokens that a token attends to, itself included; None: its whole document."""

    @property
    def has_kernels(self) -> bool:
        """Whether the kernels for a few tokens work with its device and dtype."""
        device, dtype = self.keys.device, self.keys.dtype
        return PRODUCTS.works(device, dtype) and RING_ATTENTION.works(device, dtype, self.keys.shape[-1])

    def written(self, k_BTKH: Tensor, v_BTKH: Tensor) -> KeysValues:
        """Write the keys and values of a chunk; return the columns of each row, [B, R, K, H]."""
        length, columns = k_BTKH.shape[1], self.keys.shape[1]
        column_BT = (self.position_B[:, None] + torch.arange(length, device=k_BTKH.device)) % columns
        place = (self.place_B[:, None], column_BT)
        self.keys.index_put_(place, k_BTKH)
        self.values.index_put_(place, v_BTKH)
        return self._of_rows(self.keys), self._of_rows(self.values)

    def kept_slots(self) -> KeysValues | None:
        """Return the kept keys and values of the slots, [B, C, K, H] each."""
        return None if self.slots is None else (self._of_rows(self.slots[0]), self._of_rows(self.slots[1]))

    def _of_rows(self, pool: Tensor) -> Tensor:
        return pool if self.whole else pool.index_select(0, self.place_B)


LayerCache: TypeAlias = KeysValues | RingLayer
"""What a layer remembers: a value, or a ring that the pass writes to."""


def joined(past: LayerCache, k_BTKH: Tensor, v_BTKH: Tensor) -> KeysValues:
    """Return the keys and values [B, J, K, H] of remembered tokens and chunk, in the order of the plan's entries."""
    if isinstance(past, RingLayer):
        return past.written(k_BTKH, v_BTKH)
    return torch.cat([past[0], k_BTKH], 1), torch.cat([past[1], v_BTKH], 1)


@dataclass(frozen=True)
class KVRing:
    """Keys and values of L layers for all sequences of a pool, and which of them a pass is about."""

    keys: tuple[Tensor, ...]
    """Of each layer: [places, R, K, H]."""
    values: tuple[Tensor, ...]
    window: int | None
    """Largest number of tokens that a token attends to, itself included; None: its whole document."""
    slots: tuple[KeysValues, ...] = ()
    """Of each layer: keys and values of the slots, [places, C, K, H] each, which stay the same until a segment opens.
    Empty: they are not kept, or the pass may not read them."""
    place_B: Tensor | None = None
    """Place in the pool of each row of the pass; None in the pool itself."""
    position_B: Tensor | None = None
    """Position of the first token of the chunk."""
    whole: bool = False
    """Whether the rows of the pass are all places, in order."""

    @staticmethod
    def empty(cache: KVCache, places: int, columns: int, window: int | None) -> "KVRing":
        """Return rings for `places` sequences, with layers, shapes and dtype of `cache`."""
        _, layers, _, heads, width = cache.keys_BLRKH.shape
        rings = [cache.keys_BLRKH.new_zeros(places, columns, heads, width) for _ in range(2 * layers)]
        return KVRing(tuple(rings[:layers]), tuple(rings[layers:]), window)

    @property
    def entries(self) -> int:
        """R: columns per layer."""
        return self.keys[0].shape[1] if self.keys else 0

    @property
    def layers(self) -> int:
        """L: layers."""
        return len(self.keys)

    def of_rows(self, place_B: Tensor, position_B: Tensor, *, read_slots: bool, whole: bool) -> "KVRing":
        """Return the same rings for a pass over the sequences in some places of the pool."""
        slots = self.slots if read_slots else ()
        return replace(self, slots=slots, place_B=place_B, position_B=position_B, whole=whole)

    def layer(self, index: int) -> RingLayer:
        """Return the ring of one layer for the rows of the pass."""
        assert self.place_B is not None, "a pass is about some rows"
        assert self.position_B is not None
        slots = self.slots[index] if self.slots else None
        own = self.keys[index], self.values[index]
        return RingLayer(*own, self.place_B, self.position_B, slots, self.whole, self.window)

    def after(self, chunk: object, count_B: Tensor, timeline: Timeline, remembered: int | None) -> "KVRing":
        """Return itself: the pass has written the chunk, and the position of the state says what of it counts."""
        return self

    def load(self, place_B: Tensor, cache: KVCache, position_B: Tensor) -> None:
        """Write the entries of a cache of rows, whose next tokens have positions `position_B`, to places of the pool.

        The most recent entries are written, as many as there are columns.
        """
        count = min(cache.entries, self.entries)
        age_R = torch.arange(count, 0, -1, device=position_B.device)
        place = (place_B[:, None], (position_B[:, None] - age_R) % self.entries)
        for layer in range(len(self.keys)):
            self.keys[layer].index_put_(place, cache.keys_BLRKH[:, layer, cache.entries - count :])
            self.values[layer].index_put_(place, cache.values_BLRKH[:, layer, cache.entries - count :])

    def read(self, place: int, position: int, entries: int) -> KVCache:
        """Return the cache of one sequence, whose next token has `position`, [1, L, R = `entries`, K, H]."""
        index_R = torch.arange(position - entries, position, device=self.keys[0].device)
        columns, here_R11 = index_R % self.entries, (index_R >= 0)[:, None, None]
        keys, values = (
            torch.stack([ring[place, columns] for ring in rings])[None] for rings in (self.keys, self.values)
        )
        return KVCache(keys.where(here_R11, 0), values.where(here_R11, 0))


@dataclass(frozen=True)
class RingWindow(CausalWindow):
    """The causal window of a chunk that a ring remembers: kv entries are columns, in no order."""

    @staticmethod
    def over(position_BT: Tensor, *, columns: int, window: int | None, dtype: torch.dtype) -> "RingWindow":
        """Return the window of a chunk that lies in one document.

        The newest column holds the chunk's last token, the one before it the token before, and so on round the ring.
        """
        length = position_BT.shape[1]
        column_R = torch.arange(columns, device=position_BT.device)
        before_BR = (position_BT[:, -1:] - column_R) % columns  # tokens between the column's and the chunk's last
        later_T = length - 1 - torch.arange(length, device=position_BT.device)
        distance_BTR = before_BR[:, None] - later_T[:, None]
        reach_BT = position_BT if window is None else position_BT.clamp(max=window - 1)
        mask_BTR = (distance_BTR >= 0) & (distance_BTR <= reach_BT[..., None])
        masks = ((slice(0, length), slice(0, columns), mask_BTR),)
        starts_BR = position_BT[:, -1:] == before_BR
        return RingWindow(position_BT, columns - length, window, dtype, None, masks, starts_BR)

    def mask_of(self, query_BQ: Tensor) -> Tensor:
        ((_, _, mask_BTR),) = self.masks
        return mask_BTR.gather(1, query_BQ[..., None].expand(-1, -1, mask_BTR.shape[2]))
