"""Configuration of the model: frozen, keyword-only, validated on construction."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lepton.errors import InputError, nearest, shown

MOST = {
    "width": 1 << 15,
    "layers": 256,
    "heads": 1024,
    "kv_heads": 1024,
    "ffn": 1 << 18,
    "head_dim": 1024,
    "stem_layers": 256,
    "window": 1 << 17,
    "embed_rank": 1 << 15,
    "vocab_size": 1 << 21,
    "eos_id": 1 << 21,
    "segment": 1 << 17,
    "thoughts": 1024,
    "thought_ffn": 1 << 18,
    "rounds": 256,
    "memory_heads": 1024,
    "key_dim": 4096,
    "value_dim": 4096,
    "slots": 1 << 16,
    "crystals": 1024,
    "hint": 1 << 15,
    "peek": 1024,
    "exit_width": 1 << 18,
    "capacity_window": 1 << 20,
    "drafts": 64,
    "draft_width": 1 << 15,
    "draft_vocab": 1 << 21,
}
"""Largest values: far above XXL's, and small enough that a model without memory (on the meta device) is built in about
a second, so that a file's configuration can be compared with its weights before any memory is taken."""


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
    segment: int = 64
    """Tokens of a segment: each opens with a group of thoughts and closes with its best crystals."""
    thoughts: int = 4
    """Thought tokens of a group; 0 leaves the idea out."""
    thought_ffn: int = 768
    """Hidden width of the thinking block's MLP."""
    rounds: int = 2
    """Rounds of thinking, where a call does not say."""
    memory_heads: int = 4
    """Heads of the working memory; 0 leaves it out."""
    key_dim: int = 64
    """Width of a working memory's keys."""
    value_dim: int = 128
    """Width of a working memory's values."""
    slots: int = 64
    """Crystals that are kept; 0 leaves the idea out."""
    crystals: int = 4
    """Crystals that a closing segment offers."""
    hint: int = 64
    """Width of the hint about what comes; 0 leaves the idea out."""
    peek: int = 8
    """Tokens ahead that the hint is taught to summarise, the next one excluded."""
    router: bool = True
    """Whether tokens can stop after the stem."""
    exit_width: int = 384
    """Hidden width of the adapter through which easy tokens leave."""
    capacity_window: int = 64
    """Tokens over which the share of deep tokens is kept."""
    drafts: int = 4
    """Tokens drafted at once; 0 leaves the idea out."""
    draft_width: int = 256
    """Width of the drafting cell."""
    draft_vocab: int = 4096
    """Frequent tokens that the drafter can propose."""
    uncertainty: bool = True
    """Whether the model estimates the chance that it is wrong."""
    dense: bool = False
    """The baseline: the same blocks without any idea, full attention, MLP widened to equal parameters."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            check_type(field.name, getattr(self, field.name), field.type)
        for name, most in MOST.items():
            if abs(getattr(self, name) or 0) > most:
                raise InputError(f"{name}={shown(getattr(self, name))}: must be at most {most:,}")
        for name in ("width", "layers", "heads", "kv_heads", "ffn", "head_dim"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={shown(getattr(self, name))}: must be at least 1")
        if self.vocab_size < 2:
            raise InputError(f"vocab_size={self.vocab_size}: must be at least 2")
        if self.embed_rank is not None and self.embed_rank < 1:
            raise InputError(f"embed_rank={self.embed_rank}: must be at least 1, or None for the full width")
        if not 1 <= self.rope_base <= 1e12:
            raise InputError(f"rope_base={shown(self.rope_base)}: must lie in 1..1e12")
        if self.heads % self.kv_heads:
            raise InputError(f"heads={self.heads} is no multiple of kv_heads={self.kv_heads}")
        if self.head_dim % 4:
            raise InputError(f"head_dim={self.head_dim}: must be a multiple of 4 (half of it is rotated, in pairs)")
        if not 0 <= self.stem_layers <= self.layers:
            raise InputError(f"stem_layers={self.stem_layers}: must lie in 0..layers={self.layers}")
        if self.window is not None and self.window < 1:
            raise InputError(f"window={self.window}: must be at least 1, or None for full attention")
        if not 0 < self.logit_cap <= 50:
            raise InputError(f"logit_cap={shown(self.logit_cap)}: must lie in 0..50, so that its exponential fits fp32")
        if not 0 <= self.eos_id < self.vocab_size:
            raise InputError(f"eos_id={self.eos_id}: must lie in 0..vocab_size-1={self.vocab_size - 1}")
        if self.dense:
            self._check_dense()
        else:
            self._check_ideas()

    def _check_dense(self) -> None:
        if self.window is not None:
            raise InputError(f"window={self.window}: the dense baseline attends to everything; leave window at None")
        for name in ("thoughts", "memory_heads", "slots", "hint", "router", "drafts", "uncertainty"):
            if getattr(self, name):
                raise InputError(f"{name}={getattr(self, name)}: the dense baseline has no ideas; leave it off")

    def _check_ideas(self) -> None:
        names = ("thoughts", "memory_heads", "slots", "hint", "drafts", "rounds")
        for name in names:
            if getattr(self, name) < 0:
                raise InputError(f"{name}={getattr(self, name)}: must be at least 0")
        widths = ("thought_ffn", "key_dim", "value_dim", "exit_width", "draft_width")
        for name in ("segment", "crystals", "capacity_window", *widths):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: must be at least 1")
        if self.window is not None and self.segment > self.window:
            raise InputError(f"segment={self.segment}: must not be longer than window={self.window}")
        if self.slots and self.window is None:
            raise InputError("slots: crystals appear where the window ends; give a window, or slots=0")
        if self.hint and self.peek < 2:
            raise InputError(f"peek={self.peek}: must be at least 2, since the next token is not part of the hint")
        if self.drafts and not 1 <= self.draft_vocab <= self.vocab_size:
            raise InputError(f"draft_vocab={self.draft_vocab}: must lie in 1..vocab_size={self.vocab_size}")

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
        if not isinstance(fields, Mapping):
            raise InputError(f"a configuration is a dict of fields, not {shown(fields)}")
        check_names(fields)
        needed = [field.name for field in dataclasses.fields(LeptonConfig) if field.default is dataclasses.MISSING]
        if missing := [name for name in needed if name not in fields]:
            raise InputError(f"the configuration lacks '{missing[0]}'")
        return LeptonConfig(**fields)


_KINDS: dict[Any, str] = {
    int: "a whole number (int)",
    int | None: "a whole number (int), or None",
    float: "a number",
    bool: "True or False",
    bool | None: "True, False or None",
    str: "a text",
    str | None: "a text, or None",
}


def check_type(name: str, value: Any, kind: Any) -> None:
    """Raise InputError unless `value` is of the type of a field, which is one of `_KINDS`."""
    wanted: Any = float | int if kind is float else kind
    if not isinstance(value, wanted) or (isinstance(value, bool) and kind not in (bool, bool | None)):
        raise InputError(f"{name}={shown(value)}: must be {_KINDS[kind]}")


def check_fields(fields: Mapping[str, Any]) -> None:
    """Raise InputError for a name that is no field of LeptonConfig, or a value of another type than the field's."""
    check_names(fields)
    kinds = {field.name: field.type for field in dataclasses.fields(LeptonConfig)}
    for name, value in fields.items():
        check_type(name, value, kinds[name])


def check_names(fields: Mapping[str, Any]) -> None:
    """Raise InputError, with the nearest match, for a name that is no field of LeptonConfig."""
    known = [field.name for field in dataclasses.fields(LeptonConfig)]
    for name in fields:
        if name not in known:
            raise InputError(f"unknown configuration field {shown(name)}{nearest(name, known)}")
