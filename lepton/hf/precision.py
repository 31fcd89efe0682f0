"""Autocast, which transformers trains with, as LEPTON's own mixed precision."""

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

from lepton.errors import InputError
from lepton.model import Network

Method = TypeVar("Method", bound=Callable[..., Any])


def in_own_precision(forward: Method) -> Method:
    """Let a method of a model with a `network` run in LEPTON's precision where its caller has asked for autocast.

    Autocast chooses a dtype for each operation. LEPTON's kernels want one dtype for all activations, and compute in
    fp32 where it counts: `Network.compute_dtype`.
    """

    @functools.wraps(forward)
    def run(self: Any, *arguments: Any, **options: Any) -> Any:
        with _precision(self.network):
            return forward(self, *arguments, **options)

    return run  # type: ignore[return-value]


@contextlib.contextmanager
def _precision(network: Network) -> Iterator[None]:
    """Set the dtype of activations to that of autocast, and switch autocast off, inside the block."""
    kind = network.device.type
    if kind == "meta" or not torch.is_autocast_enabled(kind):
        yield
        return
    dtype = torch.get_autocast_dtype(kind)
    if dtype == torch.float16:
        raise InputError("autocast to float16: LEPTON computes in bfloat16 or float32; use bf16=True, or neither")
    before, network.compute_dtype = network.compute_dtype, dtype
    try:
        with torch.autocast(kind, enabled=False):
            yield
    finally:
        network.compute_dtype = before
