"""The options of a generation: defined here once, for Python and the command line."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypedDict, Unpack

from lepton.errors import InputError, nearest, shown
from lepton.values import SEEDS, Least, depth_rule, positive_nats, real, thinking_rounds, whole

Stop: TypeAlias = int | Sequence[int] | Sequence[Sequence[int]]
"""A token id; a list of ids, any of which ends the text; or a list of id sequences, any of which ends it. So a text is
`[tokenizer.encode(text)]`. Tensors and arrays of integers are as good."""


def _flag(text: str, metavar: str | None = None) -> dict[str, Any]:
    """Return how the command line presents a field: the help text of its flag, and the name of its value."""
    return {"help": text, "metavar": metavar}


@dataclass(frozen=True, kw_only=True)
class GenerationOptions:
    """How to generate. A value that no model can use raises InputError, `stop` once the vocabulary is known.

    Each field is an argument of every `Lepton.generate...` and a flag of `python -m lepton generate`.
    """

    max_new_tokens: int = field(default=100, metadata=_flag("tokens to generate at most", "N"))
    """Generation ends earlier after the model's end-of-document id, or after one of `stop`."""
    temperature: float = field(default=0.8, metadata=_flag("0 is greedy", "X"))
    """What logits are divided by; 0 takes the most probable token."""
    top_p: float = field(default=0.9, metadata=_flag("1 keeps every token", "X"))
    """Share of the probability that is kept, from the most probable tokens down (Holtzman et al. 2019)."""
    top_k: int | None = field(default=None, metadata=_flag("most probable tokens to keep (default: all)", "N"))
    """How many of the most probable tokens are kept; None keeps all. It comes before `top_p`."""
    use_speculative: bool = field(default=True, metadata=_flag("decode one token per step, without drafts"))
    """Whether several tokens are drafted and then verified in one pass, where the model has a drafter.

    The text is the same with and without it, also of a seed. How many tokens are drafted is decided by measured times:
    none where that is faster.
    """
    seed: int | None = field(default=None, metadata=_flag("makes sampling repeatable", "N"))
    """Any of 64 bits. Row r draws from the stream (seed, r); asking for more tokens changes none of the first ones."""
    stop: Stop | None = field(
        default=None,
        metadata=_flag(r"end after this text; \n is a new line, \t a tab, \\ a backslash", "TEXT"),
    )
    """Ends a row once it has been produced; what ended it is kept. For a text give `[tokenizer.encode(text)]`."""
    depth: float | Least | None = field(
        default=None,
        metadata=_flag(
            "share of tokens that may pass all blocks; the others stop after the first two (default: 1)", "X"
        ),
    )
    """Share of the tokens allowed past the stem, in 0..1, or the `Least` saving that lets one pass; None is 1."""
    max_cost: float | None = field(
        default=None,
        metadata=_flag(
            "instead of --depth: nats per token that skipping blocks may cost; calibrate --max_cost X comes first",
            "X",
        ),
    )
    """In place of `depth`: a token stays in the stem if its predicted saving is below the threshold that
    ``python -m lepton calibrate --max_cost`` found for this number of nats, so that the mean loss is kept."""
    think: int | None = field(default=None, metadata=_flag("rounds of thinking (default: the model's own)", "N"))
    """Rounds of thinking, 0 to 256; None is the number that the configuration says."""

    def __post_init__(self) -> None:
        whole("max_new_tokens", self.max_new_tokens, 0)
        check_sampling(self.temperature, self.top_p, self.top_k)
        if self.seed is not None:
            whole("seed", self.seed, *SEEDS)
        depth_rule(self.depth)
        if self.max_cost is not None:
            positive_nats(self.max_cost)
            if self.depth is not None:
                raise InputError(
                    f"max_cost={shown(self.max_cost)} with depth={shown(self.depth)}: each says which tokens skip "
                    "blocks, so give one of them"
                )
        if self.think is not None:
            thinking_rounds(self.think)
        if not isinstance(self.use_speculative, bool):
            raise InputError(f"use_speculative={shown(self.use_speculative)}: must be True or False")


class OptionFields(TypedDict, total=False):
    """The fields of `GenerationOptions` as keyword arguments, for editors and type checkers.

    `max_new_tokens` is missing: the methods take it by position, too.
    """

    temperature: float
    top_p: float
    top_k: int | None
    use_speculative: bool
    seed: int | None
    stop: Stop | None
    depth: float | Least | None
    max_cost: float | None
    think: int | None


def resolved(
    options: GenerationOptions | None, max_new_tokens: int | None = None, **fields: Unpack[OptionFields]
) -> GenerationOptions:
    """Return `options`, or the defaults, with the values that were given by name in their place.

    Raises:
        InputError: a value that cannot be used.
        TypeError: an unknown option; the nearest one is named.
    """
    if isinstance(max_new_tokens, GenerationOptions):
        raise InputError("max_new_tokens is a GenerationOptions: give it by name, options=...")
    if options is None:
        options = GenerationOptions()
    elif not isinstance(options, GenerationOptions):
        raise InputError(f"options={shown(options)}: give GenerationOptions(...), or each option by its name")
    known = [each.name for each in dataclasses.fields(GenerationOptions)]
    for name in fields:
        if name not in known:
            raise TypeError(f"unexpected argument {name!r}{nearest(name, [*known, 'options', 'state', 'memory'])}")
    counts = {} if max_new_tokens is None else {"max_new_tokens": max_new_tokens}
    return dataclasses.replace(options, **fields, **counts)


def check_sampling(temperature: float, top_p: float, top_k: int | None) -> None:
    """Raise InputError for a value that does not define a distribution."""
    if not 0 <= real(temperature) < math.inf:
        raise InputError(f"temperature={shown(temperature)}: must be 0 (greedy) or a positive number")
    if not 0 < real(top_p) <= 1:
        raise InputError(f"top_p={shown(top_p)}: must lie in (0, 1]; 1 keeps every token")
    if top_k is not None:
        whole("top_k", top_k, 1, note="; leave it out (None) to keep every token")
