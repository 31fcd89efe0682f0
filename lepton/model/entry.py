"""What a forward pass starts from: checked arguments, and the past of sequences that have none yet."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lepton.errors import InputError, shown
from lepton.model.checks import INTEGERS, check_device, check_range, integers, real, whole
from lepton.model.crystals import CONTEXT, Columns, Store
from lepton.model.memory import CONV
from lepton.model.saved import read_part
from lepton.model.state import Memory, State, flatten, rebuild
from lepton.model.thoughts import MAX_TRAINING_ROUNDS, USUAL_ROUNDS, Group, late_rows
from lepton.model.weights import Origin

if TYPE_CHECKING:
    from lepton.model.lepton import Lepton

MAX_ROUNDS = 256
"""Rounds of thinking that a call may ask for; training goes to `MAX_TRAINING_ROUNDS`."""
MAX_ROWS = 1 << 16
"""Sequences of a state."""


def fresh_state(model: "Lepton", batch_size: int, *, room: bool = True) -> State:
    """Return the state of `batch_size` sequences that have read nothing, on the model's device.

    Without `room` it has no columns for remembered tokens and crystals: the same past, with no masked zeros to look at.
    """
    config, device, dtype = model.config, model.embed.weight.device, model.dtype
    precise = torch.promote_types(dtype, torch.float32)
    columns = config.layers + (model.thoughts is not None)
    ring = (batch_size, columns, model._columns(0) if room else 0, config.kv_heads, config.head_dim)
    counter = torch.zeros(batch_size, dtype=torch.int64, device=device)
    group = matrix = tail = store = None
    if model.thoughts is not None:
        nothing = torch.zeros(batch_size, config.thoughts, config.width, dtype=dtype, device=device)
        group = Group(nothing, counter.bool(), torch.zeros(batch_size, dtype=dtype, device=device))
    if model.memory is not None:
        shape = (batch_size, config.memory_heads, config.key_dim, config.value_dim)
        matrix = torch.zeros(shape, dtype=precise, device=device)
        tail = torch.zeros(batch_size, CONV - 1, model.memory.channels, dtype=dtype, device=device)
    if model.crystals is not None:
        kept = Columns.empty(batch_size, config.slots if room else 0, config.width, dtype, device)
        pending = Columns.empty(batch_size, config.crystals, config.width, dtype, device)
        store = Store(kept, pending, torch.full((batch_size, CONTEXT - 1), -1, device=device))
    return State(
        counter,
        counter,
        torch.zeros(ring, dtype=dtype, device=device),
        torch.zeros(ring, dtype=dtype, device=device),
        counter,
        group,
        Memory(matrix, tail, store, Origin(model) if room else None),
    )


def with_memory(model: "Lepton", state: State, given: Memory | str | Path, *, any_weights: bool = False) -> State:
    """Return a fresh `state` with a memory, or the one that a file holds."""
    like = fresh_state(model, 1).memory
    if isinstance(given, Memory):
        memory, place = given, "memory"
    elif isinstance(given, str | Path):
        memory, place = read_part(model, given, like, any_weights=any_weights), str(given)
    else:
        raise InputError(f"memory={shown(given)}: give state.memory, or the file that state.memory.save wrote")
    _check_memory(place, model, memory)
    tensors, wanted = flatten(memory), flatten(like)
    rows = next(iter(tensors.values())).shape[0] if tensors else state.batch_size
    if rows not in (1, state.batch_size):
        raise InputError(f"{place}: holds the memory of {rows} rows; give new_state({rows}), not {state.batch_size}")

    def take(name: str, value: Tensor) -> Tensor:
        value = value.detach().to(wanted[name].device, wanted[name].dtype)
        return value if rows == state.batch_size else value.expand(state.batch_size, *value.shape[1:]).clone()

    memory = rebuild(memory, take)
    if memory.store is not None and model.crystals is not None:
        memory.store = memory.store.carried(model.crystals.window)
    memory.tail_BXC = state.memory.tail_BXC
    memory.origin = state.memory.origin
    return dataclasses.replace(state, memory=memory)


def check_state(model: "Lepton", state: State, rows: int) -> None:
    """Raise InputError unless `state` is one of this model, for so many rows, in its dtype and on its device."""
    if not isinstance(state, State):
        raise InputError(f"state={shown(state)}: give what new_state, load_state, out.state or out.commit returned")
    if state.batch_size != rows:
        raise InputError(f"the state holds {state.batch_size} rows and the tokens {rows}; they must agree")
    config, keys, group = model.config, state.keys_BLRKH, state.group
    _compare("state", "window", keys.shape[2] if config.window else 0, model._columns(0))
    columns = (config.layers + (model.thoughts is not None), config.kv_heads, config.head_dim)
    _compare("state", "keys", (keys.shape[1], *keys.shape[3:]), columns)
    thoughts = (config.thoughts, config.width) if model.thoughts else None
    _compare("state", "thoughts", group and tuple(group.states_BSD.shape[1:]), thoughts)
    _check_memory("state", model, state.memory)
    device = model.embed.weight.device
    if (keys.dtype, keys.device) != (model.dtype, device):
        made = f"{keys.dtype} on {keys.device}"
        raise InputError(f"the state is in {made}, the model computes in {model.dtype} on {device}; they must agree")


def _check_memory(place: str, model: "Lepton", memory: Memory) -> None:
    config, matrix, store = model.config, memory.matrix_BHKV, memory.store
    wanted = (config.memory_heads, config.key_dim, config.value_dim) if model.memory else None
    _compare(place, "working memory", None if matrix is None else tuple(matrix.shape[1:]), wanted)
    found = store and (store.kept.position_BC.shape[1], *store.pending.states_BCD.shape[1:])
    _compare(place, "crystals", found, (config.slots, config.crystals, config.width) if model.crystals else None)


def _compare(place: str, what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise InputError(f"{place}: of another model, its {what} have shape {found}, this model's {wanted}")


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


def checked_knobs(
    model: "Lepton", rows: int, depth: float | None, think: int | Tensor | None
) -> tuple[float, int | Tensor]:
    """Return the share of deep tokens and the rounds of thinking, the model's own where they are None."""
    share = 1.0 if depth is None else real(depth)
    if not 0 <= share <= 1:
        raise InputError(f"depth={shown(depth)}: must lie in 0..1, the share of tokens allowed past the stem")
    if share < 1 and model.router is None:
        raise InputError(f"depth={depth}: this model has no router and always runs all blocks; leave depth at 1")
    if think is None:
        return share, model.config.rounds if model.thoughts is not None else 0
    if isinstance(think, Tensor):
        device = model.embed.weight.device
        think = integers(think, (rows,), device, "think", f"one number of rounds for each of {rows} rows")
        check_range(think, 0, MAX_TRAINING_ROUNDS, "rounds of thinking")
        late = late_rows(rows)
        check_range((think > USUAL_ROUNDS).sum(), 0, late, f"rows that think for more than {USUAL_ROUNDS} rounds:")
        return share, think
    think = whole("think", think, 0, MAX_ROUNDS, " rounds")
    if think and model.thoughts is None:
        raise InputError(f"think={think}: this model has no thought tokens; leave think at 0")
    return share, think


def checked(
    model: "Lepton",
    tokens: Tensor,
    state: State | None,
    lengths: Tensor | None,
    depth: float | None,
    think: int | Tensor | None,
    opens: Tensor | None,
) -> tuple[Tensor, State, Tensor, float, int | Tensor]:
    """Validate the arguments of `forward` and fill in what was left out."""
    tokens = checked_tokens(model, tokens, 1)
    rows, length = tokens.shape
    share, rounds = checked_knobs(model, rows, depth, think)
    if state is None:
        state = fresh_state(model, rows, room=False)
    else:
        check_state(model, state, rows)
    whole_rows = torch.full((rows,), length, device=tokens.device)
    lengths = whole_rows if lengths is None else checked_lengths(tokens, lengths)
    if opens is not None:
        if not isinstance(opens, Tensor) or opens.dtype != torch.bool or opens.shape != tokens.shape:
            kind = f"{opens.dtype} {list(opens.shape)}" if isinstance(opens, Tensor) else type(opens).__name__
            raise InputError(f"opens must have the shape of the tokens, bool {list(tokens.shape)}, not {kind}")
        check_device(opens, tokens.device, "opens")
    return tokens, state, lengths, share, rounds
