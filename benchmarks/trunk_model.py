"""The trunk on which changes are tried: a plain causal transformer, with a part for each switch of a `Trial`.

Without a switch it computes what the product's dense model does, with its operations and initial values, in training
alone: a row is one text, from its first token to its last. Shapes have the letters of `lepton.shapes`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.trunk_switches import LOGIT_CAP, Trial
from lepton.model.attention import Rotary
from lepton.model.block import MLP
from lepton.model.layers import Linear, norm, products
from lepton.model.parameters import (
    BACKOUT,
    BIAS,
    EMBEDDING,
    EMBEDDING_MATRIX,
    MATRIX,
    ZERO_MATRIX,
    Declared,
    initialise,
    normal,
)
from lepton.ops.cross_entropy import IGNORE, linear_cross_entropy
from lepton.ops.heads import rotate, shifted

GATE_INPUTS, SMEAR_INPUTS = 12, 24
"""Channels of a token, its first, that the gates of heads and of the previous token read."""
BOTTOM_SCALE, TOP_SCALE = 1.15, 1.05
BOTTOM_REINJECTION, TOP_REINJECTION = 0.2, 0.05
"""Initial values of the first and of the last block; those between lie on a line. These and the gated smear are ideas
of nanochat (Karpathy, 2025)."""


def constant(value: float) -> Declared:
    """Return the declaration of a learned number that begins as `value`."""
    return BIAS.but(initial=lambda tensor: nn.init.constant_(tensor, value))


def before(x_BTD: Tensor, tokens: int = 1) -> Tensor:
    """Return for each token what `x_BTD` is so many tokens before it; zeros where there is none."""
    return F.pad(x_BTD, (0, 0, tokens, 0))[:, : x_BTD.shape[1]]


class ShortConvolution(nn.Module):
    """A causal convolution with a filter for each channel, whose weight for the token itself stays 1."""

    declares = {"weight": BIAS}

    def __init__(self, channels: int, tokens: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(tokens - 1, channels))

    def forward(self, x_BTD: Tensor) -> Tensor:
        y_BTD = x_BTD
        for tokens, weight in enumerate(self.weight.to(x_BTD.dtype), 1):
            y_BTD = y_BTD + weight * before(x_BTD, tokens)
        return y_BTD


class GatedSmear(nn.Module):
    """Adds the previous token's embedding, times a gate of the token's first channels and one learned number."""

    declares = {"gate.weight": BIAS.but(initial=lambda weight: nn.init.uniform_(weight, 0, 0.02)), "share": BIAS}

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gate = Linear(min(width, SMEAR_INPUTS), 1)
        self.share = nn.Parameter(torch.empty(()))

    def forward(self, x_BTD: Tensor) -> Tensor:
        gate_BT1 = torch.sigmoid(self.gate(x_BTD[..., : self.gate.in_features]))
        return x_BTD + self.share.to(x_BTD.dtype) * gate_BT1 * before(x_BTD)


class ChannelSmear(nn.Module):
    """Adds the previous token's embedding, times a learned number for each channel (a form of RWKV's token shift)."""

    declares = {"share": BIAS}

    def __init__(self, width: int) -> None:
        super().__init__()
        self.share = nn.Parameter(torch.empty(width))

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD + self.share.to(x_BTD.dtype) * before(x_BTD)


SMEARS = {"none": lambda width: nn.Identity(), "gated": GatedSmear, "channels": ChannelSmear}


class Mix(nn.Module):
    """What a block does first: ``scale * x + again * embedding``, with each of the two numbers learned or left out."""

    def __init__(self, trial: Trial, layer: int) -> None:
        super().__init__()
        height = layer / max(1, trial.layers - 1)
        self.declares = {
            "scale": constant(BOTTOM_SCALE + (TOP_SCALE - BOTTOM_SCALE) * height),
            "again": constant(BOTTOM_REINJECTION + (TOP_REINJECTION - BOTTOM_REINJECTION) * height),
        }
        self.scale = nn.Parameter(torch.empty(())) if trial.residual_scale else None
        self.again = nn.Parameter(torch.empty(())) if trial.reinjection else None

    def forward(self, x_BTD: Tensor, first_BTD: Tensor) -> Tensor:
        scaled_BTD = x_BTD if self.scale is None else self.scale.to(x_BTD.dtype) * x_BTD
        return scaled_BTD if self.again is None else scaled_BTD + self.again.to(x_BTD.dtype) * first_BTD


class Attention(nn.Module):
    """Full causal attention over the tokens of a row."""

    declares = {
        "q.weight": MATRIX,
        "k.weight": MATRIX,
        "v.weight": MATRIX,
        "out.weight": ZERO_MATRIX,
        "head_gates.weight": BIAS,
    }

    def __init__(self, trial: Trial, layer: int) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.gain = trial.heads, trial.kv_heads, trial.query_gain
        self.shifted = trial.shifts_keys(layer)
        channels = trial.kv_heads * trial.head_dim
        self.q = Linear(trial.width, trial.heads * trial.head_dim)
        self.k = Linear(trial.width, channels)
        self.v = Linear(trial.width, channels)
        self.out = Linear(trial.heads * trial.head_dim, trial.width)
        self.key_conv, self.value_conv = (
            ShortConvolution(channels, trial.conv) if trial.conv > 1 else nn.Identity() for _ in range(2)
        )
        self.head_gates = Linear(min(trial.width, GATE_INPUTS), trial.heads) if trial.head_gates else None

    def forward(self, x_BTD: Tensor, rotary: Rotary) -> Tensor:
        """Return the output of the layer for the normed stream."""
        q, k, v = products(x_BTD, self.q, self.k, self.v)
        k, v = self.key_conv(k), self.value_conv(v)
        q_BTNH = self.gain * rotate(norm(q.unflatten(-1, (self.heads, -1))), rotary.cos, rotary.sin)
        k_BTKH = rotate(norm(k.unflatten(-1, (self.kv_heads, -1))), rotary.cos, rotary.sin)
        if self.shifted:
            starts_BT = torch.arange(k.shape[1], device=k.device).expand(k.shape[:2]) == 0
            k_BTKH = shifted(k_BTKH, starts_BT)
        v_BTKH = v.unflatten(-1, (self.kv_heads, -1))
        y_BTNH = F.scaled_dot_product_attention(
            q_BTNH.transpose(1, 2),
            k_BTKH.transpose(1, 2),
            v_BTKH.transpose(1, 2),
            is_causal=True,
            enable_gqa=self.heads != self.kv_heads,
        ).transpose(1, 2)
        if self.head_gates is not None:
            gates_BTN = 2 * torch.sigmoid(self.head_gates(x_BTD[..., : self.head_gates.in_features]))
            y_BTNH = y_BTNH * gates_BTN[..., None]
        return self.out(y_BTNH.flatten(-2))


class TrunkBlock(nn.Module):
    """Attention, then MLP, each added to the stream."""

    def __init__(self, trial: Trial, layer: int) -> None:
        super().__init__()
        self.mix = Mix(trial, layer)
        self.attention = Attention(trial, layer)
        self.mlp = MLP(trial.width, trial.ffn)

    def forward(self, x_BTD: Tensor, first_BTD: Tensor, rotary: Rotary) -> Tensor:
        """Return the stream after the block; `first_BTD` is the stream before the first one."""
        x_BTD = self.mix(x_BTD, first_BTD)
        x_BTD = x_BTD + self.attention(norm(x_BTD), rotary)
        return x_BTD + self.mlp(norm(x_BTD))


class TrunkModel(nn.Module):
    """The model of a trial. Parameters are fp32; activations have `dtype`, the softmax of the loss fp32."""

    def __init__(self, trial: Trial, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.trial, self.dtype = trial, dtype
        width, rank = trial.width, trial.embed_rank or trial.width
        self.declares = {
            "embed.weight": EMBEDDING.but(initial=normal(trial.embed_std)),
            "head.weight": EMBEDDING.but(initial=normal(trial.head_std)),
            "embed_up.weight": EMBEDDING_MATRIX,
            "head_down.weight": EMBEDDING_MATRIX,
            "backout": BACKOUT,
        }
        self.embed = nn.Embedding(trial.padded_vocab_size, rank)
        self.embed_up = Linear(rank, width) if trial.embed_rank else nn.Identity()
        self.smear = SMEARS[trial.smear](width)
        self.blocks = nn.ModuleList(TrunkBlock(trial, layer) for layer in range(trial.layers))
        self.backout = nn.Parameter(torch.empty(1)) if trial.backout else None
        self.head_down = Linear(width, rank) if trial.embed_rank else nn.Identity()
        self.head = None if trial.tied else Linear(rank, trial.padded_vocab_size)
        initialise(self)

    def hidden(self, tokens_BT: Tensor) -> Tensor:
        """Return what the head reads, [B, T, E]."""
        trial = self.trial
        pairs = int(trial.head_dim * trial.rotary_share) // 2
        position_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        rotary = Rotary.at(position_T, 4 * pairs, trial.rope_base, self.dtype)  # of a quarter as many pairs
        x_BTD = self.smear(norm(self.embed_up(self.embed(tokens_BT.long()).to(self.dtype))))
        first_BTD = middle_BTD = x_BTD
        for layer, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, first_BTD, rotary)
            if layer == trial.layers // 2:
                middle_BTD = x_BTD
        if self.backout is not None:
            x_BTD = x_BTD - self.backout.to(x_BTD.dtype) * middle_BTD
        return self.head_down(norm(x_BTD))

    def loss(self, tokens_BX: Tensor, lengths_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the loss to differentiate, the mean cross-entropy in nats, and that of each target [B, T].

        Row b of `tokens_BX`, integers [B, T + 1], predicts its tokens 1 .. lengths_B[b] - 1; the others' nats are 0.
        """
        index_T = torch.arange(1, tokens_BX.shape[1], device=tokens_BX.device)
        following_BT = tokens_BX[:, 1:].long().masked_fill(index_T >= lengths_B[:, None], IGNORE)
        loss, ce, _, nats_M = linear_cross_entropy(
            self.hidden(tokens_BX[:, :-1]).flatten(0, 1),
            (self.embed if self.head is None else self.head).weight,
            following_BT.flatten(),
            vocab_size=self.trial.vocab_size,
            cap=LOGIT_CAP,
        )
        return loss, ce, nats_M.view(following_BT.shape)
