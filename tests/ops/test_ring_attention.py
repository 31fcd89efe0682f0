"""Attention over a ring against attention to everything at once, and the kernel against the plain form.

The kernel runs on a GPU, or on a CPU in Triton's interpreter, ``TRITON_INTERPRET=1 pytest``.
"""

import dataclasses
import random

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from lepton.config import LeptonConfig
from lepton.model.attention import Attention, Rotary
from lepton.ops import ring_attention as module
from lepton.ops.attention import naive_attention
from lepton.ops.ring_attention import RING_ATTENTION, Extra, Ring, plain_ring_attention, ring_attention
from tests.ops.devices import DEVICES, GPU, force

NAN = float("nan")
SHAPES = [(3, 1, 16), (4, 2, 32)]
"""Query heads, kv heads and their width."""


def attention_of(heads, kv_heads, head_dim, biased=True, dtype=torch.float64, shifted=False):
    shape = {"heads": heads, "kv_heads": kv_heads, "head_dim": head_dim}
    config = LeptonConfig(width=24, layers=2, ffn=8, slot_bias=biased, shifted_keys=shifted, **shape)
    attention = Attention(config, shifted=shifted).to(dtype).requires_grad_(False)
    for weight in attention.parameters():
        torch.nn.init.normal_(weight, std=weight.shape[1] ** -0.5)
    return attention


def rotary_of(position, head_dim, dtype):
    return Rotary.at(position, head_dim, 100.0, dtype)


def draw_extra(attention, pool, slots, tokens, dtype, seen=0.4):
    """Complete entries in a pool, for as many rows in another order, and what each token sees of them."""
    states, bias = torch.randn(pool, slots, 24, dtype=torch.float64), torch.randn(pool, slots, dtype=torch.float64)
    keys_values = [part.to(dtype) for part in attention.key_value(states, None, bias)]
    return Extra(*keys_values, torch.randperm(pool), torch.rand(pool, tokens, slots) < seen)


def draw(
    heads, kv_heads, head_dim, tokens, positions, *,
    slots=0, window=9, device="cpu", dtype=torch.float64, shifted=False,
):  # fmt: skip
    """A step of one row for each position, with a ring of random normed entries, and its arguments."""
    attention, rows = attention_of(heads, kv_heads, head_dim), len(positions)
    position = torch.tensor(positions)
    rotary = rotary_of(position[:, None] + torch.arange(tokens), head_dim, dtype)
    shape = (rows + 2, window - 1 + tokens + 3, kv_heads, head_dim)
    rings = [torch.nn.functional.rms_norm(torch.randn(shape), (head_dim,)).to(device, dtype) for _ in range(2)]
    ring = Ring(*rings, (torch.randperm(rows + 2)[:rows]).to(device), position.to(device), shifted=shifted)
    extra = draw_extra(attention, rows, slots, tokens, dtype) if slots else None
    extra = extra and Extra(*(part.to(device) for part in vars(extra).values()))
    widths = [heads * head_dim, *[kv_heads * head_dim] * 2]
    new = [torch.randn(rows, tokens, width).to(device, dtype) for width in widths]
    return [*new, (rotary.cos.to(device), rotary.sin.to(device)), ring, extra]


def copied(given, **changes):
    """The same arguments with rings, and whatever is named, of their own."""
    *new, ring, extra = given
    return [*new, dataclasses.replace(ring, **{"k": ring.k.clone(), "v": ring.v.clone(), **changes}), extra]


def doubled(given):
    *new, rotary, ring, extra = given
    ring = dataclasses.replace(ring, k=ring.k.double(), v=ring.v.double())
    extra = extra and dataclasses.replace(extra, k=extra.k.double(), v=extra.v.double())
    return [*(each.double() for each in new), tuple(each.double() for each in rotary), ring, extra]


def half(device):
    """The interpreter does not round to bf16."""
    return torch.bfloat16 if device == "cuda" else torch.float16


def compare(given, tolerance, **options):
    """Outputs and rings against the plain form in fp64: each within `tolerance` of its size."""
    precise = doubled(copied(given))
    found, expected = ring_attention(*given, **options), plain_ring_attention(*precise, **options)
    assert found.dtype == given[0].dtype
    assert found.shape == given[0].shape
    for one, other in ((found, expected), (given[4].k, precise[4].k), (given[4].v, precise[4].v)):
        assert (one.double() - other).norm() <= tolerance * other.norm()


def shifted_key(k, at):
    """The key [B, K, H] that others attend to at a token of a document, one number after the other."""
    before = k[:, at - 1] if at else torch.zeros_like(k[:, 0])
    half = k.shape[-1] // 2
    return torch.stack([(k[:, at] if i < half else before)[..., i] for i in range(2 * half)], -1)


def stream(attention, window, slots, device, dtype, tolerance, length=60, sequences=3, most=8):
    """Decode sequences through rings in random chunks and orders, and compare with all tokens at once."""
    kv_heads, head_dim = attention.kv_heads, attention.head_dim
    x = torch.randn(sequences, length, 24, dtype=torch.float64)
    every = rotary_of(torch.arange(length).expand(sequences, -1), head_dim, torch.float64)
    projected = [linear(x).to(device, dtype) for linear in (attention.q, attention.k, attention.v)]
    extra = draw_extra(attention, sequences, slots, length, torch.float64)
    index = torch.arange(length)
    age = index[:, None] - index
    mask = ((age >= 0) & (age < window)).expand(sequences, -1, -1)
    q, k, v = attention.query_key_value(x, every, every)
    if attention.shifted:
        k = torch.stack([shifted_key(k, at) for at in range(length)], 1)
    k, v = torch.cat([k, extra.k[extra.row_B]], 1), torch.cat([v, extra.v[extra.row_B]], 1)
    expected = naive_attention(q, k, v, torch.cat([mask, extra.mask_BTC], 2)).flatten(2)

    columns = window - 1 + most + attention.shifted
    rings = [torch.full((sequences + 1, columns, kv_heads, head_dim), NAN, device=device, dtype=dtype) for _ in "kv"]
    slot_of, found = torch.randperm(sequences), torch.zeros(expected.shape)
    pools = [part.to(device, dtype) for part in (extra.k, extra.v)]
    rows, done = random.Random(length + window + slots), [0] * sequences
    while min(done) < length:
        tokens = rows.randint(1, most)
        active = [each for each in rows.sample(range(sequences), sequences) if done[each] + tokens <= length]
        if not active:
            continue
        batch = torch.tensor([*active, *[active[0]] * 2])  # two rows fill the batch, in a ring of nobody
        position = torch.tensor([done[each] for each in batch])
        slot = slot_of[batch]
        slot[len(active) :] = sequences
        at = position[:, None] + torch.arange(tokens)
        rotary = rotary_of(at, head_dim, dtype)
        seen = extra.mask_BTC[batch[:, None], at]
        out = ring_attention(
            *(each[batch[:, None].to(device), at.to(device)] for each in projected),
            (rotary.cos.to(device), rotary.sin.to(device)),
            Ring(*rings, slot.to(device), position.to(device), shifted=attention.shifted),
            Extra(*pools, extra.row_B[batch].to(device), seen.to(device)) if slots else None,
            window=window,
            biased=attention.biased,
        )
        for row, each in enumerate(active):
            found[each, done[each] : done[each] + tokens] = out[row].cpu()
            done[each] += tokens
    assert ((found - expected).norm(dim=2) <= tolerance * expected.norm(dim=2)).all()


@pytest.mark.parametrize(("biased", "shifted"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("slots", [0, 5])
@pytest.mark.parametrize("window", [1, 2, 9, 20])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(3, 1, 8), (4, 2, 12)])
def test_a_decoded_stream_equals_attention_to_all(heads, kv_heads, head_dim, window, slots, biased, shifted):
    """Rings wrap, rows change places, and what was never written is nan."""
    attention = attention_of(heads, kv_heads, head_dim, biased, shifted=shifted)
    stream(attention, window, slots, "cpu", torch.float64, 1e-5)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("window", [1, 20])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def test_the_kernel_decodes_it_too(heads, kv_heads, head_dim, window, shifted, device, monkeypatch):
    force(monkeypatch, RING_ATTENTION)
    dtype, tolerance = (torch.float32, 1e-4) if device == "cpu" else (torch.bfloat16, 4e-2)
    attention = attention_of(heads, kv_heads, head_dim, shifted=shifted)
    stream(attention, window, 5, device, dtype, tolerance, length=40)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("biased", "shifted"), [(True, False), (False, False), (True, True)])
@pytest.mark.parametrize("slots", [0, 40])
@pytest.mark.parametrize("tokens", [1, 5, 8])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), SHAPES)
def test_the_kernel_equals_the_plain_form(
    heads, kv_heads, head_dim, tokens, slots, biased, shifted, device, monkeypatch
):
    force(monkeypatch, RING_ATTENTION)
    dtype, tolerance = (torch.float32, 1e-5) if device == "cpu" else (torch.bfloat16, 1e-2)
    options = {"slots": slots, "window": 40, "device": device, "dtype": dtype, "shifted": shifted}
    given = draw(heads, kv_heads, head_dim, tokens, [0, 3, 39, 40, 1000], **options)
    compare(given, tolerance, window=40, biased=biased)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("blocks", [(16, 16, 4, 1), (16, 16, 4, 2), (32, 64, 8, 1)])
def test_blocks_of_every_size_are_the_same(blocks, device, monkeypatch):
    from lepton.ops.triton import ring_attention as kernels

    force(monkeypatch, RING_ATTENTION)
    monkeypatch.setattr(kernels, "BLOCKS", ((0, kernels.Blocks(*blocks)),))
    dtype, tolerance = (torch.float32, 1e-5) if device == "cpu" else (torch.bfloat16, 1e-2)
    given = draw(3, 1, 16, 5, [0, 15, 16, 17, 70], slots=40, window=50, device=device, dtype=dtype, shifted=True)
    compare(given, tolerance, window=50, biased=True)


@pytest.mark.parametrize("device", DEVICES)
def test_the_kernel_rounds_as_the_plain_form_does(device, monkeypatch):
    """What it writes to the rings."""
    force(monkeypatch, RING_ATTENTION)
    given = draw(3, 1, 16, 8, [0, 100, 200], device=device, dtype=half(device))
    plain = copied(given)
    ring_attention(*given, window=9, biased=True)
    plain_ring_attention(*plain, window=9, biased=True)
    assert torch.equal(given[4].v, plain[4].v)
    different = (given[4].k != plain[4].k).float().mean()  # a norm can end on the other side of a rounding
    assert different <= 0.002
    torch.testing.assert_close(given[4].k, plain[4].k)


def garbled(given, window, filling):
    """The same step with `filling` in all that no token attends to."""
    *new, ring, extra = copied(given)
    columns = ring.k.shape[1]
    stays = torch.zeros(ring.k.shape[:2], dtype=torch.bool)
    for slot, position in zip(ring.slot_B.tolist(), ring.position_B.tolist(), strict=True):
        stays[slot, [p % columns for p in range(max(0, position - window + 1 - ring.shifted), position)]] = True
    for part in (ring.k, ring.v):
        part[~stays.to(part.device)] = filling
    keys, values = extra.k.clone(), extra.v.clone()
    for row, pool_row in enumerate(extra.row_B.tolist()):
        unseen = ~extra.mask_BTC[row].any(0)
        assert unseen.any()
        keys[pool_row, unseen] = values[pool_row, unseen] = filling
    return [*new, ring, dataclasses.replace(extra, k=keys, v=values)]


@pytest.mark.parametrize("device", ["plain", *DEVICES])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("tokens", [1, 4])
def test_what_no_token_attends_to_changes_nothing(tokens, shifted, device, monkeypatch):
    """Nor does a second call change anything: the result has no order of its own."""
    force(monkeypatch, RING_ATTENTION, answer=device != "plain")
    place = "cpu" if device == "plain" else device
    given = draw(3, 1, 16, tokens, [0, 2, 8, 9, 500], slots=30, device=place, shifted=shifted)
    given[5].mask_BTC[:, :, ::3] = False
    if device != "plain":
        given = to_dtype(given, torch.float32 if device == "cpu" else torch.bfloat16)
    expected = ring_attention(*copied(given), window=9, biased=True)
    for filling in (0.0, NAN, float("inf")):
        assert torch.equal(ring_attention(*garbled(given, 9, filling), window=9, biased=True), expected)


def to_dtype(given, dtype):
    *new, rotary, ring, extra = given
    ring = dataclasses.replace(ring, k=ring.k.to(dtype), v=ring.v.to(dtype))
    extra = extra and dataclasses.replace(extra, k=extra.k.to(dtype), v=extra.v.to(dtype))
    return [*(each.to(dtype) for each in new), tuple(each.to(dtype) for each in rotary), ring, extra]


@pytest.mark.parametrize("device", ["plain", *DEVICES])
def test_it_writes_the_new_tokens_columns_alone(device, monkeypatch):
    force(monkeypatch, RING_ATTENTION, answer=device != "plain")
    given = draw(4, 2, 16, 3, [0, 17, 40], device="cpu" if device == "plain" else device, dtype=torch.float32)
    before, ring = copied(given)[4], given[4]
    ring_attention(*given, window=9, biased=True)
    columns, written = ring.k.shape[1], torch.zeros(ring.k.shape[:2], dtype=torch.bool)
    for slot, position in zip(ring.slot_B.tolist(), ring.position_B.tolist(), strict=True):
        written[slot, [p % columns for p in range(position, position + 3)]] = True
    for one, other in ((ring.k, before.k), (ring.v, before.v)):
        assert torch.equal((one != other).flatten(2).any(2).cpu(), written)
    assert not ring.k[written.to(ring.k.device)][..., -1].any()


@pytest.mark.parametrize("device", ["plain", *DEVICES])
def test_a_row_does_not_depend_on_others(device, monkeypatch):
    force(monkeypatch, RING_ATTENTION, answer=device != "plain")
    place = "cpu" if device == "plain" else device
    *new, rotary, ring, extra = draw(3, 1, 16, 2, [4, 50, 9, 30], slots=6, device=place, dtype=torch.float32)
    if device == "cuda":
        *new, rotary, ring, extra = to_dtype([*new, rotary, ring, extra], torch.bfloat16)
    whole = ring_attention(*copied([*new, rotary, ring, extra]), window=9, biased=True)
    rows = torch.tensor([2, 0], device=place)
    ring = dataclasses.replace(ring, slot_B=ring.slot_B[rows], position_B=ring.position_B[rows])
    extra = dataclasses.replace(extra, row_B=extra.row_B[rows], mask_BTC=extra.mask_BTC[rows])
    some = [*(each[rows] for each in new), tuple(each[rows] for each in rotary), ring, extra]
    found = ring_attention(*some, window=9, biased=True)
    if device == "plain":  # a product of other rows may round otherwise
        torch.testing.assert_close(found, whole[rows])
    else:
        assert torch.equal(found, whole[rows])


@pytest.mark.parametrize("device", ["plain", *DEVICES])
@pytest.mark.parametrize("slots", [0, 20])
def test_tokens_that_are_not_wanted_are_0(slots, device, monkeypatch):
    """Their keys and values are written all the same, and a row that has no other reads nothing."""
    force(monkeypatch, RING_ATTENTION, answer=device != "plain")
    place = "cpu" if device == "plain" else device
    given = draw(3, 1, 16, 4, [4, 50, 9], slots=slots, device=place, dtype=torch.float32)
    if device == "cuda":
        given = to_dtype(given, torch.bfloat16)
    plain = copied(given)
    expected = ring_attention(*plain, window=9, biased=True)
    wanted = torch.tensor([[True, False, True, False], [False] * 4, [True] * 4], device=place)
    *rest, ring, extra = copied(given, wanted_BT=wanted)
    slot, position = int(ring.slot_B[1]), int(ring.position_B[1])
    if device != "plain":
        ring.k[slot], ring.v[slot] = NAN, NAN
    rest[0][~wanted] = NAN
    found = ring_attention(*rest, ring, extra, window=9, biased=True)
    assert torch.equal(found, torch.where(wanted[..., None], expected, 0))
    columns = [p % ring.k.shape[1] for p in range(position, position + 4)]
    for one, other in ((ring.k, plain[4].k), (ring.v, plain[4].v)):
        assert torch.equal(one[slot, columns], other[slot, columns])
        others = torch.arange(len(one), device=place) != slot
        assert torch.equal(one[others], other[others])


def flat(given):
    *new, rotary, ring, extra = given
    return (*new, *rotary, *vars(ring).values(), *(vars(extra).values() if extra else [None] * 4))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("slots", [0, 3])
def test_the_operator_keeps_its_word_to_the_compiler(slots, device):
    given = draw(2, 1, 16, 2, [3, 20], slots=slots, device=device, dtype=torch.float32)
    for wanted in (None, torch.tensor([[True, False], [False, False]], device=device)):
        masked = copied(given, wanted_BT=wanted)
        torch.library.opcheck(module._ring_attention, (*flat(masked), 9, True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("slots", [0, 3])
def test_it_is_one_operation_that_counts_those_of_attention(slots, device, monkeypatch):
    given = draw(2, 1, 16, 2, [3, 20], slots=slots, device=device, dtype=torch.float32)
    counts = []
    for answer in (True, False):
        force(monkeypatch, RING_ATTENTION, answer)
        traced = make_fx(lambda: ring_attention(*given, window=9, biased=True))()
        calls = [node.target for node in traced.graph.nodes if node.op == "call_function"]
        assert (torch.ops.lepton.ring_attention.default in calls) == answer
        with FlopCounterMode(display=False) as counter:
            ring_attention(*given, window=9, biased=True)
        counts.append(counter.get_total_flops())
    one_more = 2 * 2 * 2 * 2 * 32  # the plain form also computes scores that the window hides
    assert counts[0] + one_more == counts[1]


def test_a_ring_must_have_room(monkeypatch):
    given = draw(2, 1, 16, 2, [3, 20], window=9)
    with pytest.raises(AssertionError, match="room"):
        ring_attention(*given, window=13, biased=True)
    with pytest.raises(AssertionError, match="room"):
        ring_attention(*copied(given, shifted=True), window=12, biased=True)
    asked = force(monkeypatch, RING_ATTENTION, answer=False)
    ring_attention(*given, window=12, biased=True)
    assert asked == [(torch.device("cpu"), torch.float64, 16)]


@pytest.mark.parametrize("device", GPU)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shifted", [False, True])
@pytest.mark.parametrize("tokens", [1, 5, 8])
@pytest.mark.parametrize("rows", [1, 3, 32, 300])
@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(12, 4, 64), (14, 2, 64), (12, 4, 128)])
def test_full_sizes(heads, kv_heads, head_dim, rows, tokens, shifted, dtype, device):
    positions = [(37 * row) % 600 for row in range(rows)]
    given = draw(
        heads, kv_heads, head_dim, tokens, positions, slots=72, window=256, device=device, dtype=dtype, shifted=shifted
    )
    compare(given, 1e-2, window=256, biased=True)


@pytest.mark.parametrize("device", GPU)
@pytest.mark.parametrize("rows", [1, 64])
def test_a_cuda_graph_replays_it(rows, device):
    given = draw(12, 4, 64, 5, [300 + row for row in range(rows)], slots=72, window=256, device=device)
    given = to_dtype(given, torch.bfloat16)
    ring_attention(*copied(given), window=256, biased=True)
    replay = copied(given)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ring_attention(*replay, window=256, biased=True)
    for each in (given, replay):
        each[4].position_B.fill_(7)
        each[0].mul_(-1)
    graph.replay()
    assert torch.equal(out, ring_attention(*given, window=256, biased=True))
    assert torch.equal(replay[4].k, given[4].k)
