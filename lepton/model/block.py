"""A transformer block: pre-norm attention and a squared-ReLU MLP."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lepton.config import LeptonConfig
from lepton.model.attention import Attention, Linear, Rotary, Sight, norm
from lepton.model.route import Route


class SquaredReLU(torch.autograd.Function):
    """``relu(x) ** 2``, which keeps its result alone for the backward pass: its slope is twice the root of that.

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
        sight: Sight,
        route: Route | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the new residual stream, and the chunk's keys and values [B, T, K, H].

        With a `route` only the tokens on it are computed; the others keep their state, and serve keys and values
        made of it.
        """
        normed_BTD = norm(x_BTD)
        if route is None:
            q_BTNH, k_BTKH, v_BTKH = self.attention.query_key_value(normed_BTD, rotary, rotary)
            x_BTD = self._rest(x_BTD, self.attention(q_BTNH, *_after(past, k_BTKH, v_BTKH), sight, None))
        else:
            k_BTKH, v_BTKH = self.attention.key_value(normed_BTD, rotary)
            here = Rotary(route.take(rotary.cos), route.take(rotary.sin))
            q_MNH = self.attention.query(route.take(normed_BTD), here)
            answer_MD = self.attention(q_MNH, *_after(past, k_BTKH, v_BTKH), sight, route)
            x_BTD = route.put(x_BTD, self._rest(route.take(x_BTD), answer_MD))
        return x_BTD, k_BTKH, v_BTKH

    def _rest(self, x: Tensor, answer: Tensor) -> Tensor:
        x = x + answer
        return x + self.mlp(norm(x))


def _after(past: tuple[Tensor, Tensor], k_BTKH: Tensor, v_BTKH: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of past and chunk."""
    return torch.cat([past[0], k_BTKH], 1), torch.cat([past[1], v_BTKH], 1)
