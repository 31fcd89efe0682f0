"""The kv cache: keys and values of remembered tokens, as an immutable value."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lepton.config import LeptonConfig
from lepton.model.timeline import Timeline

KeysValues = tuple[Tensor, Tensor]
"""Keys and values of one layer, [B, ..., K, H] each."""


@dataclass(frozen=True)
class KVCache:
    """Keys and values of the last R tokens in L layers, oldest first. Entries from before the document are 0."""

    keys_BLRKH: Tensor
    values_BLRKH: Tensor

    @staticmethod
    def fresh(
        config: LeptonConfig,
        layers: int,
        rows: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        allocate: bool,
        wide: bool = False,
    ) -> "KVCache":
        """Return the cache of `rows` sequences that have read nothing; without `allocate`, R is 0.

        `wide` says whether it is that of wide blocks.
        """
        entries = ((config.remembered_wide if wide else config.remembered) or 0) if allocate else 0
        nothing = torch.zeros(rows, layers, entries, config.kv_heads, config.head_dim, dtype=dtype, device=device)
        return KVCache(nothing, nothing)

    @property
    def entries(self) -> int:
        """R: entries per layer."""
        return self.keys_BLRKH.shape[2]

    @property
    def layers(self) -> int:
        """L: layers."""
        return self.keys_BLRKH.shape[1]

    def layer(self, index: int) -> KeysValues:
        """Return keys and values [B, R, K, H] of one layer."""
        return self.keys_BLRKH[:, index], self.values_BLRKH[:, index]

    def after(
        self, chunk: Sequence[KeysValues], count_B: Tensor, timeline: Timeline, remembered: int | None
    ) -> "KVCache":
        """Return the cache after the first `count_B` tokens of a chunk with keys and values `chunk` in each layer."""
        position_B = timeline.position_after(count_B)
        entries = int(position_B.max()) if remembered is None else remembered
        nothing = self.keys_BLRKH[:, :, :0]  # a model may have no deep blocks
        keys, values = (torch.stack(each, 1) for each in zip(*chunk, strict=True)) if chunk else (nothing, nothing)
        return KVCache(
            _advance(self.keys_BLRKH, keys, count_B, position_B, entries),
            _advance(self.values_BLRKH, values, count_B, position_B, entries),
        )


def _advance(past: Tensor, chunk_BLTKH: Tensor, count_B: Tensor, position_B: Tensor, entries: int) -> Tensor:
    """Return the last R = `entries` entries up to the first `count_B` tokens of the chunk, [B, L, R, K, H].

    `past` are the entries before the chunk; their number may differ. Entries from before the current document, of which
    `position_B` tokens have been read, become 0.
    """
    joined_BLJKH = torch.cat([past, chunk_BLTKH], 2)
    source_BR = torch.arange(past.shape[2] - entries, past.shape[2], device=count_B.device) + count_B[:, None]
    in_document_BR = torch.arange(entries, device=count_B.device) >= entries - position_B[:, None]
    index_B1R11 = source_BR.clamp(min=0)[:, None, :, None, None]
    _, layers, _, heads, width = joined_BLJKH.shape
    kept_BLRKH = joined_BLJKH.gather(2, index_B1R11.expand(-1, layers, -1, heads, width))
    return kept_BLRKH.where(in_document_BR[:, None, :, None, None], 0)
