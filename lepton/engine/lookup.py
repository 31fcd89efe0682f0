"""Drafts by lookup: where the newest tokens of a text stand in it a second time, what followed there is proposed.

Names and phrases recur in a text, and greedy text often runs in circles. The cell of the drafter sees one state and
knows nothing of the sort. Any token may be proposed: the model accepts only what it would have chosen itself. (Prompt
lookup decoding, Saxena 2023.)
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

REMEMBERED = 1024
"""Tokens of a text that are searched, the newest ones."""
MATCH = 4
"""Tokens that must recur. With fewer there are more matches, but what follows is seldom the same."""
NOTHING = -1
"""Stands before the first token of a text."""


def remembered(texts: Sequence[Sequence[int]], device: torch.device) -> Tensor:
    """Return the newest tokens of some texts, int32 [B, REMEMBERED]."""
    newest = [list(text[-REMEMBERED:]) for text in texts]
    longest = max(map(len, newest))  # what is before all texts is filled on the device
    rows = [[NOTHING] * (longest - len(text)) + text for text in newest]
    text_BT = torch.tensor(rows, dtype=torch.int32, device=device)
    return F.pad(text_BT, (REMEMBERED - longest, 0), value=NOTHING)


def appended(text_BL: Tensor, tokens_BT: Tensor, count_B: Tensor) -> Tensor:
    """Return the newest tokens [B, L] of texts that the first `count_B` of some tokens continue."""
    joined_BJ = torch.cat([text_BL, tokens_BT.to(text_BL.dtype)], 1)
    index_L = torch.arange(text_BL.shape[1], device=text_BL.device)
    return joined_BJ.gather(1, index_L + count_B[:, None])


def looked_up(text_BL: Tensor, drafts_BY: Tensor, never: int) -> Tensor:
    """Return drafts [B, Y] of what follows the texts: those that are given, where nothing better is found.

    Of several earlier places the latest counts. What followed there is repeated if it is short, as in a circle. Drafts
    with the id `never` are left as they were.
    """
    length, drafts = text_BL.shape[1], drafts_BY.shape[1]
    recent_BM = text_BL[:, -MATCH:]
    # Place i: whether the tokens at i .. i + MATCH - 1 are the newest ones; they themselves are left out.
    same_BI = (text_BL[:, :-1].unfold(1, MATCH, 1) == recent_BM[:, None]).all(2)
    after_I = torch.arange(MATCH, length, device=text_BL.device)
    after_B = torch.where(same_BI, after_I, 0).amax(1)
    found_B = (after_B > 0) & (recent_BM != NOTHING).all(1)
    period_B = length - after_B
    index_BY = after_B[:, None] + torch.arange(drafts, device=text_BL.device) % period_B[:, None]
    proposed_BY = text_BL.gather(1, index_BY).to(drafts_BY.dtype)
    found_B &= (proposed_BY != never).all(1)
    return torch.where(found_B[:, None], proposed_BY, drafts_BY)
