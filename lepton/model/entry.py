"""What a forward pass starts from: checked arguments, and the past of sequences that have none yet."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lepton.errors import InputError, shown
from lepton.model.checks import INTEGERS, check_device, check_range, integers, real, whole
from lepton.model.ideas.idea import Call
from lepton.model.kv_cache import KVCache
from lepton.model.saved import read_part
from lepton.model.state import Memory, State, flatten, of_parts, rebuild
from lepton.model.weights import Origin

if TYPE_CHECKING:
    from lepton.model.lepton import Lepton

MAX_ROUNDS = 256
"""Rounds of thinking that a call may ask for."""
MAX_ROWS = 1 << 16
"""Sequences of a state."""


def fresh_state(model: "Lepton", rows: int, *, allocate: bool = True) -> State:
    """Return the state of `rows` sequences that have read nothing, on the model's device.

    Without `allocate` there are no entries for remembered tokens and crystals. The state means the same, but a pass
    attends to no masked zeros.
    """
    config, device, dtype = model.config, model.embed.weight.device, model.dtype
    counter = torch.zeros(rows, dtype=torch.int64, device=device)
    stem, deep = (
        KVCache.fresh(config, len(blocks), rows, dtype, device, allocate=allocate)
        for blocks in (model.stem, model.blocks)
    )
    parts = {name: idea.fresh(rows, dtype, device, allocate=allocate) for name, idea in model.ideas.items()}
    kept = {name: part for name, part in parts.items() if part is not None}
    return State(counter, counter, stem, deep, *of_parts(kept, Origin(model) if allocate else None))


def with_memory(model: "Lepton", state: State, given: Memory | str | Path, *, any_weights: bool = False) -> State:
    """Return a fresh `state` with a memory, or the one that a file holds."""
    like = fresh_state(model, 1).memory
    if isinstance(given, Memory):
        memory, place = given, "memory"
    elif isinstance(given, str | Path):
        memory, place = read_part(model, given, like, any_weights=any_weights), str(given)
    else:
        raise InputError(f"memory={shown(given)}: give state.memory, or the file that state.memory.save wrote")
    found, wanted = flatten(memory), flatten(like)
    _check_shapes(place, found, wanted)
    rows = next(iter(found.values())).shape[0] if found else state.batch_size
    if rows not in (1, state.batch_size):
        raise InputError(f"{place}: holds the memory of {rows} rows; give new_state({rows}), not {state.batch_size}")

    def take(name: str, value: Tensor) -> Tensor:
        value = value.detach().to(wanted[name].device, wanted[name].dtype)
        return value if rows == state.batch_size else value.expand(state.batch_size, *value.shape[1:]).clone()

    memory = rebuild(memory, take)
    parts = {name: model.ideas[name].carried(part, state.part(name)) for name, part in memory.parts.items()}
    return dataclasses.replace(state, memory=Memory(parts, state.memory.origin))


def check_state(model: "Lepton", state: State, rows: int) -> None:
    """Raise InputError unless `state` is one of this model, for so many rows, in its dtype and on its device."""
    if not isinstance(state, State):
        raise InputError(f"state={shown(state)}: give what new_state, load_state, out.state or out.commit returned")
    if state.batch_size != rows:
        raise InputError(f"the state holds {state.batch_size} rows and the tokens {rows}; they must agree")
    found, device = flatten(state), model.embed.weight.device
    _check_shapes("state", found, model.fresh_shapes)
    keys = state.stem.keys_BLRKH
    if (keys.dtype, keys.device) != (model.dtype, device):
        made = f"{keys.dtype} on {keys.device}"
        raise InputError(f"the state is in {made}, the model computes in {model.dtype} on {device}; they must agree")


def _check_shapes(place: str, found: dict[str, Tensor], wanted: dict[str, Tensor]) -> None:
    """Raise InputError for tensors that no state of this model has; rows, and entries without a window, may differ."""
    if other := sorted(found.keys() ^ wanted.keys()):
        raise InputError(f"{place}: of another model, which differs in '{other[0]}'")
    for name, value in wanted.items():
        grows = name.endswith("_BLRKH") and value.shape[2] == 0
        have, need = (part.shape[1:2] + part.shape[3:] if grows else part.shape[1:] for part in (found[name], value))
        if found[name].ndim != value.ndim or have != need:
            shapes = f"has shape {tuple(have)}, this model's {tuple(need)}"
            raise InputError(f"{place}: of another model, its '{name}' {shapes}")


def checked_tokens(model: "Lepton", tokens: Tensor, least: int) -> Tensor:
    """Return token ids [rows, at least `least`] as int64, on the model's device and within its vocabulary."""
    if not isinstance(tokens, Tensor):
        raise InputError(f"tokens of type {type(tokens).__name__}: give a tensor [rows, tokens], torch.tensor([ids])")
    if tokens.dim() != 2 or not tokens.shape[0] or tokens.shape[1] < least or tokens.dtype not in INTEGERS:
        raise InputError(
            f"tokens must be integers [rows, at least {least}], not {tokens.dtype} {list(tokens.shape)}"
            + ("; give tokens[None] for one row" if tokens.dim() == 1 else "")
        )
    check_device(tokens, model.embed.weight.device, "tokens")
    tokens = tokens.long()
    check_range(tokens, 0, model.config.vocab_size - 1, "token id")
    return tokens


def checked_lengths(tokens: Tensor, lengths: Tensor) -> Tensor:
    """Return the valid tokens of each row as int64 [rows], each at most the length of the row."""
    rows, length = tokens.shape
    lengths = integers(lengths, (rows,), tokens.device, "lengths", f"one value for each of {rows} rows")
    check_range(lengths, 0, length, "length")
    return lengths


def checked_for_loss(
    model: "Lepton", tokens: Tensor, lengths: Tensor | None, groups: int | None, auxiliary: bool
) -> tuple[Tensor, Tensor | None, int | None]:
    """Return the arguments of `loss` that are its own, validated."""
    tokens = checked_tokens(model, tokens, 2)
    if groups is not None:  # a static bound may be rounded up
        groups = whole("groups", groups, 0, tokens.shape[1] + 64, " segments of a row")
    if not isinstance(auxiliary, bool):
        raise InputError(f"auxiliary={shown(auxiliary)}: must be True or False")
    return tokens, None if lengths is None else checked_lengths(tokens, lengths), groups


def checked_call(model: "Lepton", rows: int, depth: float | None, think: int | Tensor | None) -> Call:
    """Return what a caller asks of a pass, checked against what the model has."""
    share = 1.0 if depth is None else real(depth)
    if not 0 <= share <= 1:
        raise InputError(f"depth={shown(depth)}: must lie in 0..1, the share of tokens allowed past the stem")
    if share < 1 and "router" not in model.ideas:
        raise InputError(f"depth={depth}: this model has no router and always runs all blocks; leave depth at 1")
    if think is None:
        return Call(share)
    if isinstance(think, Tensor):
        device = model.embed.weight.device
        think = integers(think, (rows,), device, "think", f"one number of rounds for each of {rows} rows")
        for idea in model.ideas.values():
            idea.check_rounds(think)
        return Call(share, think)
    think = whole("think", think, 0, MAX_ROUNDS, " rounds")
    if think and "thoughts" not in model.ideas:
        raise InputError(f"think={think}: this model has no thought tokens; leave think at 0")
    return Call(share, think)


def checked(
    model: "Lepton",
    tokens: Tensor,
    state: State | None,
    lengths: Tensor | None,
    depth: float | None,
    think: int | Tensor | None,
    opens: Tensor | None,
) -> tuple[Tensor, State, Tensor, Call]:
    """Validate the arguments of `forward` and fill in what was left out."""
    tokens = checked_tokens(model, tokens, 1)
    rows, length = tokens.shape
    call = checked_call(model, rows, depth, think)
    if state is None:
        state = fresh_state(model, rows, allocate=False)
    else:
        check_state(model, state, rows)
    whole_rows = torch.full((rows,), length, device=tokens.device)
    lengths = whole_rows if lengths is None else checked_lengths(tokens, lengths)
    if opens is not None:
        if not isinstance(opens, Tensor) or opens.dtype != torch.bool or opens.shape != tokens.shape:
            kind = f"{opens.dtype} {list(opens.shape)}" if isinstance(opens, Tensor) else type(opens).__name__
            raise InputError(f"opens must have the shape of the tokens, bool {list(tokens.shape)}, not {kind}")
        check_device(opens, tokens.device, "opens")
    return tokens, state, lengths, call
