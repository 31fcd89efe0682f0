"""A transformer block: pre-norm attention and a squared-ReLU MLP."""

from dataclasses import dataclass
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
from lepton.ops.products import products
from lepton.ops.ring_attention import Extra, Ring, ring_attention


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


@dataclass(frozen=True)
class Served:
    """Tokens that give blocks keys and values of an earlier state, while their own stream runs on."""

    states_BTD: Tensor
    """The earlier states of all tokens, normed."""
    tokens_BT: Tensor
    """Bool: the tokens whose keys and values are of them."""


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream. Norms have no weights."""

    def __init__(self, config: LeptonConfig, ffn: int | None = None, *, shifted: bool = False) -> None:
        super().__init__()
        self.attention = Attention(config, shifted=shifted)
        self.mlp = MLP(config.width, ffn or config.ffn)

    def forward(
        self,
        x_BTD: Tensor,
        past: LayerCache,
        rotary: Rotary,
        plan: AttentionPlan,
        slots: Slots | None = None,
        served: Served | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the residual stream after the block, and the chunk's keys and values [B, T, K, H].

        If the plan wants only some tokens, the other tokens pass through unchanged; their keys and values are computed
        from their unchanged states.

        Args:
            x_BTD: residual stream before the block.
            past: keys and values [B, R, K, H] of remembered tokens, or the ring that holds them.
            rotary: rotary angles of the chunk's tokens.
            plan: the attention mask.
            slots: kv entries in addition to those of tokens.
            served: tokens with keys and values of an earlier state, in training; None: each has those of its own.
        """
        if isinstance(past, RingLayer) and plan.index_M is None and past.has_kernels:
            return self._few_tokens(x_BTD, past, rotary, slots, plan.wanted_BT)
        normed_BTD = norm(x_BTD)
        if plan.index_M is None and served is None:
            q, k_BTKH, v_BTKH = self.attention.query_key_value(normed_BTD, rotary, rotary)
        else:
            shown_BTD = normed_BTD
            if served is not None:
                shown_BTD = torch.where(served.tokens_BT[..., None], served.states_BTD, normed_BTD)
            k_BTKH, v_BTKH = self.attention.key_value(shown_BTD, rotary)
            q = self.attention.query(plan.take(normed_BTD), Rotary(plan.take(rotary.cos), plan.take(rotary.sin)))
        k_BJKH, v_BJKH = joined(past, k_BTKH, v_BTKH)
        kept = past.kept_slots() if isinstance(past, RingLayer) else None
        x = plan.take(x_BTD) + self.attention(q, k_BJKH, v_BJKH, plan, kept or slots)
        return plan.put(x_BTD, x + self.mlp(norm(x))), k_BTKH, v_BTKH

    def _few_tokens(
        self, x_BTD: Tensor, past: RingLayer, rotary: Rotary, slots: Slots | None, wanted_BT: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`forward` in five kernels: projections, attention, output, and the two layers of the MLP.

        Without a wanted token, they read the weights of keys and values alone.
        """
        attention, mlp = self.attention, self.mlp
        x_MD, length = x_BTD.flatten(0, 1), x_BTD.shape[1]
        wanted_M = None if wanted_BT is None else wanted_BT.flatten()
        layers = (attention.q, attention.k, attention.v)
        q, k, v = products(x_MD, [_weight(layer, x_MD) for layer in layers], normed=True, wanted_M=wanted_M)
        q, k, v = (each.unflatten(0, (-1, length)) for each in (q, k, v))
        ring = Ring(past.keys, past.values, past.place_B, past.position_B, wanted_BT, attention.shifted)
        window = past.window or past.keys.shape[1] - length
        extra = None
        if slots is not None and past.slots is not None:
            extra = Extra(*past.slots, past.place_B, slots.mask_BTC)
        elif slots is not None:
            keys_values = attention.key_value(slots.states_BCD, None, slots.bias_BC)
            extra = Extra(*keys_values, torch.arange(len(x_BTD), device=x_MD.device), slots.mask_BTC)
        out = ring_attention(q, k, v, (rotary.cos, rotary.sin), ring, extra, window=window, biased=attention.biased)
        (x_MD,) = products(out.flatten(0, 1), [_weight(attention.out, x_MD)], residual=x_MD, wanted_M=wanted_M)
        return few_mlp(x_MD, mlp.up, mlp.down, wanted_M).view_as(x_BTD), k, v


def few_mlp(x_MD: Tensor, up: Linear, down: Linear, wanted_M: Tensor | None) -> Tensor:
    """Return ``x + down(relu(up(norm(x))) ** 2)`` in two kernels, or `x` for the rows that are not wanted."""
    (hidden,) = products(x_MD, [_weight(up, x_MD)], normed=True, squared_relu=True, wanted_M=wanted_M)
    return products(hidden, [_weight(down, x_MD)], residual=x_MD, wanted_M=wanted_M)[0]


def _weight(layer: Linear, like: Tensor) -> Tensor:
    return layer.weight.to(like.dtype)
