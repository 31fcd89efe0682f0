"""The cross-entropy kernel against the naive form, in value and gradients.

The kernel runs on a GPU, or on a CPU in Triton's interpreter, ``TRITON_INTERPRET=1 pytest``; how it is called is tested
everywhere.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lepton.ops import cross_entropy as module
from lepton.ops.cross_entropy import CROSS_ENTROPY, IGNORE, linear_cross_entropy, naive_linear_cross_entropy
from tests.ops.devices import DEVICES, GPU, force


@pytest.fixture
def _forced(monkeypatch):
    """The kernel for all that is asked, on any device and in fp32 too, which shows errors that half precision hides."""
    force(monkeypatch, CROSS_ENTROPY)


def data(device, dtype, rows, columns, real, ignored=True):
    """Logits far enough out for the cap to bend them, some targets to ignore, the first and the last real column."""
    x = (2 * torch.randn(rows, 16)).to(device, dtype).requires_grad_()
    weight = torch.randn(columns, 16).to(device, dtype).requires_grad_()
    target = torch.randint(0, real, (rows,))
    target[1], target[2] = 0, real - 1
    if ignored:
        target[::4] = IGNORE
    return x, weight, target.to(device)


def check(x, weight, target, tolerance, **options):
    """Value, parts and both gradients, each within `tolerance` of its size."""
    slow = [tensor.detach().double().requires_grad_() for tensor in (x, weight)]
    expected = naive_linear_cross_entropy(*slow, target, **options)
    expected_grads = torch.autograd.grad(3 * expected[0], slow)
    got = linear_cross_entropy(x, weight, target, **options)
    got_grads = torch.autograd.grad(3 * got[0], (x, weight))
    with torch.no_grad():
        plain = linear_cross_entropy(x, weight, target, **options)
    torch.testing.assert_close(plain, tuple(part.detach() for part in got))
    for one, other in zip((*got, *got_grads), (*expected, *expected_grads), strict=True):
        assert (one.double() - other).norm() <= tolerance * other.norm()
    assert not got_grads[1][options["vocab_size"] :].any()
    assert not got_grads[0][target == IGNORE].any()


@pytest.mark.usefixtures("_forced")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("z_weight", [0.0, 0.1])
@pytest.mark.parametrize(("columns", "real"), [(128, 97), (64, 64), (201, 150)])
def test_equal_to_the_reference_in_fp32(device, columns, real, z_weight, monkeypatch):
    """In several passes, the last one shorter, and several blocks of a row, the last one cut off."""
    from lepton.ops.triton import cross_entropy

    monkeypatch.setattr(cross_entropy, "BLOCK", 64)
    monkeypatch.setattr(module, "CHUNK_CPU", 16)
    monkeypatch.setattr(module, "ENTRIES_GPU", 128 * columns)
    x, weight, target = data(device, torch.float32, 37 if device == "cpu" else 300, columns, real)
    check(x, weight, target, 1e-5, vocab_size=real, cap=15.0, z_weight=z_weight)


@pytest.mark.usefixtures("_forced")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("z_weight", [0.0, 0.1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_near_the_reference_in_half_precision(device, dtype, z_weight):
    """bf16 rounds to one part in 256, logits and gradients alike; the errors of many add up to less than one's."""
    x, weight, target = data(device, dtype, 64, 5008, 4999)
    check(x, weight, target, 1e-2, vocab_size=4999, cap=15.0, z_weight=z_weight)


@pytest.mark.parametrize("device", GPU)
@pytest.mark.parametrize(("rows", "columns", "real"), [(700, 50_304, 50_257), (9000, 4096, 4096)])
def test_near_the_reference_at_the_sizes_of_training(device, rows, columns, real):
    x, weight, target = data(device, torch.bfloat16, rows, columns, real)
    check(x, weight, target, 1e-2, vocab_size=real, cap=15.0, z_weight=1e-4)


@pytest.mark.parametrize("device", GPU)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("accumulates", [True, False])
def test_passes_add_up_in_half_precision(device, dtype, accumulates, monkeypatch):
    """Each product added to the head's gradient as it is computed, or where that cannot be, after."""
    monkeypatch.setattr(module, "ENTRIES_GPU", 256 * 1024)
    x, weight, target = data(device, dtype, 1000, 1024, 1000)
    assert module._accumulates(x.device, dtype)
    if not accumulates:
        monkeypatch.setattr(module, "_accumulates", lambda device, dtype: False)
    check(x, weight.detach().float().requires_grad_(), target, 1e-2, vocab_size=1000, cap=15.0, z_weight=0.1)


@pytest.mark.usefixtures("_forced")
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [0, 4])
def test_nothing_to_predict_is_zero_and_finite(device, rows):
    x = torch.randn(rows, 8, device=device, requires_grad=True)
    weight = torch.randn(128, 8, device=device, requires_grad=True)
    target = torch.full((rows,), IGNORE, device=device)
    got = linear_cross_entropy(x, weight, target, vocab_size=97, cap=15.0)
    got[0].backward()
    assert not any(part.any() for part in got)
    assert not x.grad.any()
    assert not weight.grad.any()


@pytest.mark.usefixtures("_forced")
@pytest.mark.filterwarnings("ignore:overflow encountered in exp")  # an infinity is meant to come and go
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_extremes_of_the_cap_stay_finite(device, dtype):
    x, weight, target = data(device, dtype, 8, 128, 128)
    loss, *_ = linear_cross_entropy(1e4 * x, weight, target, vocab_size=128, cap=50.0)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(x.grad).all()
    assert torch.isfinite(weight.grad).all()


@pytest.mark.usefixtures("_forced")
@pytest.mark.parametrize("device", DEVICES)
def test_what_is_no_number_shows(device):
    x, weight, target = data(device, torch.float32, 5, 128, 97)
    with torch.no_grad():
        weight[50] = torch.nan
    loss, *_ = linear_cross_entropy(x, weight, target, vocab_size=97, cap=15.0)
    loss.backward()
    assert loss.isnan()
    assert x.grad[1].isnan().any()


@pytest.mark.usefixtures("_forced")
@pytest.mark.parametrize("device", DEVICES)
def test_targets_may_be_a_column_of_a_table(device):
    x, weight, target = data(device, torch.float32, 12, 128, 97)
    table = torch.stack([torch.zeros_like(target), target], -1)
    check(x, weight, table[:, 1], 1e-5, vocab_size=97, cap=15.0, z_weight=0.1)


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # it warms up on a stream of its own
@pytest.mark.parametrize("device", GPU)
def test_a_cuda_graph_replays_it(device):
    """With other targets to ignore than those it was captured with: their number is never known on the host."""
    x, weight, target = data(device, torch.bfloat16, 300, 512, 500)

    def step():
        loss, ce, z, _ = linear_cross_entropy(x, weight, target, vocab_size=500, cap=15.0)
        return loss, ce, z, *torch.autograd.grad(loss, (x, weight))

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
        target[100:] = IGNORE
    graph.replay()
    torch.testing.assert_close(replayed, step())


@pytest.mark.parametrize("device", GPU)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_it_is_the_same(device):
    x, weight, target = data(device, torch.bfloat16, 300, 512, 500)
    both = []
    for function in (linear_cross_entropy, torch.compile(linear_cross_entropy, fullgraph=True, dynamic=False)):
        loss, ce, z, _ = function(x, weight, target, vocab_size=500, cap=15.0)
        both.append((loss, ce, z, *torch.autograd.grad(loss, (x, weight))))
    torch.testing.assert_close(*both)


# From here on, the kernel is not needed: how it is called.


@pytest.mark.usefixtures("_forced")
@pytest.mark.parametrize("gradients", [0, 1, 2])
def test_the_operator_keeps_its_word_to_the_compiler(gradients, monkeypatch):
    monkeypatch.setattr(module, "_kernel_chunk", lambda: module.plain_chunk)
    x, weight, target = data("cpu", torch.float32, 5, 128, 97)
    given = (x.detach(), weight.detach(), target, torch.tensor(3), 97, 15.0, 0.1, gradients)
    torch.library.opcheck(module._in_kernel_chunks, given)


@pytest.mark.usefixtures("_forced")
def test_a_graph_of_the_whole_loss_holds_the_operator(monkeypatch):
    monkeypatch.setattr(module, "_kernel_chunk", lambda: module.plain_chunk)
    x, weight, target = data("cpu", torch.float32, 300, 128, 97)
    both = []
    compiled = torch.compile(linear_cross_entropy, fullgraph=True, dynamic=False, backend="aot_eager")
    for function in (linear_cross_entropy, compiled):
        loss, ce, z, _ = function(x, weight, target, vocab_size=97, cap=15.0)
        both.append((loss, ce, z, *torch.autograd.grad(loss, (x, weight))))
    torch.testing.assert_close(*both)


@pytest.mark.usefixtures("_forced")
@pytest.mark.parametrize("rows", [0, 12, 40])
def test_the_first_product_starts_the_sum(rows, monkeypatch):
    """As on a GPU, but for the product, which a CPU cannot add in half precision."""

    def accumulate(total, one, other, *, fresh):
        total.addmm_(one, other, beta=0 if fresh else 1)

    monkeypatch.setattr(module, "_kernel_chunk", lambda: module.plain_chunk)
    monkeypatch.setattr(module, "_accumulates", lambda device, dtype: True)
    monkeypatch.setattr(module, "_accumulate", accumulate)
    monkeypatch.setattr(module, "CHUNK_CPU", 16)
    x, weight = torch.randn(rows, 16, requires_grad=True), torch.randn(128, 16, requires_grad=True)
    target = torch.randint(0, 97, (rows,))
    if rows:
        check(x, weight, target, 1e-5, vocab_size=97, cap=15.0, z_weight=0.1)
    else:
        linear_cross_entropy(x, weight, target, vocab_size=97, cap=15.0)[0].backward()
        assert not weight.grad.any()


def test_where_a_product_cannot_add_itself_it_is_added():
    assert not module._accumulates(torch.device("cpu"), torch.bfloat16)


@pytest.mark.usefixtures("_forced")
@pytest.mark.parametrize(("frozen", "products"), [(False, 3), (True, 2)])
def test_its_products_are_counted(frozen, products, monkeypatch):
    monkeypatch.setattr(module, "_kernel_chunk", lambda: module.plain_chunk)
    x, weight, target = data("cpu", torch.float32, 12, 128, 97)
    with FlopCounterMode(display=False) as counter:
        linear_cross_entropy(x, weight.detach() if frozen else weight, target, vocab_size=97, cap=15.0)[0].backward()
    assert counter.get_total_flops() == products * 2 * x.numel() * 128


@pytest.mark.parametrize("rows", [0, 1, 128, 5_000, 16_384, 100_000])
@pytest.mark.parametrize("columns", [1, 4096, 50_304, 10**7])
def test_passes_on_a_gpu_are_even_and_bounded(rows, columns):
    size = module.chunk_size(torch.empty(rows, 1, device="meta"), columns)
    assert size % module.MULTIPLE_GPU == 0
    assert size * columns <= module.ENTRIES_GPU or size == module.MULTIPLE_GPU
    passes = -(-rows // size)
    assert passes * size - rows < module.MULTIPLE_GPU * max(1, passes) or rows == 0
