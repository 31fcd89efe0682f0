"""The whole forward pass against a slow one that knows no batches, masks, bands or states."""

import math

import pytest
import torch
import torch.nn.functional as F

from lepton.model.attention import norm
from tests.laws.lab import EOS, VARIANTS, build, text


def documents(tokens: list[int]) -> list[list[int]]:
    """Split at document ends; the end belongs to its document."""
    result: list[list[int]] = [[]]
    for token in tokens:
        result[-1].append(token)
        if token == EOS:
            result.append([])
    return [document for document in result if document]


def rotate(head: torch.Tensor, position: int, base: float) -> torch.Tensor:
    """Rotate the pairs of the first half of one head as complex numbers."""
    pairs = head.shape[0] // 4
    pair = torch.complex(head[:pairs], head[pairs : 2 * pairs])
    angle = torch.tensor([position * base ** (-i / pairs) for i in range(pairs)], dtype=torch.float64)
    turned = pair * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([turned.real, turned.imag, head[2 * pairs :]])


def slow_attention(attention, x: list[torch.Tensor], t: int, config) -> torch.Tensor:
    first = 0 if config.window is None else max(0, t - config.window + 1)
    heads = []
    for n in range(config.heads):
        part = slice(n * config.head_dim, (n + 1) * config.head_dim)
        kv = n // (config.heads // config.kv_heads)
        kv_part = slice(kv * config.head_dim, (kv + 1) * config.head_dim)
        query = rotate(norm((attention.q.weight @ norm(x[t]))[part]), t, config.rope_base)
        keys = [
            rotate(norm((attention.k.weight @ norm(x[s]))[kv_part]), s, config.rope_base) for s in range(first, t + 1)
        ]
        values = [(attention.v.weight @ norm(x[s]))[kv_part] for s in range(first, t + 1)]
        weights = torch.stack([query @ key for key in keys]).div(math.sqrt(config.head_dim)).softmax(0)
        heads.append((weights[:, None] * torch.stack(values)).sum(0))
    return attention.out.weight @ torch.cat(heads)


def slow_logits(model, document: list[int]) -> torch.Tensor:
    config, embedding = model.config, model.embed.weight
    up = model.embed_up.weight if config.embed_rank else torch.eye(config.width, dtype=embedding.dtype)
    down = model.head_down.weight if config.embed_rank else torch.eye(config.width, dtype=embedding.dtype)
    x = [norm(up @ embedding[token]) for token in document]
    for block in [*model.stem, *model.blocks]:
        x = [x[t] + slow_attention(block.attention, x, t, config) for t in range(len(x))]
        x = [v + block.mlp.down.weight @ F.relu(block.mlp.up.weight @ norm(v)) ** 2 for v in x]
    scores = torch.stack([embedding[: config.vocab_size] @ (down @ norm(v)) for v in x])
    return config.logit_cap * torch.tanh(scores / config.logit_cap)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_equal_to_the_slow_reference(variant):
    model, tokens = build(variant), text(1, rows=1, length=60)
    expected = torch.cat([slow_logits(model, document) for document in documents(tokens[0].tolist())])
    torch.testing.assert_close(model(tokens).logits[0], expected, rtol=0, atol=1e-9)
