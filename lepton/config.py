"""Configuration of the model: frozen, keyword-only, validated on construction.

`LeptonConfig` holds the shape of the trunk, and one `IdeaConfig` for each idea that the model has. The fields of an
idea are declared beside its module, in `lepton/model/ideas/`, and registered there.
"""

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

from lepton.errors import InputError, nearest, shown

MOST = {
    "width": 1 << 15,
    "layers": 256,
    "heads": 1024,
    "kv_heads": 1024,
    "ffn": 1 << 18,
    "head_dim": 1024,
    "window": 1 << 17,
    "wide_window": 1 << 17,
    "embed_rank": 1 << 15,
    "vocab_size": 1 << 21,
    "segment": 1 << 17,
}
"""Largest values, far above XXL's. With them, a model is built on the meta device in about a second. So a file's
configuration can be compared with its weights before any memory is taken."""

WIDE_EVERY = 4
"""With `wide_window`, one deep block in so many attends to more tokens than the others."""


@dataclass(frozen=True, kw_only=True)
class IdeaConfig:
    """The fields of one idea."""

    name: ClassVar[str]
    """The idea's attribute in the model, and its name in checkpoints, overrides and on the command line."""
    reads_top: ClassVar[bool] = False
    """Whether it reads the last hidden states, instead of contributing to the pass."""
    most: ClassVar[Mapping[str, int]] = {}
    """Largest value of each field that is a size; see `MOST`."""
    flat: ClassVar[Mapping[str, str]] = {}
    """Old flat configurations: their name -> present field."""
    flat_switch: ClassVar[str] = ""
    """The flat name whose value 0 or False means that the idea is left out."""

    def __post_init__(self) -> None:
        _check_fields(self, self.most, f"{self.name}.")

    def check(self, config: "LeptonConfig") -> None:
        """Raise InputError for values that do not fit each other or the model."""

    def build(self, config: "LeptonConfig") -> Any:
        """Return the idea's module for a model of this configuration."""
        raise NotImplementedError

    def feature_width(self, config: "LeptonConfig") -> int:
        """Return the width of its `Contribution.feature_BTF`; 0: it has none."""
        return 0

    @classmethod
    def preset(cls, size: str, width: int) -> Self:
        """Return the configuration for one of the eight sizes, of this width."""
        return cls()

    def at_least(self, low: int, *names: str) -> None:
        """Raise InputError for a field below `low`."""
        for name in names:
            if getattr(self, name) < low:
                raise InputError(f"{self.name}.{name}={getattr(self, name)}: must be at least {low}")


IDEAS: dict[str, type[IdeaConfig]] = {}
"""Every registered idea by its name, in the order in which they run."""


def register(*ideas: type[IdeaConfig]) -> None:
    """Make ideas known to `LeptonConfig.from_dict` and `LeptonConfig.replace`. They run after earlier ones."""
    IDEAS.update({idea.name: idea for idea in ideas})


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
    wide_window: int | None = None
    """The same for the wide blocks, every `WIDE_EVERY`-th deep block from the last one down; None: there are none."""
    embed_rank: int | None = None
    """Width of a factorised token embedding; None stores it at full width."""
    vocab_size: int = 50257
    """Token ids the model knows; padded inside to a multiple of 128."""
    eos_id: int = 0
    """The id that ends a document: the token after it starts anew."""
    logit_cap: float = 15.0
    """Logits are squeezed smoothly into +-logit_cap."""
    rope_base: float = 10000.0
    """Base of the rotary positions: their wavelengths lie between 2 pi and 2 pi times it."""
    segment: int = 64
    """Tokens of a segment, the unit in which ideas open and close something."""
    shifted_keys: bool = False
    """Whether every second block takes the position-free half of a token's key from the token before it: one layer then
    finds what followed an earlier occurrence of the present token (Jordan et al., 2025: modded-nanogpt)."""
    token_shift: bool = False
    """Whether the embedding of the token before is added to that of each token, times a learned number a channel."""
    backout: bool = False
    """Whether the residual stream after the middle block, times a learned number, is subtracted before the head: what
    the blocks above no longer need then does not disturb the prediction (Karpathy, 2025: nanochat)."""
    slot_bias: bool = True
    """Whether the last coordinate of each head carries the bias of slots' attention scores, rather than a number of
    the token's own."""
    ideas: tuple[IdeaConfig, ...] = ()
    """The ideas, in the order in which they run."""

    def __post_init__(self) -> None:
        _check_fields(self, MOST)
        for name in ("width", "layers", "heads", "kv_heads", "ffn", "head_dim", "segment"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={shown(getattr(self, name))}: must be at least 1")
        if self.vocab_size < 2:
            raise InputError(f"vocab_size={self.vocab_size}: must be at least 2")
        if self.embed_rank is not None and self.embed_rank < 1:
            raise InputError(f"embed_rank={self.embed_rank}: must be at least 1, or None for the full width")
        if not 1 <= self.rope_base <= 1e12:
            raise InputError(f"rope_base={shown(self.rope_base)}: must lie in 1..1e12")
        if self.heads % self.kv_heads:
            raise InputError(f"heads={self.heads} is not a multiple of kv_heads={self.kv_heads}")
        if self.head_dim % 4:
            raise InputError(f"head_dim={self.head_dim}: must be a multiple of 4 (half of it is rotated, in pairs)")
        if not 0 <= self.stem_layers <= self.layers:
            raise InputError(f"stem_layers={self.stem_layers}: must lie in 0..layers={self.layers}")
        if self.window is not None and self.window < 1:
            raise InputError(f"window={self.window}: must be at least 1, or None for full attention")
        if self.wide_window is not None and (self.window is None or self.wide_window < self.window):
            raise InputError(f"wide_window={self.wide_window}: must be at least window={self.window}, or None")
        if not 0 < self.logit_cap <= 50:
            raise InputError(f"logit_cap={shown(self.logit_cap)}: must lie in 0..50, so that its exponential fits fp32")
        if not 0 <= self.eos_id < self.vocab_size:
            raise InputError(f"eos_id={shown(self.eos_id)}: must lie in 0..vocab_size-1={self.vocab_size - 1}")
        for idea in _checked(self.ideas):
            idea.check(self)

    def check_segment(self) -> None:
        """Raise InputError if a segment is longer than the attention window."""
        if self.window is not None and self.segment > self.window:
            raise InputError(f"segment={self.segment}: must not be longer than window={self.window}")

    @property
    def dense(self) -> bool:
        """Whether the model is a plain transformer, without any idea."""
        return not self.ideas

    @property
    def remembered(self) -> int | None:
        """Tokens before a chunk whose keys and values are kept: the window of its first token, and with `shifted_keys`
        one more. None: all of the document."""
        return self._remembered(self.window)

    @property
    def remembered_wide(self) -> int | None:
        """The same in wide blocks."""
        return self._remembered(self.wide_window)

    def _remembered(self, window: int | None) -> int | None:
        return None if window is None else window - 1 + self.shifted_keys

    @property
    def wide_layers(self) -> tuple[bool, ...]:
        """Whether each deep block, from the first one up, is a wide one."""
        deep = self.layers - self.stem_layers
        return tuple(self.wide_window is not None and above % WIDE_EVERY == 0 for above in reversed(range(deep)))

    @property
    def middle(self) -> int:
        """The block, counted from 0 with the stem's, whose stream `backout` subtracts; never below the stem's last."""
        return max(self.layers // 2, self.stem_layers - 1)

    def shifts_keys(self, layer: int) -> bool:
        """Return whether block `layer`, counted from 0 with the stem's, has shifted keys."""
        return self.shifted_keys and layer % 2 == 1

    def idea(self, name: str) -> Any:
        """Return the configuration of the idea called `name`; None: the model is without it."""
        return next((idea for idea in self.ideas if idea.name == name), None)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding table: a multiple of 128, which matrix units like. 50,257 becomes 50,304."""
        return -(-self.vocab_size // 128) * 128

    def replace(self, **changes: Any) -> "LeptonConfig":
        """Return a copy with `changes`.

        A name is one of four: a field; an idea (None or False leaves it out, True or a mapping of its fields puts it
        in); a field of an idea, such as ``thoughts.rounds``; a name of flat configurations, such as ``rounds``. A field
        of an absent idea changes nothing.

        Raises:
            InputError: an unknown name, with the nearest match, or a value that does not fit.
        """
        own = {name: changes.pop(name) for name in list(changes) if name in _names(LeptonConfig)}
        ideas = _changed(_checked(own.pop("ideas", self.ideas)), changes, self.width)
        return dataclasses.replace(self, **own, ideas=ideas)

    def flat_dict(self) -> dict[str, Any]:
        """Return the fields by names such as ``thoughts.rounds``; an idea that is left out is None."""
        own = {name: getattr(self, name) for name in _names(LeptonConfig) if name != "ideas"}
        present = {f"{idea.name}.{name}": getattr(idea, name) for idea in self.ideas for name in _names(type(idea))}
        return {**own, **{name: None for name in IDEAS if self.idea(name) is None}, **present}

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values, the form that a checkpoint stores."""
        own = {name: getattr(self, name) for name in _names(LeptonConfig)}
        return {**own, "ideas": {idea.name: dataclasses.asdict(idea) for idea in self.ideas}}

    @staticmethod
    def from_dict(fields: Mapping[str, Any]) -> "LeptonConfig":
        """Rebuild a configuration from `to_dict`, or from the flat form of older checkpoints, which has no `ideas`.

        Raises:
            InputError: an unknown name, with the nearest match, or a value that does not fit.
        """
        if not isinstance(fields, Mapping):
            raise InputError(f"a configuration is a dict of fields, not {shown(fields)}")
        needed = [field.name for field in dataclasses.fields(LeptonConfig) if field.default is dataclasses.MISSING]
        if missing := [name for name in needed if name not in fields]:
            raise InputError(f"the configuration lacks '{missing[0]}'")
        own = {name: value for name, value in fields.items() if name in _names(LeptonConfig) and name != "ideas"}
        rest = {name: value for name, value in fields.items() if name not in own}
        if "ideas" in rest:
            ideas = rest.pop("ideas")
            if not isinstance(ideas, Mapping) or not all(isinstance(part, Mapping) for part in ideas.values()):
                raise InputError(f"ideas={ideas!r}: must hold the fields of each idea by its name")
            parts = _changed([IDEAS[name]() for name in ideas if name in IDEAS], {**rest, **ideas}, 0)
            return LeptonConfig(**own, ideas=parts)
        dense = rest.pop("dense", False)
        check_names(rest)
        # Only the ideas that there were then: a later one has no flat names.
        flat = [idea() for idea in IDEAS.values() if idea.flat_switch]
        ideas = () if dense else _changed(flat, rest, 0)
        return LeptonConfig(**{"slot_bias": not dense, **own}, ideas=ideas)


def check_names(fields: Mapping[str, Any]) -> None:
    """Raise InputError, with the nearest match, for a name that `LeptonConfig.replace` does not know."""
    _by_idea({name: value for name, value in fields.items() if name not in _names(LeptonConfig)})


def _checked(ideas: Any) -> tuple[IdeaConfig, ...]:
    """Return `ideas`, which a caller may have given. Raises InputError unless they are a tuple of `IdeaConfig`."""
    if not isinstance(ideas, tuple) or not all(isinstance(idea, IdeaConfig) for idea in ideas):
        raise InputError(f"ideas={shown(ideas)}: must be a tuple of the ideas' configurations")
    return ideas


def _names(kind: type) -> list[str]:
    return [field.name for field in dataclasses.fields(kind)]


def _changed(ideas: Iterable[IdeaConfig], changes: Mapping[str, Any], width: int) -> tuple[IdeaConfig, ...]:
    """Return `ideas` with `changes`, whose names are those that `LeptonConfig.replace` takes."""
    parts = {idea.name: idea for idea in ideas}
    for name, (switch, fields) in _by_idea(changes).items():
        if switch is False:
            parts.pop(name, None)
        elif name in parts or switch:
            part = parts[name] if name in parts else IDEAS[name].preset("", width)
            parts[name] = dataclasses.replace(part, **fields)
    order = [*IDEAS, *parts]
    return tuple(sorted(parts.values(), key=lambda part: order.index(part.name)))


def _by_idea(changes: Mapping[str, Any]) -> dict[str, tuple[bool | None, dict[str, Any]]]:
    """Sort changes by idea: whether it is switched on or off (None: it stays), and its fields that change."""
    flat = {old: (idea, field) for idea in IDEAS.values() for old, field in idea.flat.items()}
    found: dict[str, tuple[bool | None, dict[str, Any]]] = {}
    for name, value in changes.items():
        idea, dot, field = str(name).partition(".")
        fields: dict[str, Any] = {}
        switch: bool | None = None
        if name in IDEAS and (value is None or isinstance(value, Mapping | bool)):
            switch = value is not None and value is not False
            fields = dict(value) if isinstance(value, Mapping) else {}
        elif name in flat:
            idea, field = flat[name][0].name, flat[name][1]
            fields = {field: value}
            switch = bool(value) if name == flat[name][0].flat_switch else None
        elif dot and idea in IDEAS:
            fields = {field: value}
        else:
            known = [*_names(LeptonConfig), *IDEAS, *flat]
            hint = nearest(name, known) if IDEAS else "; the ideas are known once lepton.model is imported"
            raise InputError(f"unknown configuration field {shown(name)}{hint}")
        for field in fields:
            if field not in (own := _names(IDEAS[idea])):
                raise InputError(f"unknown configuration field {idea}.{shown(field)}{nearest(field, own)}")
        before, others = found.get(idea, (None, {}))
        found[idea] = (before if switch is None else switch, {**others, **fields})
    return found


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


def _check_fields(config: Any, most: Mapping[str, int], prefix: str = "") -> None:
    """Raise InputError for a field of a wrong type, or beyond its largest value."""
    for field in dataclasses.fields(config):
        name, value = prefix + field.name, getattr(config, field.name)
        if field.type in _KINDS:
            check_type(name, value, field.type)
        if field.name in most and abs(value or 0) > most[field.name]:
            raise InputError(f"{name}={shown(value)}: must be at most {most[field.name]:,}")
