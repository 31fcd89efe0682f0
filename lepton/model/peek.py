"""Future peek: a predicted hint about what comes. It reads the past; the future appears only in its loss.

The hint is a small MLP of the stem state, the memory's read and the current thought, and feeds back through a
projection that starts at zero. It is taught to point at a summary of the next tokens, the very next one excluded,
that a right-to-left pass over the embeddings makes. That loss stops at the hint's inputs: it shapes the hint and
costs the trunk nothing.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lepton.config import LeptonConfig
from lepton.model.layers import Linear, norm

# A token's share in the summary, against that of the token before it.
FADE = 0.8


class Peek(nn.Module):
    """The hint, its way back into the stream, and what reads the summary off it."""

    def __init__(self, config: LeptonConfig, inputs: int, embedding: int) -> None:
        super().__init__()
        self.up = Linear(inputs, 2 * config.hint)
        self.down = Linear(2 * config.hint, config.hint)
        self.back = Linear(config.hint, config.width)
        self.summary = Linear(config.hint, embedding)
        self.horizon = config.peek

    def hint(self, inputs_BTX: Tensor) -> Tensor:
        """Return the hint [B, T, hint]."""
        return norm(self.down(F.silu(self.up(inputs_BTX))))

    def loss(self, inputs_BTX: Tensor, embedded_BTE: Tensor, position_BT: Tensor) -> Tensor:
        """Mean 1 - cosine between what the hint says and the summary, over the tokens that have a future.

        `embedded_BTE` are the embeddings of the chunk's own tokens; both arguments are used without gradient.
        """
        target_BTE, has_BT = summary(embedded_BTE.detach().float(), position_BT, self.horizon)
        said_BTE = self.summary(self.hint(inputs_BTX.detach())).float()
        distance_BT = 1 - F.cosine_similarity(said_BTE, target_BTE, dim=-1)
        return (distance_BT * has_BT).sum() / has_BT.sum().clamp(min=1)


def summary(embedded_BTE: Tensor, position_BT: Tensor, horizon: int) -> tuple[Tensor, Tensor]:
    """Faded sum of the normed embeddings 2 .. horizon tokens ahead in the same document, and where there is any.

    Read from the right: each step to the left fades what is already there.
    """
    length = position_BT.shape[1]
    normed = norm(embedded_BTE)
    total = torch.zeros_like(normed)
    has_BT = torch.zeros_like(position_BT, dtype=torch.bool)
    for ahead in range(min(horizon, length - 1), 1, -1):
        same_BT = torch.zeros_like(has_BT)
        # In the same document exactly if the position grew by as much as the index.
        same_BT[:, : length - ahead] = position_BT[:, ahead:] == position_BT[:, : length - ahead] + ahead
        shifted = F.pad(normed[:, ahead:], (0, 0, 0, ahead))
        total = FADE * total + shifted * same_BT[..., None]
        has_BT = has_BT | same_BT
    return total, has_BT
