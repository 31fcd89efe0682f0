"""Crystals: the best tokens of each closed segment, kept as columns after the window has moved on.

A learned score rates every token. When a segment closes (lazily: when the next one opens) its best few enter a store
of fixed size, and the lowest leave. Priorities are quantised scores, ties to the later position: equal tokens in
repetitive text have scores that are equal only up to rounding, which would let a chunk's cut decide. Without age decay
the store is simply the best of all candidates so far, so any number of closings is one sort.

A crystal is the raw stem state of its token. It appears once its token has left the window, as a key/value column of
the deep blocks with the log-score as bias.
"""

from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lepton.config import LeptonConfig
from lepton.model.attention import Slots
from lepton.model.layers import norm
from lepton.model.timeline import Timeline

# Steps of a score: a discrete choice may only depend on differences well above rounding.
QUANTUM = 1024
# Token ids that a crystal keeps, its own last, so that it can be shown as text.
CONTEXT = 16
# Position of a place without a crystal. Crystals carried over from another stream have negative positions.
EMPTY = -(1 << 40)


@dataclass(frozen=True)
class Columns:
    """Some crystals of each row, [B, C, ...]. Empty places come last and hold zeros, position `EMPTY` and ids -1."""

    states_BCD: Tensor
    log_score_BC: Tensor
    position_BC: Tensor
    ids_BCX: Tensor

    @staticmethod
    def empty(rows: int, count: int, width: int, dtype: torch.dtype, device: torch.device) -> "Columns":
        """No crystals in `count` places."""
        precise = torch.promote_types(dtype, torch.float32)
        return Columns(
            torch.zeros(rows, count, width, dtype=dtype, device=device),
            torch.zeros(rows, count, dtype=precise, device=device),
            torch.full((rows, count), EMPTY, device=device),
            torch.full((rows, count, CONTEXT), -1, device=device),
        )

    def take(self, index_BC: Tensor, keep_BC: Tensor) -> "Columns":
        """Return the columns `index_BC`; those that are not kept become empty."""
        values = [_gather(getattr(self, field.name), index_BC) for field in fields(self)]
        blanks = (0, 0, EMPTY, -1)
        kept = [
            value.masked_fill(~keep_BC.view(*keep_BC.shape, *[1] * (value.dim() - 2)), blank)
            for value, blank in zip(values, blanks, strict=True)
        ]
        return Columns(*kept)

    def join(self, other: "Columns") -> "Columns":
        """Return both side by side."""
        return Columns(*(torch.cat([getattr(part, f.name) for part in (self, other)], 1) for f in fields(self)))

    def cleared(self) -> "Columns":
        """Return as many empty places."""
        nothing_BC = torch.zeros_like(self.position_BC)
        return self.take(nothing_BC, nothing_BC.bool())

    def priority(self) -> Tensor:
        """Rank of each column, int64 [B, C]: quantised score, ties to the later position; empty ones lowest."""
        key_BC = (self.log_score_BC.detach() * QUANTUM).round().long().clamp(min=-(1 << 30))
        return torch.where(self.position_BC > EMPTY, (key_BC << 31) + self.position_BC, torch.iinfo(torch.int64).min)


def _gather(value: Tensor, index_BC: Tensor) -> Tensor:
    index = index_BC.view(*index_BC.shape, *[1] * (value.dim() - 2)).expand(-1, -1, *value.shape[2:])
    return value.gather(1, index)


def best_of_groups(priority_BE: Tensor, group_BE: Tensor, groups: int, count: int) -> tuple[Tensor, Tensor]:
    """Return the indices [B, G * count] of the `count` highest of each group, oldest first, and which of them exist.

    Elements come in order of position; those of lowest possible priority do not take part.
    """
    lowest = torch.iinfo(torch.int64).min
    group_BE = torch.where(priority_BE > lowest, group_BE, groups)
    by_priority = priority_BE.argsort(dim=1, descending=True, stable=True)
    by_group = group_BE.gather(1, by_priority).argsort(dim=1, stable=True)
    order_BE = by_priority.gather(1, by_group)
    sorted_group_BE = group_BE.gather(1, order_BE)
    first_BE = torch.searchsorted(sorted_group_BE, sorted_group_BE)
    rank_BE = torch.arange(order_BE.shape[1], device=order_BE.device) - first_BE
    chosen_BE = (rank_BE < count) & (sorted_group_BE < groups)
    chosen_BE = torch.zeros_like(chosen_BE).scatter(1, order_BE, chosen_BE)
    # Each group's chosen, in order of position, fill its places from the left.
    within_BE = _count_in_group(chosen_BE, group_BE, groups)
    place_BE = torch.where(chosen_BE, group_BE * count + within_BE, groups * count)
    rows, elements = order_BE.shape
    index = torch.zeros(rows, groups * count + 1, dtype=torch.int64, device=order_BE.device)
    source = torch.arange(elements, device=order_BE.device).expand(rows, -1)
    filled = torch.zeros_like(index, dtype=torch.bool).scatter(1, place_BE, True)
    return index.scatter(1, place_BE, source)[:, :-1], filled[:, :-1]


def _count_in_group(chosen_BE: Tensor, group_BE: Tensor, groups: int) -> Tensor:
    """How many chosen elements of the same group stand before each element. Groups never decrease along the chosen."""
    before_BE = chosen_BE.cumsum(1) - chosen_BE.long()
    totals_BG = before_BE.new_zeros(len(before_BE), groups + 1).scatter_add(1, group_BE, chosen_BE.long())
    starts_BG = totals_BG.cumsum(1) - totals_BG
    return before_BE - starts_BG.gather(1, group_BE)


class Crystals(nn.Module):
    """The score, and which crystals a chunk's tokens see."""

    def __init__(self, config: LeptonConfig) -> None:
        super().__init__()
        assert config.window is not None
        self.window, self.slots, self.count = config.window, config.slots, config.crystals
        self.score = nn.Linear(config.width, 1)

    def forward(
        self, h_BTD: Tensor, u_BTD: Tensor, tokens_BT: Tensor, past: "Store", timeline: Timeline
    ) -> tuple[Slots, "CrystalRun"]:
        """Rate the stem states `h_BTD` (normed: `u_BTD`) and lay out the columns that the deep blocks see."""
        score_BT = F.linear(u_BTD, self.score.weight.to(u_BTD.dtype))[..., 0]
        precise = torch.promote_types(u_BTD.dtype, torch.float32)
        log_score_BT = F.logsigmoid(score_BT.to(precise) + self.score.bias.to(precise))
        history_BX = torch.cat([past.ids_BX, tokens_BT.long()], 1)
        ids_BTX = history_BX.unfold(1, CONTEXT, 1)
        age_X = torch.arange(CONTEXT - 1, -1, -1, device=tokens_BT.device)
        ids_BTX = ids_BTX.masked_fill(age_X > timeline.position_BT[..., None], -1)
        chunk = Columns(h_BTD, log_score_BT, timeline.position_BT, ids_BTX)
        run = CrystalRun(self, past, chunk, history_BX, timeline)
        columns, alive_BGC = run.columns(None)
        alive_BTC = _gather(alive_BGC, timeline.group_BT)
        age_BTC = timeline.position_BT[:, :, None] - columns.position_BC[:, None]
        mask_BTC = alive_BTC & (age_BTC >= self.window)
        return Slots(norm(columns.states_BCD), mask_BTC, columns.log_score_BC), run


@dataclass(frozen=True)
class Store:
    """The crystals of the past: those kept, the open segment's best so far, and the last token ids."""

    kept: Columns
    pending: Columns
    ids_BX: Tensor
    """The last 15 ids, -1 before the document."""

    def carried(self, window: int) -> "Store":
        """Return the store as a new stream starts with it: nothing is open, and all of it is out of the window."""
        everything = self.kept.join(self.pending)
        places = self.kept.position_BC.shape[1]
        present_BC = everything.position_BC > EMPTY
        rank_BC = everything.priority().argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        kept = _oldest_first(everything, present_BC & (rank_BC < places), places)
        present_BC = kept.position_BC > EMPTY
        last_B1 = kept.position_BC.masked_fill(~present_BC, 0).amax(1, keepdim=True)
        position_BC = torch.where(present_BC, kept.position_BC - last_B1 - window, EMPTY)
        kept = Columns(kept.states_BCD, kept.log_score_BC, position_BC, kept.ids_BCX)
        return Store(kept, self.pending.cleared(), torch.full_like(self.ids_BX, -1))


@dataclass(frozen=True)
class CrystalRun:
    """A chunk's candidates, from which the store after any prefix follows."""

    module: Crystals
    past: Store
    chunk: Columns
    history_BX: Tensor
    timeline: Timeline

    def columns(self, count_B: Tensor | None) -> tuple[Columns, Tensor]:
        """Return all columns [kept; best of group 0, 1, ...] of the first `count_B` tokens (None: all), and which of
        them are in the store while each group is open: alive [B, G, C].
        """
        timeline, count = self.timeline, self.module.count
        length = timeline.group_BT.shape[1]
        groups = timeline.opening_BG.shape[1] + 1
        offered = self.past.pending.join(self.chunk)
        zeros_BC = torch.zeros_like(self.past.pending.position_BC)
        group_BE = torch.cat([zeros_BC, timeline.group_BT], 1)
        document_BE = torch.cat([zeros_BC, timeline.document_BT], 1)
        priority_BE = offered.priority()
        if count_B is not None:
            read_BT = torch.arange(length, device=count_B.device) < count_B[:, None]
            read_BE = torch.cat([torch.ones_like(zeros_BC, dtype=torch.bool), read_BT], 1)
            priority_BE = priority_BE.masked_fill(~read_BE, torch.iinfo(torch.int64).min)
        index_BC, filled_BC = best_of_groups(priority_BE, group_BE, groups, count)
        columns = self.past.kept.join(offered.take(index_BC, filled_BC))
        # Which document each column and each group belongs to, and since which group a column may be in the store.
        slots = self.past.kept.position_BC.shape[1]
        document_BC = F.pad(document_BE.gather(1, index_BC), (slots, 0))
        opening_BG = timeline.opening_BG
        opened_BG = timeline.document_BT.gather(1, opening_BG.clamp(min=0)).masked_fill(opening_BG < 0, -1)
        document_BG = F.pad(opened_BG, (1, 0))
        enters_C = 1 + torch.arange(groups, device=index_BC.device).repeat_interleave(count)
        enters_C = F.pad(enters_C, (slots, 0))
        group_G = torch.arange(groups, device=index_BC.device)
        eligible_BGC = (enters_C <= group_G[:, None]) & (columns.position_BC > EMPTY)[:, None]
        eligible_BGC = eligible_BGC & (document_BC[:, None] == document_BG[:, :, None])
        order_BC = columns.priority().argsort(dim=1, descending=True, stable=True)
        sorted_BGC = eligible_BGC.gather(2, order_BC[:, None].expand(-1, groups, -1))
        stays_BGC = sorted_BGC & (sorted_BGC.cumsum(2) <= self.module.slots)
        alive_BGC = torch.zeros_like(stays_BGC).scatter(2, order_BC[:, None].expand(-1, groups, -1), stays_BGC)
        return columns, alive_BGC

    def after(self, count_B: Tensor) -> Store:
        """Return the store once the first `count_B` tokens are read."""
        columns, alive_BGC = self.columns(count_B)
        group_B = self.timeline.at(self.timeline.group_BT, count_B, 0)
        goes_on_B1 = ~self.timeline.ended(count_B)[:, None]
        position_B = self.timeline.position_after(count_B)
        kept_BC = alive_BGC[torch.arange(len(group_B), device=group_B.device), group_B] & goes_on_B1
        slots, count = self.module.slots, self.module.count
        place_C = (
            torch.arange(columns.position_BC.shape[1], device=group_B.device) - self.past.kept.position_BC.shape[1]
        )
        pending_BC = (
            (place_C >= 0) & (place_C // count == group_B[:, None]) & (columns.position_BC > EMPTY) & goes_on_B1
        )
        index_BX = count_B[:, None] + torch.arange(CONTEXT - 1, device=count_B.device)
        in_document_BX = torch.arange(CONTEXT - 1, device=count_B.device) >= CONTEXT - 1 - position_B[:, None]
        ids_BX = self.history_BX.gather(1, index_BX).masked_fill(~in_document_BX, -1)
        return Store(_oldest_first(columns, kept_BC, slots), _oldest_first(columns, pending_BC, count), ids_BX)


def _oldest_first(columns: Columns, keep_BC: Tensor, places: int) -> Columns:
    """Return the kept columns in order of position, then empty places, `places` in all."""
    missing = places - columns.position_BC.shape[1]
    if missing > 0:
        rows, _, width = columns.states_BCD.shape
        blank = Columns.empty(rows, missing, width, columns.states_BCD.dtype, columns.states_BCD.device)
        columns, keep_BC = columns.join(blank), F.pad(keep_BC, (0, missing))
    position_BC = torch.where(keep_BC, columns.position_BC, torch.iinfo(torch.int64).max)
    index_BC = position_BC.argsort(dim=1, stable=True)[:, :places]
    return columns.take(index_BC, keep_BC.gather(1, index_BC))
