"""The delta rule in kernels against the chunked form in fp64, in reads, states and gradients.

The kernels run on a GPU, or on a CPU in Triton's interpreter, ``TRITON_INTERPRET=1 pytest``; when they are asked for
is tested everywhere.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from lepton.ops import delta_rule as module
from lepton.ops.delta_rule import CHUNK, DELTA_RULE, Writes, chunked_delta_rule, delta_rule, delta_rule_in_kernels
from tests.ops.devices import DEVICES, GPU, force

TOLERANCE = 1e-5
KINDS = ["one document", "many documents", "documents of a chunk", "repeated", "repeated documents"]


def example(kind, device, rows=2, chunks=3, heads=2, keys=16, values=32):
    """Leaves that need gradients, and documents; the first may be the one that the state on entry is of."""

    def draw(*shape):
        return torch.randn(rows, chunks, heads, CHUNK, *shape)

    q, k, v = F.normalize(draw(keys), dim=-1), F.normalize(draw(keys), dim=-1), draw(values)
    log_decay, rate = F.logsigmoid(draw() + 2), draw().sigmoid()
    if kind.startswith("repeated"):
        k, v = k[:, :1, :, :1].expand_as(k), v[:, :1, :, :1].expand_as(v)
        log_decay, rate = torch.full_like(log_decay, -1e-3), torch.full_like(rate, 0.999)
    chance = {"many documents": 0.05, "repeated documents": 0.02}.get(kind, 0)
    document = (torch.rand(rows, chunks * CHUNK) < chance).long().cumsum(1)
    if kind == "documents of a chunk":
        document = torch.arange(chunks * CHUNK).expand(rows, -1) // CHUNK
    state = torch.randn(rows, heads, keys, values)
    leaves = [part.to(device).requires_grad_() for part in (q, k, v, log_decay, rate, state)]
    return leaves, document.view(rows, chunks, CHUNK).to(device)


def run(form, leaves, document):
    return form(Writes(*leaves[:5], document), leaves[5], F.pad(document[:, :-1, -1], (1, 0)))


def gradients(outputs, leaves, only_reads=False):
    total = 0.0
    for seed, output in enumerate(outputs[:1] if only_reads else outputs):
        generator = torch.Generator().manual_seed(seed)
        total = total + (output * torch.randn(output.shape, generator=generator).to(output)).sum()
    return torch.autograd.grad(total, leaves)


def assert_near(found, expected, tolerance=TOLERANCE):
    """Each within `tolerance` of its size."""
    for one, other, off in zip(found, expected, errors(found, expected), strict=True):
        assert one.shape == other.shape
        assert off <= tolerance


def errors(found, expected):
    """How far each is off, relative to its size."""
    return [((a.double() - b).norm() / b.norm().clamp(min=1e-30)).item() for a, b in zip(found, expected, strict=True)]


def compare(kind, device, only_reads=False, **shape):
    leaves, document = example(kind, device, **shape)
    found = run(delta_rule_in_kernels, leaves, document)
    slow = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = run(chunked_delta_rule, slow, document)
    assert_near(found, expected)
    assert all(part.dtype == torch.float32 for part in found)
    # Where great parts of a gradient cancel, the chunked form in fp32 is off by more than the tolerance too.
    grads = gradients(expected, slow, only_reads)
    usual = errors(gradients(run(chunked_delta_rule, leaves, document), leaves, only_reads), grads)
    for off, as_usual in zip(errors(gradients(found, leaves, only_reads), grads), usual, strict=True):
        assert off <= max(TOLERANCE, 2 * as_usual)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_equal_the_chunked_form(kind, device):
    compare(kind, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("keys", "values"), [(16, 16), (64, 128), (128, 64)])
def test_other_sizes_and_a_single_chunk(keys, values, device):
    compare("many documents", device, only_reads=True, rows=1, chunks=1, heads=1, keys=keys, values=values)


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_of_many_rows(device, monkeypatch):
    """Blocks are wider where there are more rows; both are the same."""
    from lepton.ops.triton import delta_rule as kernels

    monkeypatch.setattr(kernels, "ENOUGH", 2)
    compare("many documents", device, values=64)


@pytest.mark.parametrize("device", GPU)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [4, 64])
def test_kernels_at_full_size(rows, kind, device):
    compare(kind, device, rows=rows, chunks=8, heads=4, keys=64, values=128)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", ["random", "equal"])
def test_the_solve_is_one(kind, device):
    """What lies on and above the diagonal is not read, and gets no gradient."""
    mix = torch.rand(3, CHUNK, CHUNK) / 4 if kind == "random" else torch.full((3, CHUNK, CHUNK), 0.999)
    mix, given = mix.to(device).requires_grad_(), torch.randn(3, CHUNK, 48).to(device).requires_grad_()
    solved, inverse = module._solve(mix, given)
    slow = [part.detach().double().requires_grad_() for part in (mix, given)]
    matrix = slow[0].tril(-1) + torch.eye(CHUNK, dtype=torch.float64, device=device)
    expected = torch.linalg.solve_triangular(matrix, slow[1], upper=False, unitriangular=True)
    assert_near([solved, inverse], [expected, torch.linalg.inv(matrix)])
    found = gradients([solved], [mix, given])
    assert_near(found, gradients([expected], slow))
    assert not found[0].triu().any()


@pytest.mark.parametrize("device", DEVICES)
def test_the_operators_keep_their_word_to_the_compiler(device):
    (_, k, v, _, rate, state), _ = example("one document", device, rows=1, chunks=2, heads=1)
    mix = 0.1 * torch.randn(1, 2, 1, CHUNK, CHUNK, device=device)
    torch.library.opcheck(module._solve, (mix.requires_grad_(), v))
    torch.library.opcheck(module._solve_transposed, (mix.detach(), v.detach()))
    solved, decay = torch.cat([v, k], -1).detach().requires_grad_(), rate[..., -1].detach().requires_grad_()
    torch.library.opcheck(module._carry, (solved, k, decay, state))
    kept = [part.detach() for part in (solved, k, decay, *module._carry(solved, k, decay, state))]
    given = (kept[3], kept[4], kept[5], kept[0], kept[1], kept[2], kept[3], kept[4], 2)
    torch.library.opcheck(module._carry_backward, given)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("to_state", [True, False])
def test_they_count_the_chunked_forms_operations(to_state, device):
    leaves, document = example("one document", device, chunks=4)
    counts = []
    for form in (chunked_delta_rule, delta_rule_in_kernels):
        leaves[5].requires_grad_(to_state)
        with FlopCounterMode(display=False) as counter:
            gradients(run(form, leaves, document), leaves if to_state else leaves[:5], only_reads=not to_state)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # it warms up on a stream of its own
@pytest.mark.parametrize("device", GPU)
def test_a_cuda_graph_replays_it(device):
    leaves, document = example("many documents", device, rows=4, chunks=8, heads=4, keys=64, values=128)
    assert DELTA_RULE.works(leaves[5].device, torch.float32, 64, 128)

    def step():
        outputs = delta_rule_in_kernels(Writes(*leaves[:5], document), leaves[5], document[:, :, 0])
        return *outputs, *torch.autograd.grad(outputs[0].square().sum(), leaves)

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = step()
    with torch.no_grad():
        leaves[2].copy_(torch.randn_like(leaves[2]))
        document[:, 4:] += 1
    graph.replay()
    torch.testing.assert_close(replayed, step())


@pytest.mark.parametrize(("size", "asks"), [(CHUNK, 1), (CHUNK - 1, 0)])
def test_only_whole_chunks_ask_for_them(size, asks, monkeypatch):
    """Here the answer is no."""
    asked = force(monkeypatch, DELTA_RULE, answer=False)
    k, gate = torch.randn(1, 1, 1, size, 16), torch.zeros(1, 1, 1, size)
    document = torch.zeros(1, 1, size, dtype=torch.int64)
    delta_rule(Writes(k, k, k, gate, gate, document), torch.zeros(1, 1, 16, 16), document[:, :, 0])
    assert asked == [(torch.device("cpu"), torch.float32, 16, 16)] * asks
