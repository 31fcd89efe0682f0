"""Speculative drafts: a small recurrent cell guesses the next tokens one after the other, for the model to verify.

The cell starts from the (detached) top state and is fed the embedding of the token just drafted (EAGLE, 2024;
recurrent drafter, 2024). It proposes only frequent tokens; what it cannot propose is reached through the residual of
the acceptance rule, so the output distribution stays exact. The trunk and the embedding never pay for it.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lepton.config import LeptonConfig
from lepton.model.layers import Linear, norm
from lepton.ops.cross_entropy import IGNORE, linear_cross_entropy

# Weight of each drafted token's loss against the one before it.
FADE = 0.8


class Drafter(nn.Module):
    """The cell, its way in and its way out to the rows of the shared embedding that it may propose."""

    ids: Tensor

    def __init__(self, config: LeptonConfig, embedding: int) -> None:
        super().__init__()
        width = config.draft_width
        self.count, self.cap, self.vocab_size = config.drafts, config.logit_cap, config.draft_vocab
        self.enter = Linear(config.width, width)
        self.token = Linear(embedding, width)
        self.up = Linear(2 * width, 2 * width)
        self.down = Linear(2 * width, width)
        self.leave = Linear(width, embedding)
        # Which tokens can be proposed, most frequent first; training sets them from its data.
        self.register_buffer("ids", torch.empty(config.draft_vocab, dtype=torch.int64))

    def begin(self, hidden: Tensor) -> Tensor:
        """Return the cell's state [..., W] at top states [..., D]."""
        return norm(self.enter(hidden.detach()))

    def step(self, state: Tensor, embedded: Tensor) -> Tensor:
        """Return the state after one more token, given its embedding [..., E]."""
        entered = torch.cat([state, norm(self.token(norm(embedded.detach())))], -1)
        return norm(state + self.down(F.relu(self.up(entered)).square()))

    def rows(self, embedding: nn.Embedding) -> Tensor:
        """The embeddings of the tokens that can be proposed, without gradient."""
        return embedding.weight.detach()[self.ids]

    def logits(self, state: Tensor, rows_VE: Tensor) -> Tensor:
        """Logits over `ids`, in fp32 or better."""
        raw = self.leave(state) @ rows_VE.to(state.dtype).T
        raw = raw.to(torch.promote_types(raw.dtype, torch.float32))
        return self.cap * torch.tanh(raw / self.cap)

    def loss(self, hidden_MD: Tensor, following_MX: Tensor, embedding: nn.Embedding) -> Tensor:
        """Faded mean cross-entropy of the drafts at M positions.

        `following_MX` are the 1 + `count` tokens after each position, `IGNORE` beyond its document; the first was
        sampled by the model itself, each next one is what the cell should have drafted.
        """
        rows_VE = self.rows(embedding).to(hidden_MD.dtype)  # once, and not with each draft
        place_V = torch.full((embedding.num_embeddings,), IGNORE, device=rows_VE.device)
        place_V = place_V.scatter(0, self.ids, torch.arange(self.vocab_size, device=rows_VE.device))
        known_MX = following_MX.clamp(min=0)
        target_MX = torch.where(following_MX >= 0, place_V[known_MX], IGNORE)
        state_MW, total, weights = self.begin(hidden_MD), torch.zeros((), device=rows_VE.device), 0.0
        for i in range(self.count):
            embedded_ME = F.embedding(known_MX[:, i], embedding.weight.detach()).to(state_MW.dtype)
            state_MW = self.step(state_MW, embedded_ME)
            loss, *_ = linear_cross_entropy(
                self.leave(state_MW),
                rows_VE,
                target_MX[:, i + 1],
                vocab_size=self.vocab_size,
                cap=self.cap,
                z_weight=0.0,
            )
            total, weights = total + FADE**i * loss, weights + FADE**i
        return total / weights
