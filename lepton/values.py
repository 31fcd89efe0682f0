"""Checks of plain numbers from callers. What cannot be used raises InputError, which names the value and the range."""

import math
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any, TypeVar, get_args

from lepton.errors import InputError, shown

Record = TypeVar("Record")
SEEDS = (-(1 << 63), (1 << 64) - 1)
"""Every seed of 64 bits, with or without a sign."""
MAX_ROUNDS = 256
"""Rounds of thinking that a call may ask for."""


@dataclass(frozen=True)
class Least:
    """A depth that is no share: a token goes past the stem if the router predicts that this saves more, in nats."""

    nats: float


def whole(name: str, value: Any, low: int, high: int | None = None, note: str = "") -> int:
    """Return `value`, a whole number (no bool) in `low`..`high`, as an int; `note` ends the message of the error."""
    whole_number = isinstance(value, Integral) and not isinstance(value, bool)
    if not whole_number or value < low or (high is not None and value > high):
        range_ = f"at least {low}" if high is None else f"in {low}..{high}"
        raise InputError(f"{name}={shown(value)}: must be a whole number, {range_}{note}")
    return int(value)


def real(value: Any) -> float:
    """Return `value` as a float, or NaN (outside every range) if it is not a real number or too large for a float."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.nan


def depth_share(depth: Any) -> float:
    """Return the share of tokens allowed past the stem; None is 1, all of them."""
    share = 1.0 if depth is None else real(depth)
    if not 0 <= share <= 1:
        raise InputError(f"depth={shown(depth)}: must lie in 0..1, the share of tokens allowed past the stem")
    return share


def depth_rule(depth: Any) -> float | Least:
    """Return the share of tokens allowed past the stem, or the least saving that lets one pass; None is all."""
    if not isinstance(depth, Least):
        return depth_share(depth)
    if not math.isfinite(real(depth.nats)):
        raise InputError(f"depth=Least({shown(depth.nats)}): must hold a finite number of nats")
    return depth


def positive_nats(value: Any, name: str = "max_cost") -> float:
    """Return nats a token that may be lost, as a float."""
    if not 0 < (nats := real(value)) < math.inf:
        raise InputError(f"{name}={shown(value)}: must be a positive number of nats a token, such as 0.02")
    return nats


def thinking_rounds(think: Any) -> int:
    """Return a number of rounds of thinking."""
    return whole("think", think, 0, MAX_ROUNDS, " rounds")


def from_record(cls: type[Record], values: Any, name: str, noun: str) -> Record:
    """Return the dataclass `cls` of the plain values that a checkpoint holds under `name`; `noun` is one of them.

    Raises:
        InputError: a field is missing, unknown, of another type, or not finite.
    """
    kinds = {each.name: get_args(each.type) or (each.type,) for each in fields(cls)}  # type: ignore[arg-type]
    if not isinstance(values, dict) or values.keys() != kinds.keys():
        raise InputError(f"'{name}' holds {shown(values)}: must have the fields {', '.join(sorted(kinds))}")
    for field, allowed in kinds.items():
        value = values[field]
        if type(value) not in allowed or (isinstance(value, float) and not abs(value) < float("inf")):
            raise InputError(f"'{name}' has {field}={shown(value)}, which no {noun} has")
    return cls(**values)
