"""Working memory: on constant text, beyond every window, and with the kernels of the delta rule."""

import pytest
import torch

from lepton.model.ideas.working_memory import MemoryUpdate
from lepton.model.timeline import Timeline
from lepton.ops.delta_rule import DELTA_RULE
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
    """With window 8 and 4 blocks a token is out of sight after 32; only memory and crystals carry it on."""
    tokens = text(1, rows=1, documents=False)
    assert min(reach(build("complete"), tokens)) == 0
    assert min(reach(build("no crystals"), tokens)) == 0
    assert min(reach(build("no working memory", slots=60), tokens)) < 8
    assert min(reach(build("complete", memory_heads=0, slots=0), tokens)) > 100 - 5 * 8


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
        reads, strength, record = forward(states, tail, state, timeline)
        assert isinstance(record, MemoryUpdate)
        after = record.after(counts, timeline)
        whole = record.after(torch.full_like(counts, 64), timeline)
        outputs = [reads, after.tail_BRI, after.matrix_BNHU, whole.tail_BRI, whole.matrix_BNHU]
        leaves = [states, tail, state, *(each for name, each in memory.named_parameters() if "out" not in name)]
        return [*outputs, strength], gradients(outputs, leaves)

    return run


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("length", [64, 128, 150])
def test_working_memory_is_the_same_with_kernels(length, device, monkeypatch):
    """Also the states that follow from its record, at a chunk's end, within a chunk, and at the end."""
    model = build("complete", dtype=torch.float32, key_dim=16, value_dim=32).to(device)
    run = remember(model, device, length)
    expected, expected_gradients = run(model.memory.forward)
    force(monkeypatch, DELTA_RULE)
    found, found_gradients = run(model.memory.forward)
    assert_near(found, expected)
    assert_near(found_gradients, expected_gradients, 1e-4)  # both are fp32


@pytest.mark.parametrize("device", DEVICES)
def test_a_graph_of_working_memory_holds_the_operators(device, monkeypatch):
    model = build("complete", dtype=torch.float32, key_dim=16, value_dim=32).to(device)
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
