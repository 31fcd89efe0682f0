"""Configuration of the model: frozen, keyword-only, validated on construction."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lepton.errors import InputError, nearest


@dataclass(frozen=True, kw_only=True)
class LeptonConfig:
    """Shape of a model. Everything that decides a parameter's shape or a result stands here."""

    width: int
    """Width of the residual stream."""
    layers: int
    """Blocks in all, the stem's included."""
    heads: int
    """Query heads of a block."""
    kv_heads: int
    """Key/value heads of a block; each serves ``heads / kv_heads`` query heads (grouped-query attention)."""
    ffn: int
    """Hidden width of a block's MLP."""
    head_dim: int = 64
    """Width of a head. The first half is rotated by position, the second half is position-free."""
    stem_layers: int = 2
    """Blocks that every token passes, and whose states the ideas read."""
    window: int | None = 256
    """Tokens that a token attends to, itself included; None attends to the whole document."""
    embed_rank: int | None = None
    """Width of a factorised token embedding; None stores it at full width."""
    vocab_size: int = 50257
    """Token ids the model knows; padded inside to a multiple of 128."""
    eos_id: int = 0
    """The id that ends a document: the token after it starts anew."""
    logit_cap: float = 15.0
    """Logits are squeezed smoothly into +-logit_cap."""
    rope_base: float = 10000.0
    """Longest wavelength of the rotary positions, over 2 pi."""
    dense: bool = False
    """The baseline: the same blocks without any idea, full attention, MLP widened to equal parameters."""

    def __post_init__(self) -> None:
        for name in ("width", "layers", "heads", "kv_heads", "ffn", "head_dim", "vocab_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.heads % self.kv_heads:
            raise InputError(f"heads={self.heads} is no multiple of kv_heads={self.kv_heads}")
        if self.head_dim % 4:
            raise InputError(f"head_dim={self.head_dim}: must be a multiple of 4 (half of it is rotated, in pairs)")
        if not 0 <= self.stem_layers <= self.layers:
            raise InputError(f"stem_layers={self.stem_layers}: must lie in 0..layers={self.layers}")
        if self.window is not None and self.window < 1:
            raise InputError(f"window={self.window}: must be at least 1, or None for full attention")
        if not 0 < self.logit_cap <= 50:
            raise InputError(f"logit_cap={self.logit_cap}: must lie in 0..50, so that its exponential fits fp32")
        if not 0 <= self.eos_id < self.vocab_size:
            raise InputError(f"eos_id={self.eos_id}: must lie in 0..vocab_size-1={self.vocab_size - 1}")
        if self.dense and self.window is not None:
            raise InputError(f"window={self.window}: the dense baseline attends to everything; leave window at None")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table: a multiple of 128, which matrix units like. 50,257 becomes 50,304."""
        return -(-self.vocab_size // 128) * 128

    def replace(self, **changes: Any) -> "LeptonConfig":
        """Return a copy with `changes`; an unknown name raises InputError with the nearest match."""
        check_names(changes)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, the form that a checkpoint stores."""
        return dataclasses.asdict(self)

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> "LeptonConfig":
        """Rebuild a configuration from `to_dict`; an unknown name raises InputError with the nearest match."""
        check_names(fields)
        return LeptonConfig(**fields)


def check_names(fields: Mapping[str, Any]) -> None:
    """Raise InputError, with the nearest match, for a name that is no field of LeptonConfig."""
    known = [field.name for field in dataclasses.fields(LeptonConfig)]
    for name in fields:
        if name not in known:
            raise InputError(f"unknown configuration field '{name}'{nearest(name, known)}")
