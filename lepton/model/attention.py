"""Attention: QK-normed, grouped-query, rotary on half of each head, over a sliding window."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lepton.config import LeptonConfig
from lepton.model.timeline import Band

NORM_EPS = 1e-6


def norm(x: Tensor) -> Tensor:
    """RMSNorm without gains, over the last dimension (Zhang and Sennrich, 2019)."""
    return F.rms_norm(x, (x.shape[-1],), eps=NORM_EPS)


class Linear(nn.Linear):
    """A matrix without bias that computes in its input's dtype; the parameter keeps its own."""

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight.to(x.dtype))


class Rotary:
    """Rotation angles of a chunk, for the first half of each head (Su et al., 2021).

    Angles are computed in fp64: at a million tokens fp32 is off by 0.016 rad.
    """

    def __init__(self, position_BT: Tensor, head_dim: int, base: float, dtype: torch.dtype) -> None:
        pairs = head_dim // 4
        exponent = torch.arange(pairs, dtype=torch.float64, device=position_BT.device) / pairs
        angle_BTH = position_BT[..., None].double() * base**-exponent
        self.cos_BT1H = angle_BTH.cos().to(dtype)[:, :, None]
        self.sin_BT1H = angle_BTH.sin().to(dtype)[:, :, None]

    def rotate(self, x_BTNH: Tensor) -> Tensor:
        """Rotate the first half of each head; the second half stays position-free."""
        pairs = self.cos_BT1H.shape[-1]
        first, second, rest = x_BTNH.split([pairs, pairs, x_BTNH.shape[-1] - 2 * pairs], -1)
        return torch.cat(
            [
                first * self.cos_BT1H - second * self.sin_BT1H,
                first * self.sin_BT1H + second * self.cos_BT1H,
                rest,
            ],
            -1,
        )


def attend(q_BTNH: Tensor, k_BJKH: Tensor, v_BJKH: Tensor, bands: list[Band]) -> Tensor:
    """Softmax attention of each band over the columns it can see; returns [B, T, N, H]."""
    group = q_BTNH.shape[2] // k_BJKH.shape[2]
    q_BNTH = q_BTNH.transpose(1, 2)
    k_BNJH = k_BJKH.transpose(1, 2).repeat_interleave(group, 1)
    v_BNJH = v_BJKH.transpose(1, 2).repeat_interleave(group, 1)
    answers = [
        F.scaled_dot_product_attention(
            q_BNTH[:, :, band.queries], k_BNJH[:, :, band.columns], v_BNJH[:, :, band.columns], attn_mask=band.mask_B1TJ
        )
        for band in bands
    ]
    return torch.cat(answers, 2).transpose(1, 2)


class Attention(nn.Module):
    """Projections of one attention layer. Its past is an argument."""

    def __init__(self, config: LeptonConfig) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = config.heads, config.kv_heads, config.head_dim
        self.q = Linear(config.width, config.heads * config.head_dim)
        self.k = Linear(config.width, config.kv_heads * config.head_dim)
        self.v = Linear(config.width, config.kv_heads * config.head_dim)
        self.out = Linear(config.heads * config.head_dim, config.width)

    def forward(
        self, x_BTD: Tensor, past: tuple[Tensor, Tensor], rotary: Rotary, bands: list[Band]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return what attention adds to `x_BTD` (already normed), and the chunk's keys and values [B, T, K, H]."""
        q_BTNH = rotary.rotate(norm(self.q(x_BTD).unflatten(-1, (self.heads, self.head_dim))))
        k_BTKH = rotary.rotate(norm(self.k(x_BTD).unflatten(-1, (self.kv_heads, self.head_dim))))
        v_BTKH = self.v(x_BTD).unflatten(-1, (self.kv_heads, self.head_dim))
        past_k_BRKH, past_v_BRKH = past
        k_BJKH = torch.cat([past_k_BRKH, k_BTKH], 1)
        v_BJKH = torch.cat([past_v_BRKH, v_BTKH], 1)
        answer_BTNH = attend(q_BTNH, k_BJKH, v_BJKH, bands)
        return self.out(answer_BTNH.flatten(2)), k_BTKH, v_BTKH
