"""A transformer block: pre-norm attention and a squared-ReLU MLP."""

import torch.nn.functional as F
from torch import Tensor, nn

from lepton.config import LeptonConfig
from lepton.model.attention import Attention, Linear, Rotary, norm
from lepton.model.timeline import Band


class MLP(nn.Module):
    """Squared-ReLU MLP (So et al., 2021: Primer)."""

    def __init__(self, config: LeptonConfig) -> None:
        super().__init__()
        self.up = Linear(config.width, config.ffn)
        self.down = Linear(config.ffn, config.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(F.relu(self.up(x_BTD)).square())


class Block(nn.Module):
    """Attention, then MLP, each added to the residual stream. Norms have no gains."""

    def __init__(self, config: LeptonConfig) -> None:
        super().__init__()
        self.attention = Attention(config)
        self.mlp = MLP(config)

    def forward(
        self, x_BTD: Tensor, past: tuple[Tensor, Tensor], rotary: Rotary, bands: list[Band]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return the new residual stream, and the chunk's keys and values [B, T, K, H]."""
        added_BTD, k_BTKH, v_BTKH = self.attention(norm(x_BTD), past, rotary, bands)
        x_BTD = x_BTD + added_BTD
        return x_BTD + self.mlp(norm(x_BTD)), k_BTKH, v_BTKH
