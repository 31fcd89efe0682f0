"""The laws hold on a GPU too, with the kernels that make it fast: there each of them runs a second time, marked `gpu`.

In fp32, since the kernels have no fp64, and with heads that they can do.
"""

import pytest
import torch

from lepton.ops.attention_kernel import ATTENTION
from lepton.ops.cross_entropy import CROSS_ENTROPY
from tests.laws import lab

# Resuming runs the command, which picks its own device; sizes have none.
EVERYWHERE_THE_SAME = ("test_7_exact_resume", "test_8_sizes")


def pytest_generate_tests(metafunc):
    if torch.cuda.is_available() and metafunc.module.__name__.split(".")[-1] not in EVERYWHERE_THE_SAME:
        metafunc.fixturenames.insert(0, "_device")
        devices = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]
        metafunc.parametrize("_device", devices, indirect=True)


@pytest.fixture
def _device(request, monkeypatch):
    if request.param == "cpu":
        yield
        return
    real = torch.Generator
    monkeypatch.setattr(torch, "Generator", lambda device=None: real(device or torch.get_default_device()))

    def works(device, _dtype, *sizes):
        return device.type == "cuda" and all(size >= 16 for size in sizes)

    for kernel in (ATTENTION, CROSS_ENTROPY):
        monkeypatch.setattr(kernel, "works", works)
    monkeypatch.setitem(lab.SHAPE, "head_dim", 16)
    for variant in lab.VARIANTS.values():
        for name in variant.keys() & {"key_dim", "value_dim"}:
            monkeypatch.setitem(variant, name, 16)
    monkeypatch.setattr(lab.build, "__defaults__", (0, torch.float32))
    torch.set_default_device("cuda")
    yield
    torch.set_default_device(None)
