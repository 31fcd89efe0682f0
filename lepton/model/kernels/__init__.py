"""Triton kernels, each in a file that is imported only where it is used: LEPTON runs without Triton too."""

import importlib.util
import warnings
from collections.abc import Callable

import torch

# It comes with PyTorch's builds for GPUs on Linux, and is no dependency of its own.
HAS_TRITON = importlib.util.find_spec("triton") is not None


def works(what: str, trial: Callable[[], object]) -> bool:
    """Whether a trial of kernels works here; a warning says that `what` does without where it does not."""
    try:
        trial()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # compilers fail in many ways; none of them should stop a run that works without
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        warnings.warn(f"{what} runs slower: Triton cannot build its kernels here ({reason})", stacklevel=3)
        return False
    return True
