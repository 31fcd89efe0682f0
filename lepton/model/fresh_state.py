"""States that a forward pass may start from: fresh ones, ones that begin with a memory, and the check of any other."""

import dataclasses
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from lepton.config import LeptonConfig
from lepton.errors import InputError, shown
from lepton.model.kv_cache import KVCache
from lepton.model.modules import Modules
from lepton.model.saved import read_part
from lepton.model.state import Memory, State, flatten, of_parts, rebuild
from lepton.model.weights import Origin, on_meta_device

MAX_ROWS = 1 << 16
"""Sequences of a state."""


def fresh_state(model: Modules, rows: int, *, allocate: bool = True) -> State:
    """Return the state of `rows` sequences that have read nothing, on the model's device.

    Without `allocate` there are no entries for remembered tokens and crystals. The state means the same, but a pass
    attends to no masked zeros.
    """
    config, device, dtype = model.config, model.device, model.dtype
    counter = torch.zeros(rows, dtype=torch.int64, device=device)
    wide_layers = sum(config.wide_layers)
    stem, deep = (
        KVCache.fresh(config, layers, rows, dtype, device, allocate=allocate)
        for layers in (len(model.stem), len(model.blocks) - wide_layers)
    )
    wide = (
        KVCache.fresh(config, wide_layers, rows, dtype, device, allocate=allocate, wide=True) if wide_layers else None
    )
    parts = {name: idea.fresh(rows, dtype, device, allocate=allocate) for name, idea in model.ideas.items()}
    kept = {name: part for name, part in parts.items() if part is not None}
    ideas, memory = of_parts(kept, Origin(model) if allocate else None)
    last_token_B = counter if allocate and config.token_shift else None
    return State(counter, counter, last_token_B, stem, deep, ideas, memory, wide)


def with_memory(model: Modules, state: State, given: Memory | str | Path, *, any_weights: bool = False) -> State:
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


def check_state(model: Modules, state: State, rows: int) -> None:
    """Raise InputError unless `state` is one of this model, for `rows` rows, in its dtype and on its device."""
    if not isinstance(state, State) or not isinstance(state.stem, KVCache):
        raise InputError(f"state={shown(state)}: give what new_state, load_state, out.state or out.commit returned")
    if state.batch_size != rows:
        raise InputError(f"the state holds {state.batch_size} rows and the tokens {rows}; they must agree")
    found, device = flatten(state), model.device
    _check_shapes("state", found, fresh_shapes(model))
    keys = state.stem.keys_BLRKH
    if (keys.dtype, keys.device) != (model.dtype, device):
        made = f"{keys.dtype} on {keys.device}"
        raise InputError(f"the state is in {made}, the model computes in {model.dtype} on {device}; they must agree")


def fresh_shapes(model: Modules) -> dict[str, Tensor]:
    """Return the tensors of a fresh state of one sequence by their names, without values (on the meta device)."""
    left_out = (f"{model.left_out}.", f"memory.{model.left_out}.")
    return {name: value for name, value in _shapes(model.config).items() if not name.startswith(left_out)}


@lru_cache(maxsize=8)
def _shapes(config: LeptonConfig) -> dict[str, Tensor]:
    with on_meta_device():
        return flatten(fresh_state(Modules(config), 1))


def state_bytes(model: Modules, length: int) -> int:
    """Return the bytes of the state of one sequence after `length` tokens; constant unless the model is dense."""
    with on_meta_device():
        state = fresh_state(Modules(model.config).to(model.dtype), 1)
    if model.config.remembered is not None:
        return state.nbytes
    caches = [value for name, value in flatten(state).items() if name.endswith("_BLRKH")]
    return state.nbytes + sum(length * each.shape[1] * each.shape[3:].numel() * each.itemsize for each in caches)


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
