"""The delta rule in kernels against its plain form in fp64, in reads, states and gradients.

The kernels run on a GPU, or on a CPU in Triton's interpreter, ``TRITON_INTERPRET=1 pytest``; when they are asked for
is tested everywhere.
"""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from lepton.model import delta_rule as module
from lepton.model.delta_rule import CHUNK, Writes, delta_rule, delta_rule_in_kernels, has_kernels
from lepton.model.memory import MemoryRun
from lepton.model.timeline import Timeline
from tests.laws.lab import EOS, build, text
from tests.model.test_cross_entropy_kernel import DEVICES, GPU_MARKS

TOLERANCE = 1e-5
GPU = [pytest.param("cuda", marks=GPU_MARKS)]
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


def plain(leaves, document):
    entry = F.pad(document[:, :-1, -1], (1, 0))
    reads, states = delta_rule(Writes(*leaves[:5], document), leaves[5], entry)
    return reads, torch.stack([leaves[5], *states[:-1]], 1), states[-1]


def in_kernels(leaves, document):
    return delta_rule_in_kernels(Writes(*leaves[:5], document), leaves[5], F.pad(document[:, :-1, -1], (1, 0)))


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
    found = in_kernels(leaves, document)
    slow = [leaf.detach().double().requires_grad_() for leaf in leaves]
    expected = plain(slow, document)
    assert_near(found, expected)
    assert all(part.dtype == torch.float32 for part in found)
    # Where great parts of a gradient cancel, the plain form in fp32 is off by more than the tolerance too.
    slopes = gradients(expected, slow, only_reads)
    usual = errors(gradients(plain(leaves, document), leaves, only_reads), slopes)
    for off, as_usual in zip(errors(gradients(found, leaves, only_reads), slopes), usual, strict=True):
        assert off <= max(TOLERANCE, 2 * as_usual)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_equal_the_plain_form(kind, device):
    compare(kind, device)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("keys", "values"), [(16, 16), (64, 128), (128, 64)])
def test_other_sizes_and_a_single_chunk(keys, values, device):
    compare("many documents", device, only_reads=True, rows=1, chunks=1, heads=1, keys=keys, values=values)


@pytest.mark.parametrize("device", DEVICES)
def test_blocks_of_many_rows(device, monkeypatch):
    """Blocks are wider where there are more rows; both are the same."""
    from lepton.model.kernels import delta_rule as kernels

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
def test_they_count_the_plain_forms_operations(to_state, device):
    leaves, document = example("one document", device, chunks=4)
    counts = []
    for form in (plain, in_kernels):
        leaves[5].requires_grad_(to_state)
        with FlopCounterMode(display=False) as counter:
            gradients(form(leaves, document), leaves if to_state else leaves[:5], only_reads=not to_state)
        counts.append(counter.get_total_flops())
    assert counts[0] == counts[1]


def remember(model, device, length):
    """Working memory over rows with several documents, with a past; and all that can be asked of it."""
    tokens = text(3, rows=3, length=length)
    tokens[1, length // 2] = tokens[2, 63] = EOS
    zero = torch.zeros(3, dtype=torch.long)
    memory = model.memory
    timeline = Timeline.read(tokens.to(device), zero.to(device), zero.to(device), eos_id=EOS, segment=4)
    states = torch.randn(3, length, model.config.width).to(device).requires_grad_()
    tail = torch.randn(3, 3, memory.channels).to(device).requires_grad_()
    state = torch.randn(3, memory.heads, memory.key_dim, memory.value_dim).to(device).requires_grad_()
    counts = torch.tensor([length, length - 1, length // 3], device=device)

    def run(forward, kernels):
        reads, strength, record = forward(states, tail, state, timeline, kernels)
        assert isinstance(record, MemoryRun)
        after = record.after(counts, timeline)
        whole = record.after(torch.full_like(counts, 64), timeline)
        outputs = [reads, *after, *whole]
        leaves = [states, tail, state, *(each for name, each in memory.named_parameters() if "out" not in name)]
        return [*outputs, strength], gradients(outputs, leaves)

    return run


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [64, 128, 150])
def test_working_memory_is_the_same_with_kernels(length, device):
    """Also the states that follow from its record, at a chunk's end, within a chunk, and at the end."""
    model = build("complete", dtype=torch.float32, key_dim=16, value_dim=32).to(device)
    run = remember(model, device, length)
    expected, expected_gradients = run(model.memory.forward, False)
    found, found_gradients = run(model.memory.forward, True)
    assert_near(found, expected)
    assert_near(found_gradients, expected_gradients, 1e-4)  # both are fp32


@pytest.mark.parametrize("device", DEVICES)
def test_a_graph_of_working_memory_holds_the_operators(device):
    model = build("complete", dtype=torch.float32, key_dim=16, value_dim=32).to(device)
    run = remember(model, device, 150)
    compiled = torch.compile(model.memory.forward, fullgraph=True, dynamic=False, backend="aot_eager")
    expected, found = run(model.memory.forward, True), run(compiled, True)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", GPU)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_it_is_the_same(device):
    model = build("complete", dtype=torch.float32, key_dim=64, value_dim=128).to(device)
    run = remember(model, device, 150)
    compiled = torch.compile(model.memory.forward, fullgraph=True, dynamic=False)
    torch.testing.assert_close(run(compiled, True), run(model.memory.forward, True), rtol=1e-3, atol=1e-4)


@pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream")  # it warms up on a stream of its own
@pytest.mark.parametrize("device", GPU)
def test_a_cuda_graph_replays_it(device):
    leaves, document = example("many documents", device, rows=4, chunks=8, heads=4, keys=64, values=128)
    assert has_kernels(leaves[5], 512)

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


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_with_the_kernels_equals_one_without(device, monkeypatch):
    """Loss and all gradients."""
    model = build("complete", dtype=torch.float32, key_dim=16, value_dim=32).to(device)
    tokens, think = text(3, rows=2, length=151).to(device), torch.tensor([1, 2], device=device)
    found, asked = [], []
    for kernels in (False, True):
        monkeypatch.setattr("lepton.model.lepton.has_kernels", lambda *_, answer=kernels: asked.append(1) or answer)
        loss = model.loss(tokens, think=think).loss
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)])
    assert len(asked) == 2
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("device", GPU)
@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_trial_succeeds_whoever_asks_first(mode, device):
    with mode():
        assert module._built.__wrapped__(torch.device(device), 64, 128)


# From here on, the kernels are not needed: when they are asked for.


def claims_cuda(shape, dtype=torch.float32):
    class Claims(torch.Tensor):
        is_cuda = True

    return torch.empty(shape, dtype=dtype).as_subclass(Claims)


def test_only_whole_chunks_of_fp32_on_a_gpu_ask_for_them(monkeypatch):
    asked = []
    monkeypatch.setattr(module, "_built", lambda *given: asked.append(given[1:]) or True)
    monkeypatch.setattr(module, "HAS_TRITON", True)
    assert has_kernels(claims_cuda((1, 1, 64, 128)), CHUNK)
    assert not has_kernels(claims_cuda((1, 1, 64, 128)), CHUNK - 1)
    assert not has_kernels(claims_cuda((1, 1, 64, 128), torch.float64), CHUNK)
    assert not has_kernels(claims_cuda((1, 1, 8, 128)), CHUNK)
    assert not has_kernels(claims_cuda((1, 1, 64, 96)), CHUNK)
    assert not has_kernels(torch.empty(1, 1, 64, 128), CHUNK)
    assert not has_kernels(None, CHUNK)
    monkeypatch.setattr(module, "HAS_TRITON", False)
    assert not has_kernels(claims_cuda((1, 1, 64, 128)), CHUNK)
    assert asked == [(64, 128)]


def test_kernels_that_cannot_be_built_are_done_without(monkeypatch):
    def fail(*_):
        raise RuntimeError("no compiler")

    monkeypatch.setattr(module, "delta_rule_in_kernels", fail)
    with pytest.warns(UserWarning, match=r"the memory runs slower: Triton cannot build its kernels here \(no comp"):
        assert not module._built.__wrapped__(torch.device("cpu"), 16, 16)
