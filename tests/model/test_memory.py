"""The working memory's chunk form against the recurrence, in outputs and gradients, also on the text that breaks it."""

import pytest
import torch
import torch.nn.functional as F

from lepton.model.delta_rule import Writes, delta_rule
from tests.laws.lab import build, text

ROWS, CHUNKS, HEADS, CHUNK, KEYS, VALUES = 2, 3, 2, 16, 8, 6


def recurrence(writes: Writes, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Token by token: S = a (I - b k k') S + b k v'; o = S' q; a new document starts from nothing."""
    flat = [value.transpose(2, 3).flatten(1, 2) for value in writes[:5]]
    q, k, v, log_decay, rate = flat
    document = writes.document_BPC.flatten(1)
    reads, previous = [], torch.zeros(ROWS, dtype=torch.int64)
    for t in range(q.shape[1]):
        state = torch.where((document[:, t] != previous)[:, None, None, None], 0, state)
        previous = document[:, t]
        decayed = log_decay[:, t].exp()[..., None, None] * state
        answer = torch.einsum("bhkv,bhk->bhv", decayed, k[:, t])
        state = decayed + torch.einsum("bhk,bhv->bhkv", k[:, t], rate[:, t][..., None] * (v[:, t] - answer))
        reads.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    return torch.stack(reads, 1), state


def writes(kind: str, dtype: torch.dtype = torch.float64) -> tuple[Writes, torch.Tensor]:
    def draw(*shape):
        return torch.randn(ROWS, CHUNKS, HEADS, CHUNK, *shape, dtype=dtype)

    q, k, v = draw(KEYS), draw(KEYS), draw(VALUES)
    document = (torch.rand(ROWS, CHUNKS * CHUNK) < 0.08).long().cumsum(1)
    if kind == "constant":
        k, document = k[:, :1, :, :1].expand_as(k), torch.zeros_like(document)
    log_decay, rate = F.logsigmoid(draw() + 2), draw().sigmoid()
    if kind == "constant":
        log_decay, rate = torch.full_like(log_decay, -1e-3), torch.full_like(rate, 0.999)
    normed = [F.normalize(value, dim=-1) for value in (q, k)]
    result = Writes(*normed, v, log_decay, rate, document.view(ROWS, CHUNKS, CHUNK))
    return result, torch.randn(ROWS, HEADS, KEYS, VALUES, dtype=dtype)


def chunk_form(made: Writes, state: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    entry = F.pad(made.document_BPC[:, :-1, -1], (1, 0))
    reads, states = delta_rule(made, state, entry)
    return reads.transpose(2, 3).flatten(1, 2), states[-1]


@pytest.mark.parametrize("kind", ["random", "constant"])
def test_the_chunk_form_equals_the_recurrence(kind):
    made, state = writes(kind)
    torch.testing.assert_close(chunk_form(made, state), recurrence(made, state), rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["random", "constant"])
def test_fp32_stays_near_on_repeated_tokens(kind):
    made, state = writes(kind, torch.float32)
    torch.testing.assert_close(chunk_form(made, state), recurrence(made, state), rtol=0, atol=1e-4)


def test_the_gradients_agree():
    made, state = writes("random")
    inputs = [value.detach().requires_grad_() for value in (*made[:5], state)]
    results = []
    for form in (chunk_form, recurrence):
        reads, end = form(Writes(*inputs[:5], made.document_BPC), inputs[5])
        weight = torch.linspace(-1, 1, reads.numel()).view_as(reads)
        results.append(torch.autograd.grad((reads * weight).sum() + end.square().sum(), inputs))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-10)


@torch.no_grad()
def test_constant_text_keeps_the_model_finite_for_long():
    model = build("complete", dtype=torch.float32)
    state, tokens = None, torch.full((1, 500), 5)
    for _ in range(6):
        out = model(tokens, state)
        state = out.state
        assert out.logits.isfinite().all()
    assert state.memory.matrix_BHKV.abs().max() < 1e3


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
