"""The attention layer: QK-normed, grouped-query, rotary on half of each head, over a sliding window and slots."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lepton.config import LeptonConfig
from lepton.model.layers import Linear, norm, products
from lepton.ops.attention import attend
from lepton.ops.attention_plan import AttentionPlan


@dataclass(frozen=True)
class Rotary:
    """Rotation angles of some tokens, for the first half of each head (Su et al., 2021)."""

    cos: Tensor
    """[..., 1, head_dim / 4], in front the shape of the tokens."""
    sin: Tensor

    @staticmethod
    def at(position: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> "Rotary":
        """Angles of positions of any shape, computed in fp64: at a million tokens fp32 is off by 0.016 rad."""
        pairs = head_dim // 4
        exponent = torch.arange(pairs, dtype=torch.float64, device=position.device) / pairs
        angle = (position[..., None].double() * base**-exponent)[..., None, :]
        return Rotary(angle.cos().to(dtype), angle.sin().to(dtype))

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate the first half of each head of `x` [..., heads, head_dim]; the second half stays position-free."""
        pairs = self.cos.shape[-1]
        first, second, rest = x.split([pairs, pairs, x.shape[-1] - 2 * pairs], -1)
        return torch.cat(
            [first * self.cos - second * self.sin, first * self.sin + second * self.cos, rest],
            -1,
        )


@dataclass(frozen=True)
class Slots:
    """Slots (crystals, thoughts): kv entries that are no tokens, of which a query may see some beside its window."""

    states_BCD: Tensor
    """The states that keys and values are projected from, normed."""
    mask_BTC: Tensor
    """Which token sees which slot."""
    bias_BC: Tensor
    """Added to the attention scores of a slot."""

    @staticmethod
    def join(*given: "Slots | None") -> "Slots | None":
        """Return all slots that are given, side by side."""
        parts = [part for part in given if part is not None]
        if not parts:
            return None
        return Slots(
            torch.cat([part.states_BCD for part in parts], 1),
            torch.cat([part.mask_BTC for part in parts], 2),
            torch.cat([part.bias_BC for part in parts], 1),
        )


class Attention(nn.Module):
    """Projections of one attention layer. Its past is an argument.

    But in the dense baseline the last coordinate of each head carries the bias of slots: a constant in queries,
    the bias in slots' keys, zero in tokens' keys. So it is part of the product of queries and keys, every attention
    kernel takes it, and its gradient needs no mask of its own.
    """

    def __init__(self, config: LeptonConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.biased = not config.dense
        self.q = Linear(config.width, config.heads * config.head_dim)
        self.k = Linear(config.width, config.kv_heads * config.head_dim)
        self.v = Linear(config.width, config.kv_heads * config.head_dim)
        self.out = Linear(config.heads * config.head_dim, config.width)

    def query(self, x: Tensor, rotary: Rotary) -> Tensor:
        """Queries [..., N, H] of normed states [..., D]."""
        return self._as_query(self.q(x), rotary)

    def key_value(self, x: Tensor, rotary: Rotary | None, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Keys and values [..., K, H] of normed states [..., D].

        Without a rotary they are those of slots: keys are normed like a token's and then zero in the rotary half,
        so that they match the same at every position and nothing extrapolates. `bias` [...] is added to their scores.
        """
        k, v = products(x, self.k, self.v)
        return self._as_key(k, rotary, bias), self._as_value(v)

    def query_key_value(self, x: Tensor, here: Rotary, keys_here: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """`query` and `key_value` of the same states."""
        q, k, v = products(x, self.q, self.k, self.v)
        return self._as_query(q, here), self._as_key(k, keys_here), self._as_value(v)

    def _as_query(self, q: Tensor, rotary: Rotary) -> Tensor:
        q = rotary.rotate(norm(q.unflatten(-1, (self.heads, self.head_dim))))
        # Scores are divided by sqrt(head_dim).
        return _ending_in(q, q.new_full((), self.head_dim**0.5)) if self.biased else q

    def _as_key(self, k: Tensor, rotary: Rotary | None, bias: Tensor | None = None) -> Tensor:
        k = norm(k.unflatten(-1, (self.kv_heads, self.head_dim)))
        if rotary is None:
            half = self.head_dim // 2
            k = torch.cat([torch.zeros_like(k[..., :half]), k[..., half:]], -1)
        else:
            k = rotary.rotate(k)
        return _ending_in(k, k.new_zeros(()) if bias is None else bias.to(k.dtype)) if self.biased else k

    def _as_value(self, v: Tensor) -> Tensor:
        return v.unflatten(-1, (self.kv_heads, self.head_dim))

    def forward(
        self, q: Tensor, k_BJKH: Tensor, v_BJKH: Tensor, plan: AttentionPlan, slots: Slots | None = None
    ) -> Tensor:
        """Return what attention adds to the residual stream, [B, T, D] or of chosen tokens [M, D].

        `q` are the queries [..., N, H] that the plan computes, `k_BJKH` and `v_BJKH` are those of past and chunk.
        """
        if slots is None or not len(q):  # where no token is chosen, slots need no keys
            return self.out(attend(q, k_BJKH, v_BJKH, plan).flatten(-2))
        keys_values = self.key_value(slots.states_BCD, None, slots.bias_BC)
        return self.out(attend(q, k_BJKH, v_BJKH, plan, keys_values).flatten(-2))


def _ending_in(x: Tensor, last: Tensor) -> Tensor:
    """Heads [..., N, H] with `last` [...] in place of their last coordinate.

    Not by `F.pad`: of what the same kernel has just stored, PyTorch 2.11's compiler for GPUs pads nothing
    (pytorch/pytorch#189895).
    """
    is_last_H = torch.arange(x.shape[-1], device=x.device) == x.shape[-1] - 1
    return torch.where(is_last_H, last[..., None, None], x)
