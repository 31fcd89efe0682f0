"""Compiled cycles on disk, so that a later process neither traces nor compiles them again.

A file holds what Inductor made of one graph: the code between the large kernels, and its Triton kernels as binaries.
C++ kernels are in it as source; their binaries lie in Inductor's own cache, or are built again. A file is found by a
hash of all that the graph depends on; see `key_of`. To read one unpickles it: as with Inductor's own cache, who can
write to the folder can run code as the user.
"""

import contextlib
import functools
import hashlib
import importlib
import pickle
import platform
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import is_dataclass
from pathlib import Path
from types import NoneType
from typing import Any

import torch
from torch import Tensor, nn

import lepton
from lepton.errors import reason
from lepton.files import cache_folder, read_bytes, replacing
from lepton.model import Network
from lepton.ops.kernels import HAS_TRITON

MOST_FILES = 64
"""Files that are kept, those last used."""
MOST_BYTES = 1 << 28
"""Bytes of a file, at most. One of TINY has about one million."""
PLAIN = (bool, int, float, str, tuple, NoneType, torch.dtype)
_STARTED = time.time()


def key_of(model: Network, tensors: Sequence[Tensor], constants: object) -> str | None:
    """Return the name under which a graph is kept; None: it cannot be.

    Equal names mean equal graphs. The name is a hash of this package's source, of the versions of libraries, of the
    device and PyTorch's settings. It also holds the configuration and other plain attributes of all modules, and how
    the tensors lie in memory: dtype, shape, strides, alignment, and which share it. It cannot say what modules from
    elsewhere do, or hooks, or methods that were replaced, or source that has changed since the process began.

    Args:
        model: what is traced.
        tensors: all inputs of the graph.
        constants: what else the graph depends on; its `repr` says all of it.
    """
    modules = list(model.named_modules())
    foreign = any(type(each).__module__.split(".")[0] not in ("lepton", "torch") for _, each in modules)
    hooked = bool(nn.modules.module._has_any_global_hook()) or any(
        each._forward_hooks or each._forward_pre_hooks or any(callable(value) for value in vars(each).values())
        for _, each in modules
    )
    source = source_hash(Path(lepton.__file__).parent, _STARTED)
    if foreign or hooked or source is None:
        return None
    described = [
        lepton.__version__,
        source,
        _surroundings(model.device),
        constants,
        [(name, type(each).__qualname__, _plain_attributes(each)) for name, each in modules],
        [name for name, _ in [*model.named_parameters(), *model.named_buffers()]],
        _layout(tensors),
    ]
    return hashlib.sha256(repr(described).encode()).hexdigest()


@functools.cache
def source_hash(root: Path, since: float) -> str | None:
    """Return a hash of the Python files in a folder; None if one has changed after `since`, in seconds of the epoch."""
    found = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        if path.stat().st_mtime > since:
            return None
        content = path.read_bytes()
        found.update(f"{path.relative_to(root).as_posix()} {len(content)} ".encode() + content)
    return found.hexdigest()


def _surroundings(device: torch.device) -> list[Any]:
    """Return what the graph and its kernels depend on beside the model."""
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        hardware = [facts.name, facts.major, facts.minor, facts.multi_processor_count, torch.version.cuda]
    else:
        hardware = [platform.machine(), torch.backends.cpu.get_cpu_capability(), torch.get_num_threads()]
    from torch._inductor import config

    return [
        sys.version,
        platform.system(),
        torch.__version__,
        torch.version.git_version,
        importlib.import_module("triton").__version__ if HAS_TRITON else None,
        hardware,
        config.get_hash(),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.are_deterministic_algorithms_enabled(),
        torch.is_autocast_enabled(device.type),
        torch.is_inference_mode_enabled(),
    ]


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    return {name: value for name, value in vars(module).items() if isinstance(value, PLAIN) or is_dataclass(value)}


def _layout(tensors: Sequence[Tensor]) -> list[Any]:
    """Return what a compiler knows of tensors, all but their values."""
    first: dict[int, int] = {}
    return [
        (
            each.dtype,
            each.device,
            tuple(each.shape),
            each.stride(),
            each.storage_offset(),
            each.data_ptr() % 16,
            first.setdefault(each.untyped_storage().data_ptr(), i),
        )
        for i, each in enumerate(tensors)
    ]


def load(key: str) -> tuple[Any, Callable[..., Any]] | None:
    """Return what `save` was given, the graph as a function; None if there is nothing, or it cannot be used."""
    from torch._inductor.standalone_compile import AOTCompiledArtifact

    try:
        path = _path(key)
        if not path.exists():
            return None
        content = read_bytes(path, "compiled cycle", MOST_BYTES)
        digest, packed = content[:32], content[32:]
        if hashlib.sha256(packed).digest() != digest:
            return None
        note, compiled = pickle.loads(packed)
        graph = AOTCompiledArtifact.deserialize(compiled)
    except Exception:  # whatever is wrong with it, the cycle is compiled again, and the file replaced
        return None
    with contextlib.suppress(OSError):
        path.touch()
    return note, graph


def save(key: str, note: object, graph: Any) -> None:
    """Keep a graph that `torch._inductor.standalone_compile` made with ``aot=True``, and a note beside it."""
    try:
        packed = pickle.dumps((note, graph.serialize()))
        if len(packed) >= MOST_BYTES:
            raise ValueError(f"it has {len(packed):,} bytes")
        path = _path(key)
        with replacing(path) as unfinished:
            unfinished.write_bytes(hashlib.sha256(packed).digest() + packed)
    except Exception as error:  # a full disk, another process, a graph that Inductor cannot pack: all but time is there
        text = f"the compiled cycle is not kept, so warming up will take as long again ({reason(error)})"
        warnings.warn(text, stacklevel=2)
        return
    with contextlib.suppress(OSError):  # another process may delete them as well
        by_age = sorted(path.parent.glob("*.cycle"), key=lambda each: each.stat().st_mtime)
        for old in by_age[:-MOST_FILES]:
            old.unlink()


def _path(key: str) -> Path:
    return cache_folder() / "cycles" / f"{key}.cycle"
