"""Token ids from callers: every accepted form becomes lists of integers, anything else an InputError."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any, TypeAlias

from torch import Tensor

from lepton.errors import InputError, shown
from lepton.model.fresh_state import MAX_ROWS

Prompts: TypeAlias = Sequence[Sequence[int]] | Sequence[Tensor]
Prompt: TypeAlias = Tensor | Sequence[int] | Prompts
"""One prompt (a flat list, a tensor [T] or [1, T]) or several (a list of lists or of tensors [T], a tensor [B, T]).

Arrays of numpy are as good as tensors, of any integer dtype and on any device."""


Tokens: TypeAlias = list[int] | list[list[int]]
"""Prompt and new tokens: a list for one flat prompt, else a list for each prompt."""
Uncertainties: TypeAlias = list[float] | list[list[float]]
"""A chance in 0..1 for each new token: that the most likely token, which greedy decoding takes, is wrong."""

MAX_PROMPT = 1 << 24
"""Tokens of a prompt; a longer text is read in parts, `state = model(part, state).state`."""
MAX_STOP = 1024
"""Tokens of a stop sequence."""


def read_prompts(prompt_ids: Any, vocab_size: int) -> tuple[list[list[int]], bool]:
    """Return the prompts as new lists, and whether the caller gave one flat prompt."""
    if isinstance(prompt_ids, str | bytes | bytearray):
        raise InputError("the prompt is text: encode it with the tokenizer first")
    values = _plain(prompt_ids, "the prompt", (1, 2))
    if not isinstance(values, Sequence):
        raise InputError(f"prompt of type {type(prompt_ids).__name__}: give a list of token ids")
    if values is not prompt_ids and len(values) == 1 and _is_list(values[0]):
        values = values[0]  # a tensor [1, T] is one prompt, a list of one list is not
    _check_length(values, MAX_PROMPT, "the prompt", "tokens")
    values = [_plain(value, "a row of the prompt", (0, 1)) for value in values]
    nested = [_is_list(value) for value in values]
    if not any(nested):
        return [_ids(values, vocab_size, "the prompt")], True
    if not all(nested):
        raise InputError("the prompt mixes ids and lists: give one list of ids, or a list of such lists")
    _check_length(values, MAX_ROWS, "a batch", "prompts")
    return [_ids(row, vocab_size, f"prompt {i}") for i, row in enumerate(values)], False


def read_stops(stop: Any, vocab_size: int) -> list[list[int]]:
    """Return the id sequences that end generation; `stop` is None, an id, a list of ids or a list of id sequences."""
    if stop is None:
        return []
    values = _plain(stop, "stop", (0, 1, 2))
    values = [_plain(value, "a stop sequence", (0, 1)) for value in values] if _is_list(values) else [values]
    sequences = [value if _is_list(value) else [value] for value in values]
    for sequence in sequences:
        _check_length(sequence, MAX_STOP, "a stop sequence", "tokens")
    return [_ids(sequence, vocab_size, "a stop sequence") for sequence in sequences]


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes | bytearray)


def _plain(value: Any, what: str, dims: Sequence[int]) -> Any:
    """Return a tensor or an array with one of the dimensions `dims` as numbers in lists; anything else as it is."""
    if not hasattr(value, "tolist"):
        return value
    if value.ndim not in dims:
        raise InputError(f"{what} has shape {tuple(value.shape)}: give [tokens] or [rows, tokens]")
    try:
        return value.tolist()
    except (RuntimeError, TypeError, ValueError):  # such as a tensor without values, on the meta device
        raise InputError(f"{what} is {shown(value)}, which holds no ids") from None


def _check_length(values: Sequence[Any], most: int, what: str, unit: str) -> None:
    if len(values) > most:
        raise InputError(f"{what} of {len(values):,} {unit}: at most {most:,} are taken at once")


def _ids(values: Sequence[Any], vocab_size: int, what: str) -> list[int]:
    if not values:
        raise InputError(f"{what} is empty: give at least one token id")
    _check_length(values, MAX_PROMPT, what, "tokens")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, Integral):
            raise InputError(f"{what} holds {shown(value)}, which is not an integer: give token ids")
        if not 0 <= int(value) < vocab_size:
            raise InputError(f"{what} holds id {shown(value)}: the vocabulary has ids 0 to {vocab_size - 1}")
    return [int(value) for value in values]
