"""Attention in ranges against attention with masks, in value and gradients.

Its kernels run on a GPU, or on a CPU in Triton's interpreter, ``TRITON_INTERPRET=1 pytest``; ranges are tested
everywhere.
"""

import pytest
import torch

from lepton.model import ranges as module
from lepton.model.attention import attend, unseen
from lepton.model.kernels import HAS_TRITON
from lepton.model.ranges import Ranges, attend_in_ranges, runs
from lepton.model.timeline import Timeline, sees
from tests.laws.lab import EOS, VARIANTS, build, text
from tests.model.test_cross_entropy_kernel import DEVICES


def example(length, window, slots, rows=2):
    """A row of one document and rows of several, with slots that are seen for a while, and some that never are."""
    tokens = torch.ones(rows, length, dtype=torch.long)
    tokens[1:, length // 3 :: 50] = EOS
    zero = torch.zeros(rows, dtype=torch.long)
    timeline = Timeline.read(tokens, zero, zero, eos_id=EOS, segment=8)
    index_BT = torch.arange(length).expand(rows, -1)
    first = torch.randint(length, (rows, slots))
    last = first + torch.randint(length, (rows, slots))
    slots_BTC = (index_BT[:, :, None] >= first[:, None]) & (index_BT[:, :, None] < last[:, None])
    slots_BTC[:, :, ::5] = False
    mask = torch.cat([sees(timeline, index_BT, torch.arange(length), window), slots_BTC], 2)
    return Ranges.of(timeline, window, slots_BTC if slots else None), mask


@pytest.mark.parametrize("slots", [0, 1, 40])
@pytest.mark.parametrize("window", [None, 1, 24, 300])
@pytest.mark.parametrize("length", [1, 8, 150])
def test_ranges_say_what_masks_say(length, window, slots):
    ranges, mask = example(length, window, slots)
    index_T1 = torch.arange(length)[:, None]
    by_column = (index_T1 >= ranges.first_BJ[:, None]) & (index_T1 < ranges.last_BJ[:, None])
    assert torch.equal(by_column, mask)
    by_query = (torch.arange(length) >= ranges.start_BT[:, :, None]) & (torch.arange(length) <= index_T1)
    assert torch.equal(by_query, mask[:, :, :length])
    assert (ranges.first_BJ <= ranges.last_BJ).all()


def test_runs_of_what_is_never_seen_are_empty():
    mask = torch.tensor([[False, True, False], [False, True, True], [False, False, True]])[None]
    first, last = runs(mask)
    assert first.tolist() == [[3, 0, 1]]
    assert last.tolist() == [[3, 2, 3]]


def compare(device, dtype, tolerance, ranges, mask, heads, kv_heads, width):
    """Value and gradients, each within `tolerance` of its size."""
    rows, length, columns = mask.shape
    norm = torch.nn.functional.rms_norm
    shapes = [(length, heads), (columns, kv_heads), (columns, kv_heads)]
    given = [norm(torch.randn(rows, *shape, width), (width,)).to(device, dtype).requires_grad_() for shape in shapes]
    slope = torch.randn(rows, length, heads, width, device=device)
    moved = Ranges(*(part.to(device) for part in list(vars(ranges).values())[:3]), ranges.tokens, ranges.window)
    found = attend_in_ranges(*given, moved)
    found = [found, *torch.autograd.grad(found, given, slope.to(dtype))]
    slow = [each.detach().double().requires_grad_() for each in given]
    expected = attend(*slow, unseen(mask.to(device), torch.float64))
    expected = [expected, *torch.autograd.grad(expected, slow, slope.to(dtype).double())]
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).norm() <= tolerance * other.norm()
    unseen_BC = ~mask.any(1).to(device)
    assert not any(gradient[unseen_BC].any() for gradient in found[2:])


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("slots", [0, 7, 150])
@pytest.mark.parametrize(("length", "window"), [(150, 24), (150, None), (128, 129), (40, 16)])
def test_kernels_equal_masked_attention(device, length, window, slots):
    torch.manual_seed(length + slots)
    dtype, tolerance = (torch.float32, 1e-5) if device == "cpu" else (torch.bfloat16, 1e-2)
    compare(device, dtype, tolerance, *example(length, window, slots), heads=4, kv_heads=2, width=32)


@pytest.mark.parametrize("device", DEVICES)
def test_kernels_without_columns_of_tokens(device):
    torch.manual_seed(0)
    dtype, tolerance = (torch.float32, 1e-5) if device == "cpu" else (torch.bfloat16, 1e-2)
    ranges, mask = example(50, 24, 160)
    mask[:, :, 50] = True  # every query sees something
    first, last = runs(mask[:, :, 50:])
    ranges = Ranges(ranges.start_BT, first.int(), last.int(), 0, None)
    compare(device, dtype, tolerance, ranges, mask[:, :, 50:], heads=2, kv_heads=1, width=16)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("heads", "kv_heads", "width"), [(12, 4, 64), (8, 2, 128)])
def test_kernels_at_full_size(heads, kv_heads, width):
    torch.manual_seed(0)
    compare("cuda", torch.bfloat16, 1e-2, *example(700, 256, 168, rows=4), heads, kv_heads, width)


def test_only_gpus_in_half_precision_have_the_kernel():
    assert not module.has_kernel(torch.device("cpu"), torch.bfloat16, 64)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_a_model_in_ranges_equals_one_with_masks(device, variant, monkeypatch):
    """Loss and all gradients; in fp32, which the kernels can do and nobody but a test asks them to."""
    model, tokens = build(variant, dtype=torch.float32, head_dim=16).to(device), text(3, rows=3, length=90).to(device)
    found, asked = [], []
    for in_ranges in (False, True):
        monkeypatch.setattr("lepton.model.lepton.has_kernel", lambda *_, answer=in_ranges: asked.append(1) or answer)
        loss = model.loss(tokens, think=torch.tensor([0, 1, 4], device=device) if model.thoughts else None).loss
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)])
    assert len(asked) == 2
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def test_a_past_and_a_route_are_left_to_masks(monkeypatch):
    """Without a past and with full depth the model asks for the kernel, and here it has none."""
    monkeypatch.setattr("lepton.model.lepton.has_kernel", lambda *_: True)
    model, tokens = build("complete"), text(3, length=30)
    state = model.new_state(2)
    model(tokens, state)
    model(tokens, depth=0.5)
    with pytest.raises(ImportError if not HAS_TRITON else Exception):
        model(tokens)
