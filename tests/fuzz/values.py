"""Hostile values for any argument: of another type, at an edge, too large, empty, not finite."""

import contextlib
import decimal
import math
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from tests.fuzz.world import World

Make = Callable[[Random, World], Any]


class Strange:
    """An object of no use, whose comparison and conversion fail."""

    def __repr__(self) -> str:
        return "Strange()"


PLAIN = (
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 256, -(2**31), 2**31 - 1, 2**31, 2**32, 2**53 + 1, 2**63 - 1, 2**63,
    -(2**63), 2**64,
    20241126130100, 10**30, -(10**30), 0.0, -0.0, 0.5, 1.0, 1.5, -1.0, 1e-320, 1e300, math.nan, math.inf, -math.inf,
    1j, "", "a", "0",
    "nan", "auto", "\0", "\ud800", "x" * 5000, "\n", "tiny", "cuda", b"", b"a", (), (1,), (1, 2), [], [1], [[]],
    [[1]], [None], ["a"],
    [1.5], [[1], 2], [[1, 2], [3]], [-1], [10**30], [True], [[[1]]], {}, {1: 2}, {"a": 1}, set(), {1}, frozenset(),
    range(3), range(0),
    int, print, ..., decimal.Decimal("0.5"), 3 + 0j,
)  # fmt: skip
"""Values that need nothing."""

MADE: tuple[Make, ...] = (
    lambda random, world: Strange(),
    lambda random, world: Path("nowhere"),
    lambda random, world: iter([1, 2]),
    lambda random, world: (i for i in [1, 2]),
    lambda random, world: np.float32(0.5),
    lambda random, world: np.float64("nan"),
    lambda random, world: np.int64(2),
    lambda random, world: np.uint8(2),
    lambda random, world: np.bool_(True),
    lambda random, world: np.array(2),
    lambda random, world: np.array([]),
    lambda random, world: np.array([1, 2], dtype=np.uint16),
    lambda random, world: np.array([[1, 2], [3, 4]]),
    lambda random, world: np.array(["a"]),
    lambda random, world: np.array([None, 1], dtype=object),
    lambda random, world: _nested(random.choice([3, 100, 5000])),
    lambda random, world: world.model,
    lambda random, world: world.tokenizer,
    lambda random, world: world.state,
    lambda random, world: world.model.config,
    *(lambda random, world: tensor(random) for _ in range(12)),
)  # fmt: skip
"""Values that are made."""

DTYPES = (
    torch.int64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32,
    torch.uint64, torch.bool,
    torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64,
)  # fmt: skip
SHAPES = (
    (),
    (0,),
    (1,),
    (2,),
    (5,),
    (1, 0),
    (0, 3),
    (1, 1),
    (1, 3),
    (1, 8),
    (2, 3),
    (8, 1),
    (1, 1, 3),
    (1, 64),
    (0, 0, 0),
)


def tensor(random: Random) -> torch.Tensor:
    """Return a small tensor: mostly zeros and ones, of any dtype and shape, now and then at an edge or odd inside."""
    value = torch.zeros(random.choice(SHAPES), dtype=random.choice(DTYPES))
    if random.random() < 0.5:
        value = torch.ones_like(value)
    choice = random.randrange(12)
    if choice == 0 and value.is_floating_point():
        value = torch.full_like(value, random.choice([math.nan, math.inf, -1.0]))
    elif choice == 0 and value.dtype == torch.int64:
        value = torch.full_like(value, random.choice([-1, 299, 300, 383, 384, 2**40, -(2**63), 2**63 - 1]))
    elif choice == 1:
        value = value.to("meta")
    elif choice == 2 and value.ndim:
        with contextlib.suppress(NotImplementedError):  # of few dtypes
            value = value.to_sparse()
    elif choice == 3:
        value = value.new_zeros(1).expand(2, 3)
    elif choice == 4 and value.is_floating_point():
        value = value.requires_grad_()
    return value


def hostile(random: Random, world: World) -> Any:
    """Return a value."""
    return random.choice(PLAIN) if random.random() < 0.6 else random.choice(MADE)(random, world)


def same_kind(value: Any, good: Any) -> bool:
    """Whether a value is of the type that a good one has, so that only its content can be wrong."""
    if isinstance(good, bool) or isinstance(value, bool) or good is None:
        return type(value) is type(good)
    if isinstance(good, float):
        return isinstance(value, float | int)
    if isinstance(good, str | Path):
        return isinstance(value, str | Path)
    if isinstance(good, list) and good:
        return isinstance(value, list | tuple) and all(same_kind(item, good[0]) for item in value)
    if isinstance(good, torch.Tensor):
        return (
            isinstance(value, torch.Tensor)
            and (value.dtype, value.device) == (good.dtype, good.device)
            and not value.is_sparse
        )
    return isinstance(value, type(good))


def shown(value: Any) -> str:
    """Return a short text for a value."""
    if isinstance(value, torch.Tensor):
        data = (
            value.flatten()[:3].tolist()
            if value.layout == torch.strided and value.device.type == "cpu"
            else value.layout
        )
        return f"tensor({data}, {value.dtype}, {tuple(value.shape)}, {value.device})"
    if isinstance(value, np.generic | np.ndarray):
        return f"np.{value.dtype}({value.tolist()})"
    if isinstance(value, torch.nn.Module):
        return f"<{type(value).__name__}>"
    try:
        text = repr(value)
    except Exception as error:
        text = f"<{type(value).__name__}: {type(error).__name__}>"
    return text if len(text) <= 80 else f"{text[:60]}... ({len(text)} characters)"


def _nested(depth: int) -> list[Any]:
    value: list[Any] = [1]
    for _ in range(depth):
        value = [value]
    return value
