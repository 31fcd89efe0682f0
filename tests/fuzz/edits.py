"""One thing wrong in nested dicts, lists and tensors."""

import copy
import math
from collections.abc import Callable
from random import Random
from typing import Any

import torch

SCALARS = (
    None, True, False, 0, -1, 1, 2**31, 2**63, -(2**63) - 1, 10**30, 0.5, -0.0, 1e300, math.nan, math.inf, -math.inf,
    "",
    "x", "\0", "\ud800", "9" * 50, [], {}, [[]], [None], {"": None}, ["a", 1], {"a": {"b": []}},
)  # fmt: skip
"""JSON values in the place of others."""


def _number_in(random: Random, value: torch.Tensor) -> torch.Tensor:
    if value.numel():
        odd = (
            [math.nan, math.inf, -math.inf, -1.0, 1e38]
            if value.is_floating_point()
            else [-1, -(2**63), 2**62, 10**6, 1]
        )
        flat = value.reshape(-1)
        flat[random.randrange(len(flat))] = random.choice(odd) if value.dtype in WIDE else 1
        value = flat.reshape(value.shape)
    return value


WIDE = (torch.float32, torch.float64, torch.bfloat16, torch.int64)
TENSORS: tuple[Callable[[Random, torch.Tensor], Any], ...] = (
    _number_in,
    _number_in,
    lambda random, value: value[: len(value) // 2] if value.ndim else value[None],
    lambda random, value: torch.cat([value, value]) if value.ndim else value.expand(3).clone(),
    lambda random, value: value[..., None],
    lambda random, value: value.flatten(),
    lambda random, value: value.to(random.choice([torch.float64, torch.float16, torch.int64, torch.int8, torch.bool])),
    lambda random, value: value.mT.contiguous() if value.ndim >= 2 else value.flip(0) if value.ndim else -value,
    lambda random, value: torch.full_like(value, random.choice([0, 1])),
    lambda random, value: -value if value.dtype != torch.bool else ~value,
    lambda random, value: torch.empty(0),
)
"""What a tensor becomes."""
ODD_TENSORS: tuple[Callable[[torch.Tensor], Any], ...] = (
    lambda value: value.to(torch.complex64),
    lambda value: value.to_sparse() if value.ndim else value,
    lambda value: torch.empty_like(value, device="meta"),
    lambda value: value.new_zeros(1).expand(value.shape),
    lambda value: torch.nn.Parameter(value.float()),
    lambda value: value.tolist(),
)
"""What only a pickle can make of it."""


def edited(random: Random, value: Any) -> Any:
    """Return nested dicts and lists with one thing wrong in them."""
    return changed(random, copy.deepcopy(value), lambda old: _other(random, old))


def _other(random: Random, old: Any) -> Any:
    if isinstance(old, torch.Tensor):
        choice = random.randrange(10)
        if choice < 7:
            return random.choice(TENSORS)(random, old.clone())
        return random.choice(ODD_TENSORS)(old) if choice < 9 else random.choice(SCALARS)
    return copy.deepcopy(random.choice(SCALARS))


def changed(random: Random, value: Any, change: Callable[[Any], Any], depth: int = 0) -> Any:
    """Change one value: the whole, or, mostly, one inside. Now and then a key goes, comes or is another."""
    inside = isinstance(value, dict | list) and len(value) > 0
    if not inside or random.random() < (0.02 if depth == 0 else 0.15):
        return change(value)
    assert isinstance(value, dict | list)
    key = random.choice(list(value)) if isinstance(value, dict) else random.randrange(len(value))
    choice = random.randrange(12)
    if choice == 0:
        del value[key]
    elif choice == 1 and isinstance(value, dict):
        value[random.choice(["x", "", "__metadata__", "\0"])] = copy.deepcopy(value[key])
    elif choice == 1:
        value.append(copy.deepcopy(value[key]))  # type: ignore[union-attr]
    elif choice == 2 and isinstance(value, dict):
        value[key + "x" if isinstance(key, str) else 10**6] = value.pop(key)
    else:
        value[key] = changed(random, value[key], change, depth + 1)
    return value
