"""The chunked delta rule against the naive form, in outputs and gradients, also on the text that breaks it."""

import pytest
import torch
import torch.nn.functional as F

from lepton.ops.delta_rule import Writes, delta_rule, naive_delta_rule, read_again

ROWS, CHUNKS, HEADS, CHUNK, KEYS, VALUES = 2, 3, 2, 16, 8, 6


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


def entry_documents(made: Writes) -> torch.Tensor:
    """The state on entry to a chunk is of the document of the token before it; the first, of document 0."""
    return F.pad(made.document_BPO[:, :-1, -1], (1, 0))


@pytest.mark.parametrize("kind", ["random", "constant"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
def test_the_chunked_form_equals_the_naive_one(kind, dtype, tolerance):
    """Reads, the state on entry to each chunk, the last one, and what was written."""
    made, state = writes(kind, dtype)
    found, expected = (form(made, state, entry_documents(made)) for form in (delta_rule, naive_delta_rule))
    torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", ["random", "constant"])
def test_other_queries_read_the_same_memories(kind):
    made, state = writes(kind)
    asked = made._replace(q=made.q.flip(3))
    found = read_again(asked, delta_rule(made, state, entry_documents(made)), entry_documents(made))
    expected = naive_delta_rule(asked, state, entry_documents(made)).reads
    assert (expected != naive_delta_rule(made, state, entry_documents(made)).reads).any()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_the_gradients_agree():
    made, state = writes("random")
    inputs = [value.detach().requires_grad_() for value in (*made[:5], state)]
    results = []
    for form in (delta_rule, naive_delta_rule):
        outputs = form(Writes(*inputs[:5], made.document_BPO), inputs[5], entry_documents(made))
        weights = [torch.linspace(-1, 1, each.numel()).view_as(each) for each in outputs]
        total = sum((each * weight).sum() for each, weight in zip(outputs, weights, strict=True))
        results.append(torch.autograd.grad(total, inputs))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-10)
