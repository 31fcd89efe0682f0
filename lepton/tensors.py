"""Named tensors from files: compared with what is wanted before anything uses them, and written with a hash.

Checkpoints, optimizers, states and memories all go through `compare`.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lepton.errors import InputError, reason
from lepton.files import readable, replacing

HASH = "sha256"
"""Key of the content's hash in a file's metadata. A file that has metadata but no hash is damaged."""
FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F32": torch.float32,
    "F64": torch.float64,
}
"""The names that the format gives to dtypes."""


def compare(found: Mapping[str, Any], wanted: Mapping[str, Tensor], *, casts: bool = False) -> None:
    """Raise unless `found` holds tensors of the names, shapes and dtypes of `wanted`, and only finite numbers.

    Args:
        found: what a file holds.
        wanted: what is needed; only shapes and dtypes are read, so the tensors may be on the meta device.
        casts: whether floating-point numbers of another precision will do.

    Raises:
        InputError: the first name that does not fit, and why.
    """
    for problem, names in (("Missing", wanted.keys() - found.keys()), ("Unexpected", found.keys() - wanted.keys())):
        if names:
            more = f" (and {len(names) - 1:,} more)" if len(names) > 1 else ""
            raise InputError(f"{problem} key '{min(names, key=str)}'{more}")
    for name, like in wanted.items():
        value = found[name]
        if not isinstance(value, Tensor):
            raise InputError(f"'{name}' is {type(value).__name__}, not a tensor")
        if value.shape != like.shape:
            raise InputError(
                f"size mismatch: '{name}' has shape {tuple(value.shape)}, this model needs {tuple(like.shape)}"
            )
        if value.dtype != like.dtype and not (casts and {value.dtype, like.dtype} <= {*FLOATS}):
            raise InputError(f"'{name}' holds {value.dtype}, this model needs {like.dtype}")
        check_finite(name, value)


def check_finite(name: str, value: Tensor) -> None:
    """Raise InputError if `value` holds NaN or infinity."""
    if value.dtype in FLOATS and value.numel() and not value.is_meta:
        low, high = value.detach().aminmax()  # takes no memory, and passes NaN on
        if not (math.isfinite(low) and math.isfinite(high)):
            raise InputError(f"'{name}' holds NaN or infinity")


def write(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file with the hash of its content; `path` holds its old content or all of the new.

    Raises:
        InputError: `path` is not a regular file.
        OSError, SafetensorError: it cannot be written.
    """
    plain = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    with replacing(path) as unfinished:
        save_file(plain, unfinished, {**metadata, HASH: digest(plain, metadata)})


def metadata(path: str | Path, what: str) -> dict[str, str]:
    """Return the metadata of a safetensors file, of which nothing else is read; `what` names the file in messages.

    Raises:
        InputError: no such file, or its beginning is torn or damaged.
    """
    path = readable(path, what)
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except Exception as error:  # as in `read`
        raise InputError(f"{path}: not a whole safetensors file ({reason(error)})") from None


def read(path: str | Path, what: str) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors of a safetensors file, on the CPU, and its metadata; `what` names the file in messages.

    Raises:
        InputError: no such file, torn or damaged.
    """
    path = readable(path, what)
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
        tensors = _mapped(path)
    except Exception as error:  # of its own kind, and a KeyError for a dtype that is not known here
        raise InputError(f"{path}: not a whole safetensors file ({reason(error)})") from None
    known = metadata.pop(HASH, None)
    if (metadata or known) and known != digest(tensors, metadata):
        raise InputError(f"{path} is damaged: its content does not have the hash that was written with it")
    return tensors, metadata


def _mapped(path: Path) -> dict[str, Tensor]:
    """Return the tensors of a whole file, which lie in a private mapping of it.

    `safe_open.get_tensor` does the same, but keeps two objects a tensor for good (safetensors 0.8.0): a server that
    reads states again and again would grow.
    """
    with path.open("rb") as file:
        start = 8 + (size := int.from_bytes(file.read(8), "little"))
        header = json.loads(file.read(size))
    whole = torch.from_file(str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8)
    found = {}
    for name, entry in header.items():
        if name != "__metadata__":
            dtype, (first, end) = DTYPES[entry["dtype"]], entry["data_offsets"]
            part = whole[start + first : start + end]
            if part.storage_offset() % dtype.itemsize:  # of another writer, who does not align
                part = part.clone()
            found[name] = part.view(dtype).reshape(entry["shape"])
    return found


def digest(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Return the SHA-256 of names, dtypes, shapes and bytes of tensors on the CPU, and of the metadata."""
    total = hashlib.sha256(json.dumps(metadata, sort_keys=True).encode())
    for name, value in sorted(tensors.items()):
        total.update(json.dumps([name, str(value.dtype), list(value.shape)]).encode())
        total.update(value.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return total.hexdigest()


__all__ = ["SafetensorError", "check_finite", "compare", "digest", "metadata", "read", "write"]
