"""Attention: QK-normed, grouped-query, rotary on half of each head, over a sliding window and extra slot columns."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lepton.config import LeptonConfig
from lepton.model.ranges import Ranges, attend_in_ranges
from lepton.model.route import Route
from lepton.model.timeline import Band, Timeline

NORM_EPS = 1e-6
PRODUCT_COLUMNS = 1024
"""Up to so many columns a CPU keeps the scores of all pairs, twice as fast in training as its fused attention;
beyond, they would take more memory than all else."""


def norm(x: Tensor) -> Tensor:
    """RMSNorm without gains, over the last dimension (Zhang and Sennrich, 2019)."""
    return F.rms_norm(x, (x.shape[-1],), eps=NORM_EPS)


class Linear(nn.Linear):
    """A matrix without bias that computes in its input's dtype; the parameter keeps its own."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


def products(x: Tensor, *linears: Linear) -> Sequence[Tensor]:
    """What some matrices make of the same states.

    Where gradients are wanted it is one product: that for `x` need not be written for each of them and added up.
    """
    if not torch.is_grad_enabled():
        return [linear(x) for linear in linears]
    matrix = torch.cat([linear.weight for linear in linears]).to(x.dtype)
    return F.linear(x, matrix).split([linear.out_features for linear in linears], -1)


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
    """Columns that are no tokens (crystals, thoughts): every query may see some of them beside its window."""

    states_BCD: Tensor
    """What keys and values are made of, normed."""
    mask_BTC: Tensor
    """Which token sees which column."""
    bias_BC: Tensor
    """Added to the attention scores of a column."""

    @staticmethod
    def join(*given: "Slots | None") -> "Slots | None":
        """Return the columns of all that is given side by side."""
        parts = [part for part in given if part is not None]
        if not parts:
            return None
        return Slots(
            torch.cat([part.states_BCD for part in parts], 1),
            torch.cat([part.mask_BTC for part in parts], 2),
            torch.cat([part.bias_BC for part in parts], 1),
        )


@dataclass(frozen=True)
class Sight:
    """What the tokens of a chunk see: of the token columns those of their band, and then all slots."""

    queries: list[slice]
    """The tokens of each band."""
    columns: list[slice]
    """Its columns, of those of past and chunk."""
    unseen: list[Tensor | Ranges]
    """For each band [B, T of the band, its columns and then C]: what `attend` takes."""
    slots: Slots | None

    @staticmethod
    def of(bands: list[Band], slots: Slots | None, dtype: torch.dtype) -> "Sight":
        """Lay out what all blocks that see the same share."""
        masks = [band.mask_BTJ for band in bands]
        if slots is not None:
            masks = [torch.cat([band.mask_BTJ, slots.mask_BTC[:, band.queries]], 2) for band in bands]
        queries, columns = [band.queries for band in bands], [band.columns for band in bands]
        return Sight(queries, columns, [unseen(mask, dtype) for mask in masks], slots)

    @staticmethod
    def whole(timeline: Timeline, window: int | None, slots: Slots | None) -> "Sight":
        """Lay out the same for a chunk without a past, in one band, for a device that attends in ranges."""
        ranges = Ranges.of(timeline, window, slots.mask_BTC if slots else None)
        return Sight([slice(None)], [slice(None)], [ranges], slots)


def unseen(mask_BTJ: Tensor, dtype: torch.dtype) -> Tensor:
    """What is added to scores: 0 where `mask_BTJ` is true, elsewhere so little that no share is left."""
    columns = mask_BTJ.shape[2]
    # The kernels of GPUs want rows that begin at whole multiples of 16 bytes, and would copy each time what has none.
    added_BTX = torch.zeros(*mask_BTJ.shape[:2], -(-columns // 8) * 8, dtype=dtype, device=mask_BTJ.device)
    return added_BTX[..., :columns].masked_fill_(~mask_BTJ, torch.finfo(dtype).min)


def attend(q_BTNH: Tensor, k_BJKH: Tensor, v_BJKH: Tensor, unseen_BTJ: Tensor | Ranges) -> Tensor:
    """Softmax attention [B, T, N, H], `unseen_BTJ` added to scores. Each key/value head serves N / K query heads."""
    if isinstance(unseen_BTJ, Ranges):
        return attend_in_ranges(q_BTNH, k_BJKH, v_BJKH, unseen_BTJ)
    if q_BTNH.device.type == "cpu" and k_BJKH.shape[1] <= PRODUCT_COLUMNS:
        return attend_by_products(q_BTNH, k_BJKH, v_BJKH, unseen_BTJ)
    group = q_BTNH.shape[2] // k_BJKH.shape[2]
    k_BNJH = k_BJKH.transpose(1, 2).repeat_interleave(group, 1)
    v_BNJH = v_BJKH.transpose(1, 2).repeat_interleave(group, 1)
    answer_BNTH = F.scaled_dot_product_attention(
        q_BTNH.transpose(1, 2), k_BNJH, v_BNJH, attn_mask=unseen_BTJ[:, None], scale=q_BTNH.shape[-1] ** -0.5
    )
    return answer_BNTH.transpose(1, 2)


def attend_by_products(q_BTNH: Tensor, k_BJKH: Tensor, v_BJKH: Tensor, unseen_BTJ: Tensor) -> Tensor:
    """`attend` with the scores of all pairs in memory, in q's dtype; a softmax computes in fp32 or better."""
    rows, length, heads, width = q_BTNH.shape
    kv_heads = k_BJKH.shape[2]
    # The query heads that share a key/value head stand below each other: one product for all of them.
    q_BKXH = q_BTNH.unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    scores_BKGTJ = (q_BKXH @ k_BJKH.permute(0, 2, 3, 1)).unflatten(2, (-1, length))
    scores_BKGTJ = torch.add(unseen_BTJ[:, None, None], scores_BKGTJ, alpha=width**-0.5)
    answer_BKXH = scores_BKGTJ.softmax(-1).flatten(2, 3) @ v_BJKH.transpose(1, 2)
    return answer_BKXH.view(rows, heads, length, width).transpose(1, 2)


class Attention(nn.Module):
    """Projections of one attention layer. Its past is an argument.

    But in the dense baseline the last coordinate of each head carries the bias of slot columns: a constant in queries,
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

        Without a rotary the columns are slots: their keys are normed like a token's and then zero in the rotary half,
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

    def forward(self, q: Tensor, k_BJKH: Tensor, v_BJKH: Tensor, sight: Sight, route: Route | None) -> Tensor:
        """Answer the queries of all tokens [B, T, N, H], or of the routed ones [M, N, H]; returns [..., D].

        `k_BJKH` and `v_BJKH` are those of past and chunk.
        """
        if route is not None and not any(pick.any for pick in route.picks):
            return self.out(q.flatten(-2))
        if sight.slots is not None:
            slot_k, slot_v = self.key_value(sight.slots.states_BCD, None, sight.slots.bias_BC)
        answers = []
        for index, unseen_BTX in enumerate(sight.unseen):
            k, v = k_BJKH[:, sight.columns[index]], v_BJKH[:, sight.columns[index]]
            if sight.slots is not None:
                k, v = torch.cat([k, slot_k], 1), torch.cat([v, slot_v], 1)
            if route is None:
                answers.append(attend(q[:, sight.queries[index]], k, v, unseen_BTX))
            elif route.picks[index].any:
                assert isinstance(unseen_BTX, Tensor)
                pick = route.picks[index]
                unseen_RQX = unseen_BTX[pick.rows_R[:, None], pick.query_RQ]
                answers.append(pick.unpad(attend(pick.pad(q), k[pick.rows_R], v[pick.rows_R], unseen_RQX)))
        return self.out(torch.cat(answers, 1 if route is None else 0).flatten(-2))


def _ending_in(x: Tensor, last: Tensor) -> Tensor:
    """Heads [..., N, H] with `last` [...] in place of their last coordinate.

    Not by `F.pad`: of what the same kernel has just stored, PyTorch 2.11's compiler for GPUs pads nothing
    (pytorch/pytorch#189895).
    """
    is_last_H = torch.arange(x.shape[-1], device=x.device) == x.shape[-1] - 1
    return torch.where(is_last_H, last[..., None, None], x)
