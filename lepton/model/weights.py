"""The checks of a state_dict before a model loads any of it, and the weights that a state was made by."""

import contextlib
import hashlib
import weakref
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lepton.checkpoint import CONFIG
from lepton.config import LeptonConfig
from lepton.errors import InputError
from lepton.model.modules import Modules
from lepton.tensors import compare

LISTED = 4
"""Fields of a configuration that a message names."""
SAMPLES = 1024
"""Numbers of each parameter that a fingerprint reads."""


class _NoInitialValues(TorchFunctionMode):
    """Leaves the functions of `torch.nn.init` out: on the meta device they do nothing, and load torch's compiler."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if getattr(function, "__module__", None) == "torch.nn.init":
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def on_meta_device() -> Iterator[None]:
    """Build models inside on the meta device: shapes without storage, to compare with weights or to adopt them."""
    with torch.device("meta"), _NoInitialValues():
        yield


class WeightsError(InputError, RuntimeError):
    """Weights that do not fit a model. Also a RuntimeError, which `load_state_dict` raises in torch."""


def note_config(model: Modules, _weights: dict[str, Any], _prefix: str, notes: dict[str, Any]) -> None:
    """Put the configuration into a state_dict's `_metadata`, beside torch's own notes (a hook of `state_dict`).

    So code that iterates over a state_dict still sees only tensors.
    """
    notes[CONFIG] = model.config.to_dict()


def check_weights(model: Modules, weights: Mapping[str, Any], strict: bool) -> None:
    """Raise WeightsError unless weights, and the configuration where they know one, fit the model.

    Without `strict`, names present on one side only are ignored. Weights without a configuration, such as those of an
    older file, fit any.
    """
    notes = getattr(weights, "_metadata", {}).get("", {})
    _check_config(model.config, notes.get(CONFIG))
    found, wanted = dict(weights), dict(model.state_dict())
    if not strict:
        common = [name for name in wanted if name in found]
        found, wanted = ({name: part[name] for name in common} for part in (found, wanted))
    try:
        compare(found, wanted, casts=True)
    except InputError as error:
        raise WeightsError(str(error)) from None
    for idea in model.ideas.values():
        try:
            idea.check_buffers(found, model.config)
        except InputError as error:
            raise WeightsError(str(error)) from None


def _check_config(config: LeptonConfig, noted: Any) -> None:
    if not isinstance(noted, dict):
        return
    own, theirs = config.flat_dict(), LeptonConfig.from_dict(noted).flat_dict()
    other = [name for name in {**own, **theirs} if theirs.get(name) != own.get(name)]
    if other:
        shown = [", ".join(f"{name}={each.get(name)!r}" for name in other[:LISTED]) for each in (theirs, own)]
        more = f" (and {len(other) - LISTED} more fields)" if len(other) > LISTED else ""
        idea, dot, field = other[0].partition(".")
        argument = f"{idea}={{{field!r}: {theirs[other[0]]!r}}}" if dot else f"{idea}={theirs.get(idea)!r}"
        raise WeightsError(
            f"these weights are of a model with {shown[0]}, this one has {shown[1]}{more}: build it with those values, "
            f"such as create_lepton_nano({argument}), or take Lepton.from_checkpoint(path); "
            "load_state_dict(dict(weights)) keeps this model's own"
        )


class Origin:
    """The weights that a state was made by. Their fingerprint is computed only when the state is saved: computing it in
    every step would take too long.
    """

    def __init__(self, model: Modules | None) -> None:
        self._model = None if model is None else weakref.ref(model)
        self._mark = None if model is None else _mark(model)

    def fingerprint(self) -> str | None:
        """Return the fingerprint of the model's weights; None once they have changed or the model is gone."""
        model = None if self._model is None else self._model()
        return fingerprint(model) if model is not None and _mark(model) == self._mark else None

    def __eq__(self, other: object) -> bool:
        """Whether both are the same weights of the same model."""
        return isinstance(other, Origin) and (self._model, self._mark) == (other._model, other._mark)

    def __hash__(self) -> int:
        return hash(self._mark)

    def __reduce__(self) -> tuple[Any, ...]:
        return Origin, (None,)  # a copy of a state, in another process, has no model


def _mark(model: Modules) -> tuple[int, int]:
    """Return what changes whenever the weights do: an optimizer updates all of them, and loading replaces all."""
    weight = model.embed.weight
    return id(weight), 0 if weight.is_inference() else weight._version


@torch.no_grad()
def fingerprint(model: Modules) -> str | None:
    """Return a SHA-256 of the parameters, by evenly spaced numbers of each in bf16; None on the meta device.

    So the copies of one checkpoint in fp32 and in bf16 have the same one, and it takes some milliseconds.
    """
    total = hashlib.sha256()
    samples: list[Tensor] = []
    for name, parameter in model.named_parameters():
        if parameter.is_meta:
            return None
        total.update(f"{name} {tuple(parameter.shape)}\n".encode())
        flat = parameter.reshape(-1)
        samples.append(flat[:: -(-len(flat) // SAMPLES)].to(torch.float32).to(torch.bfloat16))
    total.update(torch.cat(samples).cpu().view(torch.uint8).numpy().data)
    return total.hexdigest()
