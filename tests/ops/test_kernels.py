"""Which kernels are used where, and what happens where they cannot be built. Needs no Triton."""

import pytest
import torch

from lepton.ops import kernels
from lepton.ops.attention_kernel import ATTENTION
from lepton.ops.cross_entropy import CROSS_ENTROPY
from lepton.ops.delta_rule import DELTA_RULE
from lepton.ops.few_writes import FEW_WRITES
from lepton.ops.kernels import Kernel
from lepton.ops.products import PRODUCTS
from lepton.ops.ring_attention import RING_ATTENTION
from tests.ops.devices import GPU

CUDA = torch.device("cuda")


@pytest.fixture
def tried(monkeypatch):
    """A kernel for fp32 on a machine that claims to have Triton, and the trials that it has made."""
    monkeypatch.setattr(kernels, "HAS_TRITON", True)
    trials = []

    def trial(*where):
        assert torch.is_grad_enabled()
        assert not torch.is_inference_mode_enabled()
        trials.append(where)

    return Kernel("a test", (torch.float32,), trial), trials


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_a_kernel_is_tried_once_whoever_asks_first(tried, mode):
    kernel, trials = tried
    with mode():
        assert kernel.works(CUDA, torch.float32, 64, 128)
        assert kernel.works(CUDA, torch.float32, 64, 128)
    assert trials == [(CUDA, torch.float32, 64, 128)]
    assert kernel.sound


def test_other_devices_dtypes_and_sizes_are_not_tried(tried, monkeypatch):
    kernel, trials = tried
    assert not kernel.works(torch.device("cpu"), torch.float32, 64)
    assert not kernel.works(CUDA, torch.float64, 64)
    assert not kernel.works(CUDA, torch.float32, 64, 8)
    assert not kernel.works(CUDA, torch.float32, 96, 64)
    monkeypatch.setattr(kernels, "HAS_TRITON", False)
    assert not kernel.works(CUDA, torch.float32, 64)
    assert not trials


def test_a_kernel_that_cannot_be_built_is_done_without(monkeypatch):
    def fail(*_):
        raise RuntimeError("no compiler\nand much more")

    monkeypatch.setattr(kernels, "HAS_TRITON", True)
    kernel = Kernel("a test", (torch.float32,), fail)
    with pytest.warns(UserWarning, match=r"a test runs slower: Triton cannot build its kernels here \(no compiler\)$"):
        assert not kernel.works(CUDA, torch.float32)
    assert not kernel.works(CUDA, torch.float32)  # and says so once
    assert not kernel.sound


def test_where_memory_ran_out_the_trial_means_nothing():
    def fail(*_):
        raise torch.OutOfMemoryError

    with pytest.raises(torch.OutOfMemoryError):
        Kernel("a test", (torch.float32,), fail).try_out(CUDA, torch.float32)


def test_the_compiler_asks_while_it_traces(tried):
    """The result is a constant of the graph, and the trial is no part of it."""
    kernel, trials = tried

    def double_or_nothing(x):
        return 2 * x if kernel.works(CUDA, x.dtype, x.shape[0]) else 0 * x

    compiled = torch.compile(double_or_nothing, fullgraph=True, dynamic=False, backend="eager")
    assert compiled(torch.ones(16)).sum() == 32
    assert compiled(torch.ones(17)).sum() == 0
    assert trials == [(CUDA, torch.float32, 16)]


KERNELS = [ATTENTION, CROSS_ENTROPY, DELTA_RULE, FEW_WRITES, PRODUCTS, RING_ATTENTION]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.what)
def test_a_cpu_has_none(kernel):
    assert not any(kernel.works(torch.device("cpu"), dtype, 64, 64) for dtype in (torch.bfloat16, torch.float32))


@pytest.mark.parametrize("device", GPU)
@pytest.mark.parametrize(
    ("kernel", "dtype", "sizes"),
    [
        (ATTENTION, torch.bfloat16, [64]),
        (CROSS_ENTROPY, torch.bfloat16, []),
        (DELTA_RULE, torch.float32, [64, 128]),
        (FEW_WRITES, torch.float32, [64, 128]),
        (PRODUCTS, torch.bfloat16, []),
        (RING_ATTENTION, torch.float16, [128]),
    ],
    ids=lambda value: getattr(value, "what", None),
)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_trials_succeed(kernel, dtype, sizes, mode, device):
    with mode():
        assert kernel.try_out(torch.device(device), dtype, *sizes)
