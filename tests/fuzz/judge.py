"""What is right, and the cause that a failure is grouped under."""

import dataclasses
import math
import traceback
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

import lepton
from lepton.errors import InputError
from tests.fuzz.workers import Overtime

LONGEST = 1000
"""Characters of a message: a line that quotes a whole file is no line for people."""
ROOT = Path(lepton.__file__).parent


class Problem(NamedTuple):
    """Why a case is a failure."""

    cause: str
    """Equal for cases that one fix would settle, as far as that can be seen."""
    details: str


def problem_of_error(error: BaseException, accepted: tuple[type[Exception], ...] = ()) -> Problem | None:
    """Return what is wrong with an exception; None for an InputError as it should be.

    `accepted` kinds pass too, and TypeError where Python itself refused the call.
    """
    where = _place(error)
    if isinstance(error, InputError):
        if _ran_out(error):
            return Problem(f"InputError only once an allocation failed, {where}", _tail(error))
        message = str(error)
        if not message.strip() or len(message.splitlines()) != 1 or len(message) > LONGEST:
            return Problem(f"message of {len(message.splitlines())} lines, {len(message)} characters, {where}", message)
        return None
    if isinstance(error, accepted) and not _ran_out(error):
        return None
    if isinstance(error, TypeError) and len(traceback.extract_tb(error.__traceback__)) <= 2:
        return None  # raised at the call itself: attempt and the lambda are all that ran
    if isinstance(error, Overtime):
        return Problem(f"hang, {where}", _tail(error))
    kind = "out of memory" if _ran_out(error) else type(error).__name__
    return Problem(f"{kind}, {where}", _tail(error))


def same(a: Any, b: Any) -> bool:
    """Whether two results are equal to the last bit; NaN equals NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and _bits(a.numpy()) == _bits(b.numpy())
    if isinstance(a, np.ndarray):
        return bool(a.dtype == b.dtype and a.shape == b.shape and _bits(a) == _bits(b))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, field.name), getattr(b, field.name)) for field in dataclasses.fields(a))
    return bool(a == b) or (isinstance(a, float) and math.isnan(a) and math.isnan(b))


def not_finite(value: Any, place: str = "") -> str | None:
    """Return where `value` holds a number that is not finite; None if nowhere."""
    if isinstance(value, torch.Tensor):
        return None if bool(value.isfinite().all()) else f"{place} is not finite"
    if isinstance(value, float):
        return None if math.isfinite(value) else f"{place} is {value}"
    if isinstance(value, dict):
        return next((bad for key in value if (bad := not_finite(value[key], f"{place}.{key}"))), None)
    if isinstance(value, list | tuple):
        return next((bad for i, item in enumerate(value) if (bad := not_finite(item, f"{place}[{i}]"))), None)
    return None


def _bits(array: np.ndarray) -> bytes:
    return np.ascontiguousarray(array).tobytes()


def _ran_out(error: BaseException) -> bool:
    """Whether memory was missing, here or in an exception that this one replaced."""
    chain: list[BaseException] = []
    each: BaseException | None = error
    while each is not None and each not in chain:
        chain.append(each)
        each = each.__cause__ or each.__context__
    words = ("allocate memory", "not enough memory", "Cannot allocate", "bad_alloc", "Unable to allocate")
    return any(isinstance(each, MemoryError) or any(word in str(each) for word in words) for each in chain)


def _place(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).is_relative_to(ROOT)]
    if not frames:
        return "outside lepton"
    last = frames[-1]
    return f"lepton/{Path(last.filename).relative_to(ROOT)}:{last.lineno} in {last.name}"


def _tail(error: BaseException) -> str:
    frames = traceback.format_list(traceback.extract_tb(error.__traceback__)[-4:])
    message = traceback.format_exception_only(error)[-1].strip()
    return "".join(frames) + (message if len(message) <= LONGEST else message[:LONGEST] + "...")
