"""Reading prompts: the pass over many tokens that comes before decoding."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lepton.model import Network, State
from lepton.values import Least

PREFILL_CHUNK = 1024
"""Prompt tokens of a row that are computed at once: bounds the memory of a long prompt."""


@dataclass(frozen=True)
class Prefilled:
    """The state after some prompts, and what their last tokens give."""

    state: State
    hidden_BD: Tensor
    seen_BF: Tensor
    """What drafts are made from."""
    signals_B3: Tensor
    depth_B: Tensor
    """Blocks that the last token of each prompt went through."""
    blocks_B: Tensor
    """Blocks that the tokens of each prompt went through, in all."""
    passes: int


@torch.no_grad()
def read_prompts(
    model: Network,
    prompts: Sequence[Sequence[int]],
    past: State | None,
    *,
    depth: float | Least,
    think: int | None,
    opens: Sequence[Sequence[int]] | None = None,
) -> Prefilled:
    """Read the prompts, PREFILL_CHUNK tokens at a time.

    The last prompt token opens a segment, so that the thoughts before the new tokens have seen the whole prompt. A
    prompt of one token opens none: after a given state it continues that text, and a fresh state opens one anyway.
    Shorter rows are padded on the right; a row whose prompt has ended gets length 0. `opens` are for each prompt the
    indices of further tokens that open a segment, such as those before the earlier answers of a conversation.
    """
    device, longest = model.device, max(map(len, prompts))
    rows_B = torch.arange(len(prompts), device=device)
    multi_token_B = torch.tensor([len(prompt) > 1 for prompt in prompts], device=device)
    state, last = past, None
    blocks_B = torch.zeros_like(rows_B)
    starts = range(0, longest, PREFILL_CHUNK)
    for start in starts:
        width = min(PREFILL_CHUNK, longest - start)
        parts = [prompt[start : start + width] for prompt in prompts]
        tokens_BT = padded(parts, model.config.eos_id, device)
        lengths_B = torch.tensor([len(part) for part in parts], device=device)
        ends_B = torch.tensor([0 <= len(prompt) - start - 1 < width for prompt in prompts], device=device)
        index_T = torch.arange(width, device=device)
        opens_BT = (index_T == lengths_B[:, None] - 1) & (ends_B & multi_token_B)[:, None]
        for row, indices in enumerate(opens or ()):
            opens_BT[row, [index - start for index in indices if start <= index < start + width]] = True
        out = model.trunk(tokens_BT, state, lengths=lengths_B, opens=opens_BT, depth=depth, think=think)
        state = out.state
        at_B = (lengths_B - 1).clamp(min=0)
        given = (out.hidden, model.seen_by_drafter(out), out.signals, out.depth[..., None])
        found = [each[rows_B, at_B] for each in given]
        last = [torch.where(ends_B[:, None], *pair) for pair in zip(found, last or found, strict=True)]
        blocks_B += (out.depth * (index_T < lengths_B[:, None])).sum(1)
    assert state is not None, "prompts are not empty"
    assert last is not None
    hidden_BD, seen_BF, signals_B3, depth_B1 = last
    return Prefilled(state, hidden_BD, seen_BF, signals_B3, depth_B1[:, 0], blocks_B, len(starts))


@torch.no_grad()
def read_on(
    model: Network, texts: Sequence[Sequence[int]], state: State, *, depth: float | Least, think: int | None
) -> State:
    """Return the state after a text for each row of `state`, perhaps an empty one. It asks for no opening.

    The texts are read PREFILL_CHUNK tokens at a time.
    """
    for start in range(0, max(map(len, texts)), PREFILL_CHUNK):
        parts = [text[start : start + PREFILL_CHUNK] for text in texts]
        lengths_B = torch.tensor([len(part) for part in parts], device=model.device)
        tokens_BT = padded(parts, model.config.eos_id, model.device)
        state = model.trunk(tokens_BT, state, lengths=lengths_B, depth=depth, think=think).state
    return state


def padded(parts: Sequence[Sequence[int]], eos_id: int, device: torch.device) -> Tensor:
    """Return token ids [B, T], padded on the right."""
    width = max(map(len, parts))
    filler = int(eos_id == 0)  # not eos_id: each would open a segment
    return torch.tensor([[*part, *[filler] * (width - len(part))] for part in parts], device=device)
