"""Where tests of Triton kernels run: on a GPU, or on a CPU in Triton's interpreter, ``TRITON_INTERPRET=1 pytest``."""

import os

import pytest
import torch

from lepton.ops.kernels import HAS_TRITON

INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"
COMPILED = HAS_TRITON and not INTERPRETED and torch.cuda.is_available()
GPU_MARKS = [
    pytest.mark.gpu,
    pytest.mark.skipif(not COMPILED, reason="needs a CUDA device, Triton, and no TRITON_INTERPRET"),
]
CPU_MARK = pytest.mark.skipif(not INTERPRETED, reason="needs Triton and TRITON_INTERPRET=1")
GPU = [pytest.param("cuda", marks=GPU_MARKS)]
DEVICES = [pytest.param("cpu", marks=CPU_MARK), *GPU]


def force(monkeypatch, kernel, answer=True):
    """Decide whether a kernel runs, on any device and in any dtype; return a list that grows when it is asked for."""
    asked = []
    monkeypatch.setattr(kernel, "works", lambda *where: asked.append(where) or answer)
    return asked
