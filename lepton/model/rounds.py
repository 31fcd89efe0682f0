"""A block that runs in rounds over all tokens of a chunk, with a kv cache for each round.

A chain of n steps through a text takes n rounds: each can copy what another token has found so far (Saunshi et al.
2025). A token that has done its own number of rounds keeps its residual stream; its keys and values of the rounds after
that are made from it. So any number of rounds can follow any other.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from lepton.model.attention import Rotary
from lepton.model.block import Block
from lepton.model.kv_cache import KeysValues, KVCache
from lepton.model.kv_ring import KVRing, LayerCache, RingLayer
from lepton.model.layers import norm
from lepton.ops.attention_plan import AttentionPlan


@dataclass(frozen=True)
class Tokens:
    """Tokens on their way through the rounds."""

    x_BTD: Tensor
    """Residual stream."""
    again_BTD: Tensor
    """What is added to the norm of the stream before each round but the first."""
    each_B: Tensor
    """Rounds of each row."""
    rotary: Rotary
    plan: AttentionPlan
    """Attention mask."""

    def before(self, round_: int) -> Tensor:
        """Return the block's input in a round."""
        return norm(self.x_BTD) + self.again_BTD if round_ else self.x_BTD

    def after(self, round_: int, y_BTD: Tensor) -> "Tokens":
        """Return the tokens after a round, whose output is `y_BTD`; rows that have done theirs stay."""
        return replace(self, x_BTD=torch.where((round_ < self.each_B)[:, None, None], y_BTD, self.x_BTD))

    def of_rows(self, rows_A: Tensor) -> "Tokens":
        """Return the tokens of the rows with indices `rows_A`."""
        x, again, each, cos, sin = (
            value.index_select(0, rows_A)
            for value in (self.x_BTD, self.again_BTD, self.each_B, self.rotary.cos, self.rotary.sin)
        )
        return Tokens(x, again, each, Rotary(cos, sin), self.plan.of_rows(rows_A))


def in_rounds(
    block: Block, tokens: Tokens, past: KVCache | KVRing, usual: int, most: int, late_A: Tensor | None = None
) -> tuple[Tensor, list[KeysValues]]:
    """Run `block` over tokens in rounds.

    Args:
        block: the same in all rounds.
        tokens: of the chunk.
        past: kv caches of `most` layers, one for each round.
        usual: rounds that are computed for all rows.
        most: rounds that there are kv caches for.
        late_A: indices of rows that go on up to `most` rounds; None: none do.

    Returns:
        The residual stream after the rounds [B, T, D], and the keys and values [B, T, K, H] of each of `most` rounds.
        Rings hold them already.
    """
    chunk: list[KeysValues] = []
    for round_ in range(usual):
        y_BTD, k_BTKH, v_BTKH = block(tokens.before(round_), past.layer(round_), tokens.rotary, tokens.plan)
        tokens = tokens.after(round_, y_BTD)
        chunk.append((k_BTKH, v_BTKH))
    for round_ in range(usual, most):
        if round_ in (usual, 1):  # later ones are the same
            held = block.attention.key_value(norm(tokens.before(round_)), tokens.rotary)
        if isinstance(ring := past.layer(round_), RingLayer):
            ring.written(*held)
        chunk.append(held)
    if late_A is None:
        return tokens.x_BTD, chunk
    late = tokens.of_rows(late_A)
    for round_ in range(usual, most):
        cache = _rows_of(past.layer(round_), late_A)
        y_ATD, *own = block(late.before(round_), cache, late.rotary, late.plan)
        late = late.after(round_, y_ATD)
        k_BTKH, v_BTKH = (all_.index_copy(0, late_A, each) for all_, each in zip(chunk[round_], own, strict=True))
        chunk[round_] = (k_BTKH, v_BTKH)
    return tokens.x_BTD.index_copy(0, late_A, late.x_BTD), chunk


def _rows_of(cache: LayerCache, rows_A: Tensor) -> KeysValues:
    assert isinstance(cache, tuple), "rows of a ring do not differ in training"
    return cache[0].index_select(0, rows_A), cache[1].index_select(0, rows_A)
