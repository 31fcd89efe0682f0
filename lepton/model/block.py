"""A transformer block: pre-norm attention and a squared-ReLU MLP."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lepton.config import LeptonConfig
from lepton.model.attention import Attention, Rotary, Slots
from lepton.model.kv_ring import LayerCache, RingLayer, joined
from lepton.model.layers import Linear, norm
from lepton.model.parameters import MATRIX, ZERO_MATRIX
from lepton.ops.attention_plan import AttentionPlan


class SquaredReLU(torch.autograd.Function):
    """``relu(x) ** 2``. For the backward pass it keeps only its output y, since the derivative is 2 sqrt(y).

    The matrix product that follows keeps y anyway; keeping `x` too would nearly double the memory of an MLP. No
    operation is in place: PyTorch 2.11's compiler would lose the gradient.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = F.relu(x).square()
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return 2 * y.sqrt() * grad


class MLP(nn.Module):
    """Squared-ReLU MLP (So et al., 2021: Primer)."""

    declares = {"up.weight": MATRIX, "down.weight": ZERO_MATRIX}

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = SquaredReLU.apply(self.up(x))
        return self.down(y)


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream. Norms have no weights."""

    def __init__(self, config: LeptonConfig, ffn: int | None = None) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.mlp = MLP(config.width, ffn or config.ffn)

    def forward(
        self,
        x_BTD: Tensor,
        past: LayerCache,
        rotary: Rotary,
        plan: AttentionPlan,
        slots: Slots | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the residual stream after the block, and the chunk's keys and values [B, T, K, H].

        If the plan computes only some tokens, the other tokens pass through unchanged; their keys and values are
        computed from their unchanged states.

        Args:
            x_BTD: residual stream before the block.
            past: keys and values [B, R, K, H] of remembered tokens, or the ring that holds them.
            rotary: rotary angles of the chunk's tokens.
            plan: the attention mask.
            slots: kv entries in addition to those of tokens.
        """
        normed_BTD = norm(x_BTD)
        if plan.index_M is None:
            q, k_BTKH, v_BTKH = self.attention.query_key_value(normed_BTD, rotary, rotary)
        else:
            k_BTKH, v_BTKH = self.attention.key_value(normed_BTD, rotary)
            q = self.attention.query(plan.take(normed_BTD), Rotary(plan.take(rotary.cos), plan.take(rotary.sin)))
        k_BJKH, v_BJKH = joined(past, k_BTKH, v_BTKH)
        kept = past.kept_slots() if isinstance(past, RingLayer) else None
        x = plan.take(x_BTD) + self.attention(q, k_BJKH, v_BJKH, plan, kept or slots)
        return plan.put(x_BTD, x + self.mlp(norm(x))), k_BTKH, v_BTKH
