"""Whether a Triton kernel works on a device: asked here, for every kernel alike."""

import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch

# It comes with PyTorch's builds for GPUs on Linux, and is no dependency of its own.
HAS_TRITON = importlib.util.find_spec("triton") is not None
HALF = (torch.bfloat16, torch.float16)


class Kernel:
    """A Triton kernel, or some that run together, of which a trial shows whether they work.

    Args:
        what: what runs slower without it, for the warning.
        dtypes: the dtypes that it computes in.
        trial: runs it once, forward and backward, on (device, dtype, sizes).
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
                self._results[key] = self.try_out(*key)
            return self._results[key]

        # The compiler calls it while it traces and takes the result for a constant, which it can where all arguments
        # are constants; so it is no method. The mark is what `torch.compiler.assume_constant_result` sets, which would
        # import the whole compiler for it.
        works._dynamo_marked_constant = True  # type: ignore[attr-defined]
        self.works = works
        """Whether it works on (device, dtype, sizes); a warning says so where it should and does not. `sizes` are
        lengths that its blocks span: powers of two, 16 or more."""

    def try_out(self, *where: Any) -> bool:
        """Run the trial; return whether it succeeds, and warn if it does not."""
        try:
            with torch.inference_mode(False), torch.enable_grad():  # the first caller may be generating
                self._trial(*where)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:  # compilers fail in many ways; none of them should stop a run that works without
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            warnings.warn(f"{self.what} runs slower: Triton cannot build its kernels here ({reason})", stacklevel=3)
            return False
        return True
