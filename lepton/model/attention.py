"""The attention layer: grouped-query attention over a window and slots, QK-norm, rotary on half of each head."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lepton.config import LeptonConfig
from lepton.model.layers import Linear, norm, products
from lepton.model.parameters import MATRIX, ZERO_MATRIX
from lepton.ops.attention import attend
from lepton.ops.attention_plan import AttentionPlan
from lepton.ops.heads import ending_in, rotate, shifted


@dataclass(frozen=True)
class Rotary:
    """Rotary position embedding of some tokens, for the first half of each head (Su et al., 2021)."""

    cos: Tensor
    """Cosines [..., 1, head_dim / 4], where ... is the shape of the tokens."""
    sin: Tensor
    """Sines, of the same shape."""

    @staticmethod
    def at(position: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> "Rotary":
        """Return the embedding of positions [...]. Angles are fp64: at position 1,000,000 fp32 errs by 0.016 rad."""
        pairs = head_dim // 4
        exponent = torch.arange(pairs, dtype=torch.float64, device=position.device) / pairs
        angle = (position[..., None].double() * base**-exponent)[..., None, :]
        return Rotary(angle.cos().to(dtype), angle.sin().to(dtype))

    def rotate(self, x: Tensor) -> Tensor:
        """Rotate the first half of each head of `x` [..., heads, head_dim]; the second half has no position."""
        return rotate(x, self.cos, self.sin)


@dataclass(frozen=True)
class Slots:
    """Slots (crystals, thoughts): kv entries in addition to those of tokens."""

    states_BCD: Tensor
    """Normed states, from which keys and values are projected."""
    mask_BTC: Tensor
    """Bool: the slots that each token attends to."""
    bias_BC: Tensor
    """Added to the attention scores of each slot."""

    @staticmethod
    def join(*given: "Slots | None") -> "Slots | None":
        """Return the slots of all arguments, concatenated; None: there are none."""
        parts = [part for part in given if part is not None]
        if not parts:
            return None
        return Slots(
            torch.cat([part.states_BCD for part in parts], 1),
            torch.cat([part.mask_BTC for part in parts], 2),
            torch.cat([part.bias_BC for part in parts], 1),
        )


class Attention(nn.Module):
    """The projections of one attention layer. The kv cache is an argument.

    With `config.slot_bias` the last coordinate of each head adds the bias of slots to the scores: it is a constant in
    queries, the bias in keys of slots, 0 in keys of tokens. So every attention kernel can compute it, and its gradient.
    A `shifted` layer attends to keys whose position-free half is that of the token before; caches hold the tokens' own.
    """

    declares = {"q.weight": MATRIX, "k.weight": MATRIX, "v.weight": MATRIX, "out.weight": ZERO_MATRIX}

    def __init__(self, config: LeptonConfig, *, shifted: bool = False) -> None:
        super().__init__()
        self.shifted = shifted
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.biased = config.slot_bias
        self.q = Linear(config.width, config.heads * config.head_dim)
        self.k = Linear(config.width, config.kv_heads * config.head_dim)
        self.v = Linear(config.width, config.kv_heads * config.head_dim)
        self.out = Linear(config.heads * config.head_dim, config.width)

    def query(self, x: Tensor, rotary: Rotary) -> Tensor:
        """Return queries [..., N, H] of normed states [..., D]."""
        return self._as_query(self.q(x), rotary)

    def key_value(self, x: Tensor, rotary: Rotary | None, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return keys and values [..., K, H] of normed states [..., D].

        Without `rotary` they are those of slots: after the norm, keys are set to 0 in the rotary half, so scores do not
        depend on positions. `bias` [...] is added to their scores.
        """
        k, v = products(x, self.k, self.v)
        return self._as_key(k, rotary, bias), self._as_value(v)

    def query_key_value(self, x: Tensor, rotary: Rotary, key_rotary: Rotary | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of the same states; see `query` and `key_value`."""
        q, k, v = products(x, self.q, self.k, self.v)
        return self._as_query(q, rotary), self._as_key(k, key_rotary), self._as_value(v)

    def _as_query(self, q: Tensor, rotary: Rotary) -> Tensor:
        q = rotary.rotate(norm(q.unflatten(-1, (self.heads, self.head_dim))))
        # Scores are divided by sqrt(head_dim).
        return ending_in(q, q.new_full((), self.head_dim**0.5)) if self.biased else q

    def _as_key(self, k: Tensor, rotary: Rotary | None, bias: Tensor | None = None) -> Tensor:
        k = norm(k.unflatten(-1, (self.kv_heads, self.head_dim)))
        if rotary is None:
            half = self.head_dim // 2
            k = torch.cat([torch.zeros_like(k[..., :half]), k[..., half:]], -1)
        else:
            k = rotary.rotate(k)
        return ending_in(k, k.new_zeros(()) if bias is None else bias.to(k.dtype)) if self.biased else k

    def _as_value(self, v: Tensor) -> Tensor:
        return v.unflatten(-1, (self.kv_heads, self.head_dim))

    def forward(
        self,
        q: Tensor,
        k_BJKH: Tensor,
        v_BJKH: Tensor,
        plan: AttentionPlan,
        slots: Slots | tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Return the output of the layer, [B, T, D], or [M, D] if the plan computes only some tokens.

        `q` are the queries [..., N, H] of these tokens, `k_BJKH` and `v_BJKH` keys and values of remembered
        tokens and chunk. `slots` may be their keys and values [B, C, K, H].
        """
        if self.shifted:
            assert plan.starts_BJ is not None, "the plan is of tokens of the chunk"
            k_BJKH = shifted(k_BJKH, plan.starts_BJ)
        if isinstance(slots, Slots):  # without queries, slots need no keys
            slots = self.key_value(slots.states_BCD, None, slots.bias_BC) if len(q) else None
        return self.out(attend(q, k_BJKH, v_BJKH, plan, slots).flatten(-2))
