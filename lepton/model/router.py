"""Sparse depth routing: which tokens go past the stem, and how the others leave.

One score a token, read off the stem state: the nats that depth is expected to save. With a depth in 0..1, a token
wants to go on if its score is above the quantile that leaves that share. Whether it does is decided by a running count:
in each window of a document exactly the share, rounded, goes, and within it the count may run ahead of the share or
fall behind it by a quarter of a window. So the knob means the same compute for every text. It is causal, with no top-k
over a sequence and no statistics of a batch. Router and exit learn from stopped gradients, so the trunk never pays for
them.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lepton.config import LeptonConfig
from lepton.model.layers import Linear, norm
from lepton.model.timeline import Timeline

# Part of a window by which the count may run ahead or fall behind, since hard tokens come in bursts.
SLACK = 1 / 4
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
        """Return which tokens go deep [B, T], and how many up to each of them did in its window [B, T].

        `taken_B` is that count on entry.
        """
        place_BT = timeline.position_BT % self.window
        if depth >= 1:
            return torch.ones_like(score_BT, dtype=torch.bool), place_BT + 1
        if depth <= 0:
            return torch.zeros_like(score_BT, dtype=torch.bool), torch.zeros_like(place_BT)
        wants_BT = (score_BT > self.threshold(depth).to(score_BT.dtype)).long()
        least_BT, most_BT = self.bounds(depth, place_BT.device)[:, place_BT]
        # The count after a token is clamp(count before + wants, least, most). Such steps make such steps when joined,
        # (add, low, high) each, so the count after every token is a scan; where a window begins, no past counts.
        begins_BT = place_BT == 0
        start_BT = wants_BT.clamp(least_BT, most_BT)
        low_BT = torch.where(begins_BT, start_BT, least_BT)
        high_BT = torch.where(begins_BT, start_BT, most_BT)
        count_BT = running_clamp(wants_BT, low_BT, high_BT, taken_B)
        before_BT = torch.cat([taken_B[:, None], count_BT[:, :-1]], 1).masked_fill(begins_BT, 0)
        return count_BT > before_BT, count_BT

    def bounds(self, depth: float, device: torch.device) -> Tensor:
        """The least and the most tokens [2, window] that may have gone deep up to each place of a window."""
        place = torch.arange(self.window, device=device)
        share = depth * (place + 1).double()
        slack, whole = max(2, int(SLACK * self.window)), round(depth * self.window)
        least = torch.maximum((share - slack).ceil().long(), whole - (self.window - 1 - place)).clamp(min=0)
        most = (share + slack).floor().long().clamp(max=whole)
        return torch.stack([least, most])


def running_clamp(add_BT: Tensor, low_BT: Tensor, high_BT: Tensor, start_B: Tensor) -> Tensor:
    """Return x_t = clamp(x_(t-1) + add_t, low_t, high_t) for all t at once, with x_(-1) = `start_B`: [B, T]."""
    distance = 1
    while distance < add_BT.shape[1]:
        # Join each step with the one that ends where it begins: clamp(clamp(x + a, l, h) + add, low, high).
        a, low, high = (value[:, :-distance] for value in (add_BT, low_BT, high_BT))
        add, least, most = (value[:, distance:] for value in (add_BT, low_BT, high_BT))
        joined = (add + a, (low + add).clamp(least, most), (high + add).clamp(least, most))
        add_BT, low_BT, high_BT = (
            torch.cat([value[:, :distance], rest], 1)
            for value, rest in zip((add_BT, low_BT, high_BT), joined, strict=True)
        )
        distance *= 2
    return (start_B[:, None] + add_BT).clamp(low_BT, high_BT)


def taken_after(taken_BT: Tensor, count_B: Tensor, taken_B: Tensor, timeline: Timeline, window: int) -> Tensor:
    """Return the running count of `Router.choose` once the first `count_B` tokens are read."""
    inside_B = timeline.position_after(count_B) % window > 0
    return timeline.at(taken_BT, count_B, taken_B) * inside_B
