"""Reading what `State.save` and `Memory.save` wrote: everything in it is checked before a model continues from it."""

import re
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from lepton import tensors
from lepton.errors import InputError, naming
from lepton.model.ideas.idea import LONGEST
from lepton.model.modules import Modules
from lepton.model.state import WEIGHTS, Memory, State, flatten, rebuild
from lepton.model.weights import fingerprint

Part = TypeVar("Part", State, Memory)


def read_part(model: Modules, path: str | Path, like: Part, *, any_weights: bool = False) -> Part:
    """Read a state or a memory in the shape of `like`, which is one of `model` with one row, onto its device.

    Raises:
        InputError: no such file, one that is damaged or of another kind, or one that a model of another shape or,
            unless `any_weights`, other weights have made.
    """
    found, metadata = tensors.read(path, "file")
    wanted, kind = flatten(like), "state" if isinstance(like, State) else "state.memory"
    found = _relettered(_renamed(model, found), wanted)
    if other := sorted(wanted.keys() ^ found.keys()):
        raise InputError(f"{path}: not the {kind} of this model; '{other[0]}' does not agree")
    with naming(path):
        tensors.compare(found, _sized(wanted, found), casts=True)
        _check_values(found, model)
    made_by = metadata.get(WEIGHTS)
    if made_by is not None and not any_weights and made_by != (fingerprint(model) or made_by):
        raise InputError(
            f"{path}: made by other weights than this model's, which would read it as noise: load the checkpoint that "
            "made it, or pass any_weights=True"
        )
    return rebuild(like, lambda name, value: found[name].to(value.device, value.dtype))


def _renamed(model: Modules, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a file by their present names.

    Until 2026-11-26 one pair of tensors held the keys and values of stem, thinking block and deep blocks, and what the
    ideas keep had names of its own.
    """
    renamed: dict[str, Tensor] = {}
    old = {old: new for idea in model.ideas.values() for old, new in idea.old_names.items()}
    if "keys_BLRKH" not in found:  # no old state; in a memory of today names may begin like those of an old state
        old = {name: new for name, new in old.items() if not name.startswith("memory.")}
    for name, value in found.items():
        if name in ("keys_BLRKH", "values_BLRKH") and value.ndim == 5:
            stem, layers = model.config.stem_layers, model.config.layers
            thinking = value.shape[1] - layers
            parts = value.split([stem, thinking, layers - stem], 1) if thinking in (0, 1) else [value] * 3
            places = ("stem", "thoughts.kv", "deep") if thinking else ("stem", None, "deep")
            renamed |= {f"{place}.{name}": part for place, part in zip(places, parts, strict=True) if place}
            continue
        if name == "taken_B" and "router" not in model.ideas:
            continue  # older states had it without a router, too
        before = next((each for each in old if name.startswith(each)), None)
        renamed[name if before is None else old[before] + name.removeprefix(before)] = value
    return renamed


def _relettered(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return tensors with the shape letters that `wanted` has at the end of their names: older files have others."""
    present = {_without_letters(name): name for name in wanted}
    renamed = {name: present.get(_without_letters(name), name) for name in found}
    return {name if renamed[name] in found else renamed[name]: value for name, value in found.items()}


def _without_letters(name: str) -> str:
    return re.sub("_[A-Z0-9]+$", "", name)


def _sized(wanted: dict[str, Tensor], found: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return `wanted`, without values, with as many rows as the file has, and as many kv entries where their number
    depends on what was read (full attention).
    """
    rows = next((value.shape[0] for value in found.values() if value.ndim), 0)
    sized = {}
    for name, value in wanted.items():
        shape = [rows, *value.shape[1:]]
        if name.endswith("_BLRKH") and value.shape[2] == 0:
            keys = found["deep.keys_BLRKH"]
            shape[2] = keys.shape[2] if keys.ndim == value.ndim else 0
        sized[name] = torch.empty(shape, dtype=value.dtype, device="meta")
    return sized


def _owner(name: str, model: Modules) -> str:
    """Return the idea that a tensor of a state or of a memory belongs to; '' for one that is no idea's."""
    first, *rest = name.split(".")
    within = [*rest[:1], first] if first == "memory" else [first]
    return next((part for part in within if part in model.ideas), "")


def _check_values(found: dict[str, Tensor], model: Modules) -> None:
    """Raise InputError for a number that no stream of this model leads to."""
    config = model.config
    limits: dict[str, dict[str, tuple[float, float]]] = {
        "": {"position_B": (0, LONGEST), "phase_B": (0, config.segment - 1), "last_token_B": (0, config.vocab_size - 1)}
    }
    limits |= {name: idea.limits(config) for name, idea in model.ideas.items()}
    for name, value in found.items():
        limit = limits.get(_owner(name, model), {}).get(name.rpartition(".")[2])
        if limit is None or not value.numel():
            continue
        # A byte that is neither 0 nor 1 is not a bool, though it may pass for one.
        low, high = (
            each.item() for each in (value.view(torch.uint8) if value.dtype is torch.bool else value).aminmax()
        )
        if low < limit[0] or high > limit[1]:
            raise InputError(f"'{name}' holds {low if low < limit[0] else high}: must lie in {limit[0]}..{limit[1]}")
    if config.window is None and "position_B" in found:
        longest = int(found["position_B"].max()) if found["position_B"].numel() else 0
        keys = found["deep.keys_BLRKH"]
        if longest > keys.shape[2]:
            raise InputError(f"'deep.keys_BLRKH' holds {keys.shape[2]} entries for {longest} tokens")
