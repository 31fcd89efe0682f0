"""The delta rule for a few tokens: the plain form against the naive rule, the kernels against the plain form.

The kernels run on a GPU, or on a CPU in Triton's interpreter, ``TRITON_INTERPRET=1 pytest``.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.flop_counter import FlopCounterMode

from lepton.ops import few_writes as module
from lepton.ops.delta_rule import Writes, naive_delta_rule
from lepton.ops.few_writes import FEW, FEW_WRITES, FewWrites, read_few, write_few
from tests.ops.devices import DEVICES, GPU, force

LENGTHS = range(1, FEW + 1)
KINDS = ["random", "the same again", "forgetful"]


def draw(kind, rows, length, heads=2, keys=16, values=32, dtype=torch.float32, device="cpu"):
    """Writes and a state. Queries, keys and values are parts of wider tensors, as in the model."""
    parts = torch.randn(rows, length, heads, 2 * keys + values, dtype=dtype)
    log_decay = F.logsigmoid(torch.randn(rows, length, heads, dtype=dtype) + 2)
    rate = torch.rand(rows, length, heads, dtype=dtype)
    if kind == "the same again":
        parts, log_decay, rate = parts[:, :1].expand_as(parts), log_decay * 1e-3, torch.full_like(rate, 0.999)
    if kind == "forgetful":  # two such tokens are more than fp32 can invert
        log_decay = log_decay * 500
    qk, v_BTNU = parts.to(device).split([2 * keys, values], 3)
    qk = F.normalize(qk.unflatten(3, (2, keys)), dim=4)
    state = torch.randn(rows, heads, keys, values, dtype=dtype)
    return FewWrites(qk, v_BTNU, log_decay.to(device), rate.to(device)), state.to(device)


def naive(writes, state, length):
    """Reads of the first tokens, and the state after them."""
    if not length:
        return writes.v_BTNU[:, :0], state
    qk, v, log_decay, rate = (each[:, None, :length].transpose(2, 3) for each in writes)
    document = torch.zeros(len(state), 1, length, dtype=torch.int64, device=state.device)
    given = Writes(qk[..., 0, :], qk[..., 1, :], v, log_decay, rate, document)
    reads, _, after, _ = naive_delta_rule(given, state, document[:, :, 0])
    return reads[:, 0].transpose(1, 2), after


def compare(writes, state, tolerance):
    """Reads, and the state after each number of tokens, with another number in each row."""
    length, rows = writes.v_BTNU.shape[1], len(state)
    before, (double, double_state) = state.clone(), (FewWrites(*(each.double() for each in writes)), state.double())
    reads, added = read_few(writes, state)
    torch.testing.assert_close(reads.double(), naive(double, double_state, length)[0], rtol=0, atol=tolerance)
    for first in range(length + 1):
        count_B = (first + torch.arange(rows, device=state.device)) % (length + 1)
        after = write_few(writes, added, state, count_B)
        assert after.dtype == reads.dtype == state.dtype
        for row, count in enumerate(count_B.tolist()):
            expected = naive(double, double_state, count)[1][row]
            torch.testing.assert_close(after[row].double(), expected, rtol=0, atol=tolerance)
            assert count or torch.equal(after[row], state[row])
    assert torch.equal(state, before)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 3e-5)])
@pytest.mark.parametrize("length", LENGTHS)
def test_the_plain_form_equals_the_naive_rule(length, dtype, tolerance, kind):
    compare(*draw(kind, 3, length, dtype=dtype, keys=8, values=6), tolerance)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("length", [1, 2, 5, FEW])
def test_the_kernels_equal_the_naive_rule(length, kind, device, monkeypatch):
    asked = force(monkeypatch, FEW_WRITES)
    compare(*draw(kind, 2, length, device=device), 1e-5)
    assert asked


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("keys", "values"), [(16, 16), (32, 64), (64, 128), (128, 32)])
def test_kernels_of_every_width(keys, values, device, monkeypatch):
    force(monkeypatch, FEW_WRITES)
    compare(*draw("random", 1, 3, heads=1, keys=keys, values=values, device=device), 1e-5)


@pytest.mark.parametrize("device", DEVICES)
def test_kernels_take_any_layout(device, monkeypatch):
    """The same numbers, dense, in the model's layout, and with tokens or widths where they are not expected."""
    force(monkeypatch, FEW_WRITES)
    writes, state = draw("random", 2, 3, device=device)
    dense = FewWrites(*(each.contiguous() for each in writes))
    turned = FewWrites(*(each.transpose(1, -1).contiguous().transpose(1, -1) for each in writes))
    count_B = torch.tensor([2, 3], device=device)
    expected = read_few(dense, state)
    for given in (writes, turned):
        found = read_few(given, state.mT.contiguous().mT)
        assert all(torch.equal(*pair) for pair in zip(found, expected, strict=True))
        after = write_few(given, found[1], state, count_B)
        assert torch.equal(after, write_few(dense, expected[1], state, count_B))


@pytest.mark.parametrize("device", DEVICES)
def test_a_row_does_not_depend_on_others(device, monkeypatch):
    """Nor on tokens that are dropped, whatever they are."""
    force(monkeypatch, FEW_WRITES)
    writes, state = draw("random", 3, 4, device=device)
    count_B = torch.tensor([1, 2, 3], device=device)
    reads, added = read_few(writes, state)
    after = write_few(writes, added, state, count_B)
    alone = FewWrites(*(each[1:2] for each in writes))
    own_reads, own_added = read_few(alone, state[1:2])
    assert torch.equal(own_reads, reads[1:2])
    assert torch.equal(write_few(alone, own_added, state[1:2], count_B[1:2]), after[1:2])
    for each in (*writes, added):
        each[:, 3:] = float("nan")
    assert torch.equal(write_few(writes, added, state, count_B), after)


def traced(device):
    """A graph of reading and writing, after a check that it computes the same for other inputs."""
    writes, state = draw("random", 2, 5, device=device)

    def both(state, count_B):
        reads, added = read_few(writes, state)
        return reads, write_few(writes, added, state, count_B)

    graph = make_fx(both)(state, torch.tensor([5, 2], device=device))
    other = state + 1, torch.tensor([0, 3], device=device)
    torch.testing.assert_close(graph(*other), both(*other))
    return [str(node.target) for node in graph.graph.nodes if node.op == "call_function"]


@pytest.mark.parametrize("device", DEVICES)
def test_each_is_one_operator_of_a_graph(device, monkeypatch):
    force(monkeypatch, FEW_WRITES)
    assert {"lepton.read_few.default", "lepton.write_few.default"} <= set(traced(device))


def test_the_plain_form_is_a_graph_too():
    """That nothing in it depends on the values of tensors."""
    assert "aten.bmm.default" in traced("cpu")


@pytest.mark.parametrize("device", DEVICES)
def test_the_operators_keep_their_word_to_the_compiler(device):
    writes, state = draw("random", 2, 3, device=device)
    torch.library.opcheck(module._read_few, (*writes, state))
    _, added = module._read_few(*writes, state)
    count_B = torch.tensor([1, 3], device=device)
    torch.library.opcheck(module._write_few, (writes.qk_BTN2H, added, writes.log_decay_BTN, state, count_B))


@pytest.mark.parametrize("device", DEVICES)
def test_a_token_counts_three_products_and_its_replay_one(device, monkeypatch):
    force(monkeypatch, FEW_WRITES)
    writes, state = draw("random", 2, 3, device=device)
    with FlopCounterMode(display=False) as counter:
        _, added = read_few(writes, state)
        write_few(writes, added, state, torch.tensor([1, 3], device=device))
    assert counter.get_total_flops() == 4 * 2 * writes.v_BTNU.numel() * 16


def test_a_cpu_computes_the_plain_form(monkeypatch):
    asked = force(monkeypatch, FEW_WRITES, answer=False)
    writes, state = draw("random", 2, 3)
    _, added = read_few(writes, state)
    write_few(writes, added, state, torch.tensor([1, 3]))
    assert asked == 2 * [(torch.device("cpu"), torch.float32, 16, 32)]


@pytest.mark.parametrize("device", GPU)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 9, 64])
@pytest.mark.parametrize("length", [1, 5])
def test_full_sizes(length, rows, kind, device):
    for heads, keys, values in ((2, 32, 64), (8, 64, 128)):
        assert FEW_WRITES.works(torch.device(device), torch.float32, keys, values)
        compare(*draw(kind, rows, length, heads, keys, values, device=device), 3e-5)


@pytest.mark.parametrize("device", GPU)
def test_a_cuda_graph_replays_it(device):
    writes, state = draw("random", 4, 5, 4, 64, 128, device=device)
    count_B = torch.tensor([5, 0, 2, 1], device=device)

    def step():
        reads, added = read_few(writes, state)
        return reads, write_few(writes, added, state, count_B)

    step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    state.copy_(torch.randn_like(state))
    count_B.copy_(count_B.flip(0))
    graph.replay()
    assert all(torch.equal(*pair) for pair in zip(replayed, step(), strict=True))
