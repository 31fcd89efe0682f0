"""The whole model, slowly: one document, one token after the other, no batches, masks, blocks, chunks or states."""

import itertools
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F

from lepton.model.ideas.working_memory import READ_EPS
from lepton.model.layers import norm
from lepton.ops.delta_rule import Writes, naive_delta_rule
from tests.laws.lab import EOS

Column = tuple[torch.Tensor, torch.Tensor, float | torch.Tensor]


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


def token_column(attention, state, position, config) -> Column:
    """Key and value [K, H] of a token's normed state, without bias."""
    keys = (attention.k.weight @ state).view(config.kv_heads, -1)
    keys = torch.stack([rotate(norm(key), position, config.rope_base) for key in keys])
    return keys, (attention.v.weight @ state).view(config.kv_heads, -1), 0.0


def slot_column(attention, state, bias, config) -> Column:
    """Key and value of a slot: normed over the whole head, then zero in the rotary half."""
    keys = norm((attention.k.weight @ state).view(config.kv_heads, -1))
    keys = torch.cat([torch.zeros_like(keys[:, : config.head_dim // 2]), keys[:, config.head_dim // 2 :]], 1)
    return keys, (attention.v.weight @ state).view(config.kv_heads, -1), bias


def attend(attention, state, position, columns: list[Column], config) -> torch.Tensor:
    """What attention adds at one normed state that looks at `columns`."""
    queries = (attention.q.weight @ state).view(config.heads, -1)
    answers = []
    for n, query in enumerate(queries):
        kv = n // (config.heads // config.kv_heads)
        turned = rotate(norm(query), position, config.rope_base)
        if not config.dense:  # the last coordinate is taken by the bias
            turned = torch.cat([turned[:-1], torch.zeros(1)])
        scores = torch.stack([turned @ keys[kv] / math.sqrt(config.head_dim) + bias for keys, _, bias in columns])
        answers.append((scores.softmax(0)[:, None] * torch.stack([values[kv] for _, values, _ in columns])).sum(0))
    return attention.out.weight @ torch.cat(answers)


def columns_of(attention, u, config) -> list[Column]:
    """The columns of the tokens of a document, given their normed states."""
    columns = [token_column(attention, state, t, config) for t, state in enumerate(u)]
    if not attention.shifted:
        return columns
    before = [torch.zeros_like(columns[0][0]), *(keys for keys, _, _ in columns)]
    half = config.head_dim // 2
    return [
        (torch.cat([keys[:, :half], other[:, half:]], 1), values, bias)
        for (keys, values, bias), other in zip(columns, before, strict=False)
    ]


def run_block(block, x, extra: list[list[Column]], config, wide: bool = False) -> list[torch.Tensor]:
    """One block over a document; token t also sees the columns `extra[t]`."""
    window = config.wide_window if wide else config.window
    columns = columns_of(block.attention, [norm(state) for state in x], config)
    result = []
    for t, state in enumerate(x):
        first = 0 if window is None else max(0, t - window + 1)
        state = state + attend(block.attention, norm(state), t, columns[first : t + 1] + extra[t], config)
        result.append(state + run_mlp(block.mlp, state))
    return result


def run_mlp(mlp, state) -> torch.Tensor:
    return mlp.down.weight @ F.relu(mlp.up.weight @ norm(state)) ** 2


def token_rounds(thoughts, h, rounds, config) -> list[list[torch.Tensor]]:
    """The inputs of each round over the tokens of a document, and at the end the tokens after the last."""
    found, x = [], h
    for round_ in range(rounds):
        again = [thoughts.again.weight @ norm(state) for state in h]
        inputs = [norm(state) + more for state, more in zip(x, again, strict=True)] if round_ else x
        found.append(inputs)
        x = run_block(thoughts.block, inputs, [[] for _ in h], config)
    return [*found, x]


def think(thoughts, seen, u, t, rounds, config) -> torch.Tensor:
    """The group that opens at token t: [S, D]; `seen` are the normed states of all tokens in each round."""
    attention, first = thoughts.block.attention, max(0, t - config.window + 1)
    start = [vector + thoughts.opening.weight @ u[t] for vector in thoughts.start]
    slots = start
    for round_ in range(rounds):
        window = columns_of(attention, seen[round_], config)[first : t + 1]
        entering = [norm(slot + begun) for slot, begun in zip(slots, start, strict=True)]
        own = [slot_column(attention, slot, 0.0, config) for slot in entering]
        moved = [slot + attend(attention, slot, t, window + own, config) for slot in entering]
        slots = [norm(slot + run_mlp(thoughts.block.mlp, slot)) for slot in moved]
    return torch.stack(slots)


def remember(memory, u) -> tuple[list[torch.Tensor], Callable]:
    """What each token reads from the working memory, normed per head, and what other queries [1, 1, N, T, H] read."""
    raw, tokens = [memory.qkv.weight @ state for state in u], []
    for t in range(len(u)):
        mixed = sum(raw[t - i] * memory.conv[:, i] for i in range(4) if i <= t)
        parts = F.silu(mixed).view(memory.heads, -1).split([memory.key_dim, memory.key_dim, memory.value_dim], -1)
        q, k, v = F.normalize(parts[0], dim=-1), F.normalize(parts[1], dim=-1), parts[2]
        decay, rate = (memory.gates.weight @ u[t]).chunk(2)
        log_decay = F.logsigmoid(decay + memory.decay_bias)
        if memory.rate_bias is not None:
            rate = rate + memory.rate_bias
            log_decay = torch.sigmoid(rate) * log_decay
        tokens.append((q, k, v, log_decay, torch.sigmoid(rate)))
    parts = [torch.stack(part, 1)[None, None] for part in zip(*tokens, strict=True)]
    state, document = (
        torch.zeros(1, memory.heads, memory.key_dim, memory.value_dim, dtype=u[0].dtype),
        torch.zeros(1, 1, len(u)),
    )

    def read(queries) -> list[torch.Tensor]:
        writes = Writes(queries, *parts[1:], document)
        reads = naive_delta_rule(writes, state, document[:, :, 0])[0][0, 0]
        normed = reads / (reads.square().mean(-1, keepdim=True) + READ_EPS).sqrt()
        return list(normed.transpose(0, 1).flatten(1))

    return read(parts[0]), read


def ask_again(again, x, read) -> list[torch.Tensor]:
    """The stream before a deep block after another read of the memory."""
    queries = [F.normalize(F.silu(again.ask.weight @ norm(state)).view(again.heads, -1), dim=-1) for state in x]
    found = read(torch.stack(queries, 1)[None, None])
    return [state + again.out.weight @ each for state, each in zip(x, found, strict=True)]


def visible_crystals(crystals, u, config) -> tuple[list[list[int]], list[torch.Tensor]]:
    """Which earlier tokens each token sees as crystals, and the log-score of every token."""
    log_score = [F.logsigmoid(crystals.score.weight[0] @ state + crystals.score.bias[0]) for state in u]
    kept, open_, seen, shape = [], [], [], config.idea("crystals")
    for t, score in enumerate(log_score):
        if t % config.segment == 0:
            best = sorted(open_, reverse=True)[: shape.per_segment]
            kept = sorted(kept + best, reverse=True)[: shape.slots]
            open_ = []
        open_.append((round(1024 * score.item()), t))
        seen.append([position for _, position in kept if t - position >= config.window])
    return seen, log_score


def slow_logits(model, document: list[int]) -> torch.Tensor:
    """Logits of one document."""
    config, embedding = model.config, model.embed.weight
    up = model.embed_up.weight if config.embed_rank else torch.eye(config.width, dtype=embedding.dtype)
    down = model.head_down.weight if config.embed_rank else torch.eye(config.width, dtype=embedding.dtype)
    nothing: list[list[Column]] = [[] for _ in document]
    h = [norm(up @ embedding[token]) for token in document]
    if config.token_shift:
        h = [h[0], *(own + model.shift_D * before for before, own in itertools.pairwise(h))]
    for block in model.stem:
        h = run_block(block, h, nothing, config)
    u = [norm(state) for state in h]
    groups: list[torch.Tensor | None] = [None] * len(u)
    if model.thoughts is not None:
        rounds, seen, stem = config.idea("thoughts").rounds, [u] * config.idea("thoughts").rounds, u
        if config.idea("thoughts").over_tokens:
            *inputs, h = token_rounds(model.thoughts, h, rounds, config)
            seen, u = [[norm(state) for state in each] for each in inputs], [norm(state) for state in h]
        opened = {t: think(model.thoughts, seen, stem, t, rounds, config) for t in range(0, len(u), config.segment)}
        groups = [opened[t - t % config.segment] for t in range(len(u))]
    reads, read = remember(model.memory, u) if model.memory is not None else (None, None)
    x = list(h)
    for t in range(len(u)):
        parts = [u[t]]
        if reads is not None:
            x[t] = x[t] + model.memory.out.weight @ reads[t]
            parts.append(reads[t])
        if groups[t] is not None:
            parts.append(norm(groups[t].mean(0)))
        if model.peek is not None:
            hint = norm(model.peek.down.weight @ F.silu(model.peek.up.weight @ torch.cat(parts)))
            x[t] = x[t] + model.peek.back.weight @ hint
    seen, log_score = ([[] for _ in u], [])
    if model.crystals is not None:
        seen, log_score = visible_crystals(model.crystals, u, config)
    streams = []
    for index, (block, wide) in enumerate(zip(model.blocks, config.wide_layers, strict=True)):
        if read is not None and str(index) in model.memory.again:
            x = ask_again(model.memory.again[str(index)], x, read)
        extra = [[slot_column(block.attention, u[s], log_score[s], config) for s in seen[t]] for t in range(len(u))]
        for t, group in enumerate(groups):
            extra[t] += [] if group is None else [slot_column(block.attention, norm(z), 0.0, config) for z in group]
        x = run_block(block, x, extra, config, wide)
        streams.append(x)
    if config.backout:
        middle = [h, *streams][config.middle - config.stem_layers + 1]
        x = [top - model.backout * below for top, below in zip(x, middle, strict=True)]
    scores = torch.stack([embedding[: config.vocab_size] @ (down @ norm(state)) for state in x])
    return config.logit_cap * torch.tanh(scores / config.logit_cap)
