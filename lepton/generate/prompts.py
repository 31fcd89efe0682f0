"""Token ids from callers: every accepted form becomes lists of integers, anything else an InputError."""

import operator
from collections.abc import Sequence
from typing import Any, TypeAlias

from torch import Tensor

from lepton.errors import InputError

Prompt: TypeAlias = Tensor | Sequence[int] | Sequence[Sequence[int]]
"""One prompt (a flat list, a tensor [T] or [1, T]) or several (a list of lists, a tensor [B, T])."""


def read_prompts(prompt_ids: Any, vocab_size: int) -> tuple[list[list[int]], bool]:
    """Return the prompts as new lists, and whether the caller gave one flat prompt."""
    values = prompt_ids
    if hasattr(values, "tolist"):  # a tensor or an array
        if values.ndim not in (1, 2):
            raise InputError(f"prompt of shape {tuple(values.shape)}: give [tokens] or [rows, tokens]")
        values = values.tolist()
        if prompt_ids.ndim == 2 and len(values) == 1:
            values = values[0]
    if isinstance(values, str):
        raise InputError("the prompt is text: encode it with the tokenizer first")
    if not isinstance(values, Sequence):
        raise InputError(f"prompt of type {type(values).__name__}: give a list of token ids")
    nested = [isinstance(value, Sequence) and not isinstance(value, str) for value in values]
    if not any(nested):
        return [_ids(values, vocab_size, "the prompt")], True
    if not all(nested):
        raise InputError("the prompt mixes ids and lists: give one list of ids, or a list of such lists")
    return [_ids(row, vocab_size, f"prompt {i}") for i, row in enumerate(values)], False


def read_stops(stop: Any, vocab_size: int) -> list[list[int]]:
    """Return the id sequences that end generation; `stop` is None, an id, a list of ids or a list of id sequences."""
    if stop is None:
        return []
    values = stop.tolist() if hasattr(stop, "tolist") else stop
    values = values if isinstance(values, Sequence) and not isinstance(values, str) else [values]
    sequences = [value if isinstance(value, Sequence) and not isinstance(value, str) else [value] for value in values]
    return [_ids(sequence, vocab_size, "a stop sequence") for sequence in sequences]


def _ids(values: Sequence[Any], vocab_size: int, what: str) -> list[int]:
    if not values:
        raise InputError(f"{what} is empty: give at least one token id")
    ids = []
    for value in values:
        try:
            index = operator.index(value)
        except TypeError:
            raise InputError(f"{what} holds {value!r}, which is no integer: give token ids") from None
        if not 0 <= index < vocab_size:
            raise InputError(f"{what} holds id {index}: the vocabulary has ids 0 to {vocab_size - 1}")
        ids.append(index)
    return ids
