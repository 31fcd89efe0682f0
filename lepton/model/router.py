"""Sparse depth routing: which tokens go past the stem, and how the others leave.

One score a token, read off the stem state: the nats that depth is expected to save. With a depth in 0..1, a token
goes on if its score is above the quantile that leaves that share, and fewer than `SLACK` x depth x window earlier
tokens of the current window wanted to: first come, a running count, causal, no top-k over a sequence and no
statistics of a batch. Router and exit learn from stopped gradients, so the trunk never pays for them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lepton.config import LeptonConfig
from lepton.model.attention import Linear, norm
from lepton.model.timeline import Timeline

# A window may take this much more than its share, since hard tokens come in bursts.
SLACK = 1.5
QUANTILES = 65


class Router(nn.Module):
    """The score, the table of its quantiles, and the exit of easy tokens."""

    quantiles: Tensor

    def __init__(self, config: LeptonConfig) -> None:
        super().__init__()
        self.window = config.capacity_window
        self.benefit = nn.Linear(config.width, 1)
        self.exit_up = Linear(config.width, config.exit_width)
        self.exit_down = Linear(config.exit_width, config.width)
        # Scores at the quantiles 0, 1/64, ..., 1, measured by `lepton calibrate`. Until then: those of unit normal
        # scores, which is what the initial weights make of normed states.
        self.register_buffer("quantiles", torch.empty(QUANTILES))

    def score(self, u_BTD: Tensor) -> Tensor:
        """Nats [..., ] that going deep is expected to save, of normed stem states, in fp32 or better."""
        precise = torch.promote_types(u_BTD.dtype, torch.float32)
        raw = F.linear(u_BTD.detach(), self.benefit.weight.to(u_BTD.dtype))[..., 0]
        return raw.to(precise) + self.benefit.bias.to(precise)

    def exit(self, x: Tensor) -> Tensor:
        """Return the last state of tokens that stop after the stem. No gradient flows on."""
        x = x.detach()
        return x + self.exit_down(F.relu(self.exit_up(norm(x))).square())

    def threshold(self, depth: float) -> Tensor:
        """The score above which a share `depth` of tokens lies, interpolated in the table."""
        place = (1 - depth) * (QUANTILES - 1)
        left = min(int(place), QUANTILES - 2)
        return torch.lerp(self.quantiles[left], self.quantiles[left + 1], place - left)

    def choose(self, score_BT: Tensor, depth: float, taken_B: Tensor, timeline: Timeline) -> tuple[Tensor, Tensor]:
        """Return which tokens go deep [B, T], and how many up to each of them wanted to in its window [B, T].

        `taken_B` is that count on entry. At depth 1 every token wants to and may; at 0 none does.
        """
        if depth >= 1:
            wants_BT = torch.ones_like(score_BT, dtype=torch.bool)
        elif depth <= 0:
            wants_BT = torch.zeros_like(score_BT, dtype=torch.bool)
        else:
            wants_BT = score_BT > self.threshold(depth).to(score_BT.dtype)
        capacity = math.ceil(SLACK * depth * self.window) if depth < 1 else self.window
        window_BT = timeline.position_BT // self.window
        on_entry_BT = (timeline.document_BT == 0) & (window_BT == (timeline.start_B // self.window)[:, None])
        total_BT = wants_BT.long().cumsum(1)
        index_T = torch.arange(score_BT.shape[1], device=score_BT.device)
        # The count restarts where a window of the document begins: subtract what stood before it in the chunk.
        begins_BT = timeline.position_BT % self.window == 0
        begun_BT = torch.where(begins_BT, index_T, -1).cummax(1).values
        before_BT = (total_BT - wants_BT.long()).gather(1, begun_BT.clamp(min=0)) * (begun_BT >= 0)
        count_BT = total_BT - before_BT + on_entry_BT * (begun_BT < 0) * taken_B[:, None]
        return wants_BT & (count_BT <= capacity), count_BT


def taken_after(taken_BT: Tensor, count_B: Tensor, taken_B: Tensor, timeline: Timeline, window: int) -> Tensor:
    """Return the running count of `Router.choose` once the first `count_B` tokens are read."""
    inside_B = timeline.position_after(count_B) % window > 0
    return timeline.at(taken_BT, count_B, taken_B) * inside_B
