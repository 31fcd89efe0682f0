"""Attention in the kernel against attention with biases, in outputs and gradients.

The kernel runs on a GPU, or on a CPU in Triton's interpreter, ``TRITON_INTERPRET=1 pytest``.
"""

import pytest
import torch

from lepton.ops.attention import attend_with_bias
from lepton.ops.attention_kernel import Ranges, attend_in_ranges
from lepton.ops.attention_plan import bias
from tests.ops.devices import DEVICES, GPU
from tests.ops.test_attention_plan import example


def ranges_and_mask(length, window, slots, rows=2):
    position, sees, mask = example(length, window, slots, rows)
    ranges = Ranges.causal(position, window)
    return ranges if sees is None else ranges.with_slots(sees), mask


def compare(device, dtype, tolerance, ranges, mask, heads, kv_heads, width):
    """Outputs and gradients, each within `tolerance` of its size."""
    rows, length, entries = mask.shape
    norm = torch.nn.functional.rms_norm
    shapes = [(length, heads), (entries, kv_heads), (entries, kv_heads)]
    given = [norm(torch.randn(rows, *shape, width), (width,)).to(device, dtype).requires_grad_() for shape in shapes]
    weight = torch.randn(rows, length, heads, width, device=device)
    moved = Ranges(*(part.to(device) for part in list(vars(ranges).values())[:3]), ranges.tokens, ranges.window)
    found = attend_in_ranges(*given, moved)
    found = [found, *torch.autograd.grad(found, given, weight.to(dtype))]
    slow = [each.detach().double().requires_grad_() for each in given]
    expected = attend_with_bias(*slow, bias(mask.to(device), torch.float64))
    expected = [expected, *torch.autograd.grad(expected, slow, weight.to(dtype).double())]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() <= tolerance * other.norm()
    masked_BC = ~mask.any(1).to(device)
    assert not any(gradient[masked_BC].any() for gradient in found[2:])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("slots", [0, 7, 150])
@pytest.mark.parametrize(("length", "window"), [(150, 24), (150, None), (128, 129), (40, 16)])
def test_it_equals_attention_with_biases(device, length, window, slots):
    torch.manual_seed(length + slots)
    dtype, tolerance = (torch.float32, 1e-5) if device == "cpu" else (torch.bfloat16, 1e-2)
    compare(device, dtype, tolerance, *ranges_and_mask(length, window, slots), heads=4, kv_heads=2, width=32)


@pytest.mark.parametrize("device", DEVICES)
def test_it_does_without_the_queries_own_tokens(device):
    torch.manual_seed(0)
    dtype, tolerance = (torch.float32, 1e-5) if device == "cpu" else (torch.bfloat16, 1e-2)
    _, mask = ranges_and_mask(50, 24, 160)
    mask = mask[:, :, 50:]
    mask[:, :, 0] = True  # every query sees something
    compare(device, dtype, tolerance, Ranges.of_mask(mask), mask, heads=2, kv_heads=1, width=16)


@pytest.mark.parametrize("device", GPU)
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(12, 4, 64), (8, 2, 128)])
def test_it_does_full_sizes(heads, kv_heads, width, device):
    torch.manual_seed(0)
    compare(device, torch.bfloat16, 1e-2, *ranges_and_mask(700, 256, 168, rows=4), heads, kv_heads, width)
