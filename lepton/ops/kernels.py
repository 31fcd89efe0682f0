"""Whether a Triton kernel works on a device, found by trying it once."""

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch

from lepton.errors import reason

# It comes with PyTorch's builds for GPUs on Linux, and is not a dependency of its own.
HAS_TRITON = importlib.util.find_spec("triton") is not None
HALF = (torch.bfloat16, torch.float16)


class Kernel:
    """One or several Triton kernels of an operation. A trial run decides whether they are used.

    Args:
        what: name of the operation, for the warning.
        dtypes: dtypes that the kernels compute in.
        trial: runs them once, forward and backward; called with (device, dtype, *sizes).
    """

    def __init__(self, what: str, dtypes: tuple[torch.dtype, ...], trial: Callable[..., object]) -> None:
        self.what, self.dtypes, self._trial = what, dtypes, trial
        self._results: dict[Any, bool] = {}

        def works(device: torch.device, dtype: torch.dtype, *sizes: int) -> bool:
            if device.type != "cuda" or dtype not in dtypes or not HAS_TRITON:
                return False
            if any(size < 16 or size & (size - 1) for size in sizes):
                return False
            key = (device, dtype, *sizes)
            if key not in self._results:
                self._results[key] = self.try_out(device, dtype, *sizes)
            return self._results[key]

        # Dynamo calls it while tracing and treats the result as a constant. That needs a function of constants, which a
        # method is not. `torch.compiler.assume_constant_result` sets the same mark, but would import the compiler.
        works._dynamo_marked_constant = True  # type: ignore[attr-defined]
        self.works = works
        """Called with (device, dtype, *sizes): whether the kernels work there. Warns if they should and do not. `sizes`
        are lengths of their blocks; the kernels need powers of two, at least 16."""

    @property
    def sound(self) -> bool:
        """Whether no trial has failed so far."""
        return all([*self._results.values()])  # a copy: another thread may add to it

    def try_out(self, device: torch.device, dtype: torch.dtype, *sizes: int) -> bool:
        """Run the trial on (device, dtype, *sizes); return whether it succeeds, and warn if it does not."""
        try:
            with torch.inference_mode(False), torch.enable_grad():  # the first caller may be in inference mode
                self._trial(device, dtype, *sizes)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # a compiler can fail in many ways; the run works without it
            text = f"{self.what} runs slower: Triton cannot build its kernels here ({reason(error)})"
            warnings.warn(text, stacklevel=3)
            return False
        return True
