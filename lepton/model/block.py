"""A transformer block: pre-norm attention and a squared-ReLU MLP."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lepton.config import LeptonConfig
from lepton.model.attention import Attention, Rotary, Slots
from lepton.model.layers import Linear, norm
from lepton.ops.attention_plan import AttentionPlan


class SquaredReLU(torch.autograd.Function):
    """``relu(x) ** 2``, which keeps its result alone for the backward pass: its gradient is twice the root of that.

    The product that follows keeps the same. With `x` as well an MLP would keep nearly twice as much. Nothing is done in
    place: where that is, PyTorch 2.11's compiler loses the gradient.
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

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.up = Linear(width, hidden)
        self.down = Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = SquaredReLU.apply(self.up(x))
        return self.down(y)


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream. Norms have no gains."""

    def __init__(self, config: LeptonConfig, ffn: int | None = None) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.mlp = MLP(config.width, ffn or config.ffn)

    def forward(
        self,
        x_BTD: Tensor,
        past: tuple[Tensor, Tensor],
        rotary: Rotary,
        plan: AttentionPlan,
        slots: Slots | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the new residual stream, and the chunk's keys and values [B, T, K, H].

        Only the tokens that the plan chooses are computed; the others keep their state, and serve keys and values made
        of it.
        """
        normed_BTD = norm(x_BTD)
        if plan.index_M is None:
            q, k_BTKH, v_BTKH = self.attention.query_key_value(normed_BTD, rotary, rotary)
        else:
            k_BTKH, v_BTKH = self.attention.key_value(normed_BTD, rotary)
            q = self.attention.query(plan.take(normed_BTD), Rotary(plan.take(rotary.cos), plan.take(rotary.sin)))
        k_BJKH, v_BJKH = torch.cat([past[0], k_BTKH], 1), torch.cat([past[1], v_BTKH], 1)
        x = plan.take(x_BTD) + self.attention(q, k_BJKH, v_BJKH, plan, slots)
        return plan.put(x_BTD, x + self.mlp(norm(x))), k_BTKH, v_BTKH
