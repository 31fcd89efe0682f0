"""What a forward pass starts from: checked arguments, and the past of sequences that have none yet."""

import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lepton.errors import InputError
from lepton.model.crystals import CONTEXT, Columns, Store
from lepton.model.memory import CONV
from lepton.model.saved import read_part
from lepton.model.state import Memory, State, flatten, rebuild
from lepton.model.thoughts import MAX_TRAINING_ROUNDS, USUAL_ROUNDS, Group, late_rows
from lepton.model.weights import Origin

if TYPE_CHECKING:
    from lepton.model.lepton import Lepton


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


def with_memory(model: "Lepton", state: State, path: str | Path, *, any_weights: bool = False) -> State:
    """Return a fresh `state` with the memory that the file `path` holds."""
    memory = read_part(model, path, model.new_state(1).memory, any_weights=any_weights)
    tensors = flatten(memory)
    rows = next(iter(tensors.values())).shape[0] if tensors else state.batch_size
    if rows not in (1, state.batch_size):
        raise InputError(f"{path}: holds the memory of {rows} rows; give new_state({rows}), not {state.batch_size}")
    if rows != state.batch_size:
        memory = rebuild(memory, lambda _name, value: value.expand(state.batch_size, *value.shape[1:]).clone())
    if memory.store is not None and model.crystals is not None:
        memory.store = memory.store.carried(model.crystals.window)
    memory.tail_BXC = state.memory.tail_BXC
    return dataclasses.replace(state, memory=memory)


def check_range(values: Tensor, low: int, high: int, what: str) -> None:
    """Raise InputError for a value outside low..high. Only on a CPU: elsewhere looking would wait for the device."""
    if values.device.type == "cpu" and not torch.compiler.is_compiling():
        least, most = int(values.min()), int(values.max())
        if least < low or most > high:
            raise InputError(f"{what} {least if least < low else most}: must lie in {low}..{high}")


def checked(
    model: "Lepton",
    tokens: Tensor,
    state: State | None,
    lengths: Tensor | None,
    depth: float | None,
    think: int | Tensor | None,
    opens: Tensor | None,
) -> tuple[State, Tensor, float, int | Tensor]:
    """Validate the arguments of `forward` and fill in what was left out."""
    if tokens.dim() != 2 or tokens.shape[1] < 1 or tokens.dtype.is_floating_point or tokens.dtype == torch.bool:
        raise InputError(f"tokens must be integers [rows, at least 1], not {tokens.dtype} {tuple(tokens.shape)}")
    rows, length = tokens.shape
    check_range(tokens, 0, model.config.vocab_size - 1, "token id")
    depth = 1.0 if depth is None else depth
    if not 0 <= depth <= 1:
        raise InputError(f"depth={depth}: must lie in 0..1, the share of tokens allowed past the stem")
    if depth < 1 and model.router is None:
        raise InputError(f"depth={depth}: this model has no router and always runs all blocks; leave depth at 1")
    if think is None:
        think = model.config.rounds if model.thoughts is not None else 0
    if isinstance(think, Tensor):
        if think.shape != (rows,):
            raise InputError(f"think must hold one number for each of {rows} rows, not {tuple(think.shape)}")
        check_range(think, 0, MAX_TRAINING_ROUNDS, "rounds of thinking")
        late = late_rows(rows)
        check_range((think > USUAL_ROUNDS).sum(), 0, late, f"rows that think for more than {USUAL_ROUNDS} rounds:")
    else:
        if not isinstance(think, int) or think < 0:
            raise InputError(f"think={think}: must be a whole number of rounds, from 0")
        if think and model.thoughts is None:
            raise InputError(f"think={think}: this model has no thought tokens; leave think at 0")
    if state is None:
        state = fresh_state(model, rows, room=False)
    elif state.batch_size != rows:
        raise InputError(f"the state holds {state.batch_size} rows and the tokens {rows}; they must agree")
    if lengths is None:
        lengths = torch.full((rows,), length, device=tokens.device)
    elif lengths.shape != (rows,):
        raise InputError(f"lengths must hold one value for each of {rows} rows, not {tuple(lengths.shape)}")
    else:
        check_range(lengths, 0, length, "length")
    if opens is not None and opens.shape != tokens.shape:
        raise InputError(f"opens must have the shape of the tokens {tuple(tokens.shape)}, not {tuple(opens.shape)}")
    return state, lengths, depth, think
