"""Files of weights alone, in the safetensors format: one or several, with floating-point numbers or int8.

`lepton.checkpoint` saves and loads them where a name ends in .safetensors. In int8 a matrix takes one byte an element:
each row is its scale, a 127th of the row's largest value, times integers of -127 to 127, rounded to nearest. Such a
matrix is read as fp32.

Several files, such as model-00001-of-00002.safetensors, are one set of weights: any of their names stands for all.
"""

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lepton import tensors
from lepton.errors import InputError, naming
from lepton.files import parse_json

SUFFIX = ".safetensors"
SCALE = ":row_scale"
"""What the name of a matrix's scales ends in."""
PART = re.compile(r"(.*)-(\d{5})-of-(\d{5})\.safetensors", re.DOTALL)


def to_int8(weights: Mapping[str, Tensor], matrices: set[str]) -> dict[str, Tensor]:
    """Return `weights` with those named in `matrices` [N, M] as int8 [N, M] and scales fp32 [N, 1]."""
    found = {}
    for name, value in weights.items():
        if name not in matrices:
            found[name] = value
            continue
        precise = value.detach().float()
        scale = precise.abs().amax(1, keepdim=True) / 127
        # A row of zeros has scale 0.
        found[name] = (precise / scale.clamp(min=torch.finfo(torch.float32).tiny)).round().to(torch.int8)
        found[name + SCALE] = scale
    return found


def from_int8(found: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights that `to_int8` took, up to rounding; those without a scale as they are.

    Raises:
        InputError: a scale without its matrix, or of another shape.
    """
    weights = {name: value for name, value in found.items() if not name.endswith(SCALE)}
    for name, scale in found.items():
        if not name.endswith(SCALE):
            continue
        of = name.removesuffix(SCALE)
        value = weights.get(of)
        if value is None or value.dtype != torch.int8 or value.dim() != 2:
            raise InputError(f"'{name}' is the scale of no int8 matrix")
        if scale.dtype != torch.float32 or scale.shape != (len(value), 1):
            raise InputError(f"'{name}' has shape {tuple(scale.shape)}: '{of}' needs fp32 {(len(value), 1)}")
        weights[of] = value * scale
    return weights


def write(
    path: Path, weights: Mapping[str, Tensor], about: Mapping[str, Any], tokenizer: str | None, most: int | None = None
) -> list[Path]:
    """Write weights to `path`, and return the files.

    Args:
        path: ends in .safetensors. Of several files, each has its number before that.
        weights: by name.
        about: plain values that stand in every file.
        tokenizer: its JSON, which stands in the first one; None: there is none.
        most: bytes of tensors and tokenizer in a file; a larger tensor has a file of its own. None: all are in one.
    """
    parts, paths = list(_parts(weights, most, len(json.dumps(tokenizer or "")))), [path]
    if len(parts) > 1:
        about = {**about, "all_parts": tensors.digest({name: each.cpu() for name, each in weights.items()}, {})}
        paths = [path.with_name(f"{path.stem}-{i:05}-of-{len(parts):05}{SUFFIX}") for i in range(1, len(parts) + 1)]
    metadata = {"format": "pt", "lepton": json.dumps(about)}  # "pt" is what other readers of the format look for
    for i, (part, file) in enumerate(zip(parts, paths, strict=True)):
        tensors.write(file, part, metadata | ({"tokenizer": tokenizer} if tokenizer and not i else {}))
    return paths


def parts_beside(path: Path) -> list[Path]:
    """Return the files that hold parts of weights called `path`."""
    names = ((file, PART.fullmatch(file.name)) for file in path.parent.glob(f"*{SUFFIX}"))
    return sorted(file for file, match in names if match and match[1] == path.stem)


def about(path: Path) -> dict[str, Any]:
    """Return the plain values that `write` put beside weights, such as their size; no weights are read.

    Raises:
        InputError: no such file, or its beginning is torn or damaged.
    """
    found = parse_json(tensors.metadata(path, "checkpoint").get("lepton", "{}"), str(path))
    return found if isinstance(found, dict) else {}


def read(path: Path) -> dict[str, Any]:
    """Return the content of a checkpoint that holds weights alone.

    Raises:
        InputError: a file is missing, torn, damaged, or of other weights than the rest.
    """
    paths = [path]
    if match := PART.fullmatch(path.name):
        stem, _, count = match.groups()
        paths = [path.with_name(f"{stem}-{i:05}-of-{count}{SUFFIX}") for i in range(1, int(count) + 1)]
    weights: dict[str, Tensor] = {}
    tokenizer, known = None, None
    for file in paths:
        found, metadata = tensors.read(file, "checkpoint")
        tokenizer = metadata.get("tokenizer", tokenizer)
        if known not in (None, metadata.get("lepton")) or weights.keys() & found.keys():
            raise InputError(f"{file} and {paths[0]} are parts of different weights: export them again")
        known = metadata.get("lepton")
        weights |= found
    about = parse_json(known or "{}", str(path))
    with naming(path):
        return {**(about if isinstance(about, dict) else {}), "model": from_int8(weights), "tokenizer": tokenizer}


def _parts(weights: Mapping[str, Tensor], most: int | None, size: int) -> Iterator[dict[str, Tensor]]:
    """Yield the weights in parts of at most `most` bytes, in their order; `size` bytes of the first one are taken."""
    part: dict[str, Tensor] = {}
    for name, value in weights.items():
        if most is not None and size + value.nbytes > most and (part or value.nbytes <= most):
            yield part
            part, size = {}, 0
        part[name] = value
        size += value.nbytes
    yield part
