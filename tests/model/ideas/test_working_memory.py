"""Working memory: on constant text, beyond every window, for a few tokens, and with the kernels."""

import pytest
import torch

from lepton.errors import InputError
from lepton.model.ideas import working_memory as module
from lepton.model.ideas.working_memory import FewUpdate, MemoryUpdate
from lepton.model.parameters import replaced
from lepton.model.timeline import Timeline
from lepton.ops.delta_rule import DELTA_RULE
from lepton.ops.few_writes import FEW, FEW_WRITES
from tests.laws.lab import EOS, build, text
from tests.ops.devices import DEVICES, GPU, force
from tests.ops.test_delta_rule_kernel import assert_near, gradients


@torch.no_grad()
def test_constant_text_keeps_the_model_finite_for_long():
    model = build("complete", dtype=torch.float32)
    state, tokens = None, torch.full((1, 500), 5)
    for _ in range(6):
        out = model(tokens, state)
        state = out.state
        assert out.logits.isfinite().all()
    assert state.part("memory").matrix_BNHU.abs().max() < 1e3


def reach(model, tokens: torch.Tensor) -> list[int]:
    """Tokens whose embeddings the last position's logits depend on."""
    embedded = []
    hook = model.embed.register_forward_hook(lambda _module, _inputs, output: embedded.append(output))
    logits = model(tokens).logits[0, -1]
    hook.remove()
    (gradient,) = torch.autograd.grad(logits.square().sum(), embedded[0])
    return gradient[0].abs().sum(-1).nonzero()[:, 0].tolist()


def test_the_memory_reaches_beyond_every_window():
    """With windows of 8, 8, 8 and 20 a token is out of sight after 44; only memory and crystals carry it on."""
    tokens = text(1, rows=1, documents=False)
    assert min(reach(build("complete"), tokens)) == 0
    assert min(reach(build("no crystals"), tokens)) == 0
    assert min(reach(build("no working memory", slots=60), tokens)) < 8
    assert min(reach(build("complete", memory_heads=0, slots=0), tokens)) > 100 - 4 * 8 - 20


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

    def run(forward):
        reads, strength, record, seen = forward(states, tail, state, timeline)
        assert isinstance(record, MemoryUpdate)
        asked = memory.again["1"](states, seen)
        after = record.after(counts, timeline)
        whole = record.after(torch.full_like(counts, 64), timeline)
        outputs = [reads, asked, after.tail_BRI, after.matrix_BNHU, whole.tail_BRI, whole.matrix_BNHU]
        leaves = [states, tail, state, *(each for name, each in memory.named_parameters() if "out" not in name)]
        return [*outputs, strength], gradients(outputs, leaves)

    return run


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [64, 128, 150])
def test_working_memory_is_the_same_with_kernels(length, device, monkeypatch):
    """Also the states that follow from its record, at a chunk's end, within a chunk, and at the end."""
    model = build("complete", dtype=torch.float32, key_dim=16, value_dim=32, **{"memory.reads": 2}).to(device)
    run = remember(model, device, length)
    expected, expected_gradients = run(model.memory.forward)
    force(monkeypatch, DELTA_RULE)
    found, found_gradients = run(model.memory.forward)
    assert_near(found, expected)
    assert_near(found_gradients, expected_gradients, 1e-4)  # both are fp32


@pytest.mark.parametrize("device", DEVICES)
def test_a_graph_of_working_memory_holds_the_operators(device, monkeypatch):
    model = build("complete", dtype=torch.float32, key_dim=16, value_dim=32, **{"memory.reads": 2}).to(device)
    run = remember(model, device, 150)
    compiled = torch.compile(model.memory.forward, fullgraph=True, dynamic=False, backend="aot_eager")
    force(monkeypatch, DELTA_RULE)
    expected, found = run(model.memory.forward), run(compiled)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("device", GPU)
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiled_it_is_the_same(device):
    model = build("complete", dtype=torch.float32, key_dim=64, value_dim=128).to(device)
    run = remember(model, device, 150)
    compiled = torch.compile(model.memory.forward, fullgraph=True, dynamic=False)
    torch.testing.assert_close(run(compiled), run(model.memory.forward), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("device", DEVICES)
def test_a_model_with_the_kernels_equals_one_without(device, monkeypatch):
    """Loss and all gradients."""
    model = build("complete", dtype=torch.float32, key_dim=16, value_dim=32).to(device)
    tokens, think = text(3, rows=2, length=151).to(device), torch.tensor([1, 2], device=device)
    found = []
    for answer in (False, True):
        asked = force(monkeypatch, DELTA_RULE, answer)
        loss = model.loss(tokens, think=think).loss
        found.append([loss, *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)])
        assert len(asked) == 1
    torch.testing.assert_close(*found, rtol=1e-3, atol=1e-5)


def few(model, length, device="cpu"):
    """Inputs of a few tokens of one document each, whose first is at position 0, 2 or 9."""
    memory, dtype = model.memory, model.dtype
    start_B = torch.tensor([0, 2, 9])
    tail = torch.randn(3, 3, memory.channels, dtype=dtype)
    tail[torch.arange(3) < 3 - start_B[:, None]] = 0  # what lies before the document
    state = torch.randn(3, memory.heads, memory.key_dim, memory.value_dim, dtype=dtype)
    u = torch.randn(3, length, model.config.width, dtype=dtype)
    timeline = Timeline.within_document(start_B.to(device), start_B.to(device), length, segment=99, opening=False)
    return u.to(device), tail.to(device), state.to(device), timeline


def outcome(model, inputs):
    """Reads, what deep blocks read, strengths, and the states after all numbers of tokens."""
    reads, strength, update, seen = model.memory(*inputs)
    asked = [again(inputs[0].flip(0), seen) for again in model.memory.again.values()]
    length = reads.shape[1]
    states = []
    for first in range(length + 1):
        after = update.after((first + torch.arange(3, device=reads.device)) % (length + 1), inputs[3])
        states += [after.matrix_BNHU, after.tail_BRI]
    return [reads, *asked, strength, *states], type(update)


@pytest.mark.parametrize("number", [1, 3])
@pytest.mark.parametrize("length", range(1, FEW + 1))
@torch.no_grad()
def test_a_few_tokens_are_the_same_as_a_chunk(length, number, monkeypatch):
    model = build("complete", **{"memory.reads": number})
    inputs = few(model, length)
    found, kind = outcome(model, inputs)
    monkeypatch.setattr(module, "FEW", 0)
    expected, other_kind = outcome(model, inputs)
    assert (kind, other_kind) == (FewUpdate, MemoryUpdate)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_a_few_tokens_are_the_same_with_kernels(dtype, device, monkeypatch):
    model = build("complete", dtype=torch.float32, key_dim=16, value_dim=32).to(device)
    model.compute_dtype = dtype
    u, tail, *rest = few(model, 5, device)
    inputs = (u.to(dtype), tail.to(dtype), rest[0].float(), rest[1])
    expected, _ = outcome(model, inputs)
    asked = force(monkeypatch, FEW_WRITES)
    found, _ = outcome(model, inputs)
    assert len(asked) == 1 + 6
    torch.testing.assert_close(found, expected, rtol=1e-2 if dtype == torch.bfloat16 else 1e-5, atol=1e-5)


def test_more_tokens_gradients_and_unknown_documents_take_the_long_way():
    model = build("complete")
    u, tail, state, timeline = few(model, FEW)
    assert outcome(model, (u, tail, state, timeline))[1] is MemoryUpdate
    with torch.no_grad():
        assert outcome(model, (u, tail, state, timeline))[1] is FewUpdate
        assert outcome(model, few(model, FEW + 1))[1] is MemoryUpdate
        tokens = text(1, rows=3, length=FEW, documents=False)
        read = Timeline.read(tokens, timeline.start_B, timeline.phase_B, eos_id=EOS, segment=99)
        assert outcome(model, (u, tail, state, read))[1] is MemoryUpdate


@torch.no_grad()
def test_with_tied_decay_what_does_not_write_forgets_nothing():
    """One needle, then many tokens whose write rate is almost 0."""
    left = {}
    for tied in (False, True):
        torch.manual_seed(0)
        memory = build("complete", **{"memory.tied_decay": tied}).memory
        memory.gates.weight.zero_()
        state = memory.fresh(1, torch.float64, torch.device("cpu"), allocate=True).matrix_BNHU
        state[:] = 1
        if tied:
            memory.rate_bias.fill_(-12)
        log_decay, _ = memory._gates(torch.zeros(1, 1000, 32, dtype=torch.float64), torch.float64)
        left[tied] = log_decay.sum(1).exp().max().item()
    assert left[False] < 0.2
    assert left[True] > 0.99


@pytest.mark.parametrize(("reads", "layers", "places"), [(1, 6, []), (2, 4, [1]), (3, 8, [2, 4]), (4, 5, [0, 1, 2])])
def test_reads_are_spread_over_the_deep_blocks(reads, layers, places):
    memory = build("complete", layers=layers, **{"memory.reads": reads}).memory
    assert [int(block) for block in memory.again] == places


def test_more_reads_than_deep_blocks_have_a_place_for():
    with pytest.raises(InputError, match=r"memory\.reads=4: must be at most 3, one more than deep blocks"):
        build("complete", layers=4, **{"memory.reads": 4})


@torch.no_grad()
def test_a_deep_block_asks_with_what_the_first_read_has_found():
    """The memory holds a -> b and b -> c; a token that asks for a finds b, and before the second deep block c."""
    model = build("complete", memory_heads=1, key_dim=4, value_dim=8, **{"memory.reads": 2})
    memory = model.memory
    u, tail, state, timeline = few(model, 1)
    for parameter in memory.parameters():
        parameter.zero_()
    memory.conv[:, 0] = 1
    memory.decay_bias.fill_(20)  # nothing is forgotten
    memory.qkv.weight[:4, :4] = 30 * torch.eye(4)  # the query is the token's first four numbers
    memory.out.weight[:8, :8] = 30 * torch.eye(8)  # what is found is added to the first eight
    again = memory.again["1"]
    again.ask.weight[:, 4:8] = 30 * torch.eye(4)  # its second half is asked for
    again.out.weight[8:16, :8] = torch.eye(8)
    state.zero_()
    state[:, 0, 0, 4 + 2] = 1  # key 0 -> a value that names key 2
    state[:, 0, 2, 1] = 1  # key 2 -> value 1
    u.zero_()
    u[..., 0] = 1
    reads, _, _, seen = memory(u, tail.zero_(), state, timeline)
    assert (reads[:, 0].argmax(-1) == 6).all()
    assert (again(u + memory.out(reads), seen)[:, 0, 8:16].argmax(-1) == 1).all()


@torch.no_grad()
@pytest.mark.parametrize("depth", [1.0, 0.5])
def test_only_tokens_that_go_deep_get_what_is_read_again(depth):
    """Then a token that stops after the stem is as without a second read."""
    model = build("complete", **{"memory.reads": 2})
    tokens = text(5, rows=2, length=40)
    out = model(tokens, depth=depth)
    with replaced(model.memory.again["1"].out.weight, torch.zeros_like(model.memory.again["1"].out.weight)):
        without = model(tokens, depth=depth)
    changed = (out.hidden != without.hidden).any(-1)
    deep = out.depth == model.config.layers
    assert deep.all() == (depth == 1)
    assert changed[deep].any()
    assert not changed[~deep].any()
