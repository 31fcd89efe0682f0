"""Checks of arguments that are tensors of integers. They raise InputError."""

from typing import Any

import torch
from torch import Tensor

from lepton.errors import InputError

INTEGERS = {
    *(torch.uint8, torch.uint16, torch.uint32, torch.uint64),
    *(torch.int8, torch.int16, torch.int32, torch.int64),
}


def check_range(values: Tensor, low: int, high: int, what: str) -> None:
    """Raise InputError for a value outside low..high. Checked on a CPU only: a GPU would have to synchronise."""
    if values.device.type == "cpu" and not torch.compiler.is_compiling():
        least, most = int(values.min()), int(values.max())
        if least < low or most > high:
            raise InputError(f"{what} {least if least < low else most}: must lie in {low}..{high}")


def integers(value: Any, shape: tuple[int, ...], device: torch.device, name: str, meaning: str) -> Tensor:
    """Return `value` as int64; InputError unless it is a tensor of integers of this shape on this device.

    `name` and `meaning` are for the message.
    """
    if not isinstance(value, Tensor) or value.dtype not in INTEGERS or value.shape != shape:
        raise InputError(f"{name} must hold {meaning}, as a tensor of integers {list(shape)}, not {_kind(value)}")
    check_device(value, device, name)
    return value.long()


def check_flags(value: Any, shape: tuple[int, ...], device: torch.device, name: str, meaning: str) -> None:
    """Raise InputError unless `value` is a bool tensor of this shape, which `meaning` describes, on this device."""
    if not isinstance(value, Tensor) or value.dtype != torch.bool or value.shape != shape:
        raise InputError(f"{name} must have {meaning}, bool {list(shape)}, not {_kind(value)}")
    check_device(value, device, name)


def check_device(value: Tensor, device: torch.device, name: str) -> None:
    """Raise InputError for a tensor that is not on the model's device."""
    if value.device != device:
        raise InputError(f"{name}: on {value.device}, the model is on {device}; give {name}.to('{device}')")


def _kind(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} {list(value.shape)}"
    return type(value).__name__
