"""Where the tokens of a chunk stand: positions, documents, segments.

Shape suffixes here and in the whole package:
B rows, T tokens of the chunk, R remembered tokens before it (the past), J = R + T kv entries in all,
D width, N query heads, K key/value heads, H head width, L blocks, V vocabulary; G segments of the chunk, the one that
is open on entry first; S thought slots of a group; C slots beside the tokens; M positions picked from B x T.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from lepton.model.checks import check_range


@dataclass(frozen=True)
class Timeline:
    """Integers only; nothing here depends on a parameter."""

    position_BT: Tensor
    """Tokens of its own document that stand before each token."""
    ends_BT: Tensor
    """Whether the token ends its document (it is `eos_id`); it still belongs to it."""
    document_BT: Tensor
    """Ordinal of the token's document in the chunk; 0 continues the past."""
    since_BT: Tensor
    """Tokens since the last document start or requested opening."""
    group_BT: Tensor
    """Ordinal of the token's segment in the chunk; 0 is the one that is open on entry."""
    opening_BG: Tensor
    """Index of the token that opens each new segment (groups 1, 2, ...), -1 where a row has fewer."""
    start_B: Tensor
    """Position of the chunk's first token: how many tokens of its document the past already holds."""
    phase_B: Tensor
    """Tokens since the opening, modulo `segment`, on entry; 0 means that the first token opens a segment."""
    segment: int

    @staticmethod
    def read(
        tokens_BT: Tensor,
        start_B: Tensor,
        phase_B: Tensor,
        *,
        eos_id: int,
        segment: int,
        opens_BT: Tensor | None = None,
        groups: int | None = None,
    ) -> "Timeline":
        """Place a chunk that continues a document of which `start_B` tokens have been read.

        `opens_BT` requests openings. `groups` bounds the new segments of a row, for static shapes; None counts them.
        """
        index_T = torch.arange(tokens_BT.shape[1], device=tokens_BT.device)
        ends_BT = tokens_BT == eos_id
        first_BT = F.pad(ends_BT[:, :-1], (1, 0))
        position_BT = _since(first_BT, index_T, start_B)
        since_BT = _since(first_BT if opens_BT is None else first_BT | opens_BT, index_T, phase_B)
        open_BT = since_BT % segment == 0
        group_BT = open_BT.cumsum(1)
        if groups is None:
            groups = int(group_BT[:, -1].max())
        else:
            check_range(group_BT[:, -1], 0, groups, "more segments than `groups` allows:")
        # Tokens beyond the bound would be left without a group: the extra column catches what does not open.
        target_BT = torch.where(open_BT, group_BT - 1, groups).clamp(max=groups)
        opening_BG = torch.full((len(start_B), groups + 1), -1, device=index_T.device)
        opening_BG = opening_BG.scatter(1, target_BT, index_T.expand_as(target_BT))[:, :groups]
        return Timeline(
            position_BT, ends_BT, first_BT.cumsum(1), since_BT, group_BT, opening_BG, start_B, phase_B, segment
        )

    def at(self, value_BT: Tensor, count_B: Tensor, before: Tensor | int) -> Tensor:
        """Return `value_BT` of each row's last of `count_B` tokens, or `before` where there is none."""
        last_B = value_BT.gather(1, (count_B - 1).clamp(min=0)[:, None])[:, 0]
        return torch.where(count_B > 0, last_B, before)

    def ended(self, count_B: Tensor) -> Tensor:
        """Return whether the last of each row's `count_B` tokens ended its document, so that nothing of it goes on."""
        return self.at(self.ends_BT.long(), count_B, 0) > 0

    def position_after(self, count_B: Tensor) -> Tensor:
        """Return the position [B] that the next token has once the first `count_B` tokens are read."""
        return torch.where(self.ended(count_B), 0, self.at(self.position_BT + 1, count_B, self.start_B))

    def phase_after(self, count_B: Tensor) -> Tensor:
        """Return the phase [B] of the next token once the first `count_B` tokens are read."""
        return torch.where(self.ended(count_B), 0, self.at((self.since_BT + 1) % self.segment, count_B, self.phase_B))


def _since(restart_BT: Tensor, index_T: Tensor, before_B: Tensor) -> Tensor:
    """Tokens since the last restart of the row, or since `before_B` tokens before the chunk."""
    last_BT = torch.where(restart_BT, index_T, -1).cummax(1).values
    return torch.where(last_BT >= 0, index_T - last_BT, before_B[:, None] + index_T)
