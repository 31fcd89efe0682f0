"""Crystals: the best tokens of each closed segment, kept as columns after the window has moved on.

A learned score rates every token. When a segment closes (lazily: when the next one opens) its best few enter a store
of fixed size, and the lowest leave. Priorities are quantised scores, ties to the later position: equal tokens in
repetitive text have scores that are equal only up to rounding, which would let a chunk's cut decide. Without age decay
the store is simply the best of all candidates so far, so any number of closings is one sort.

A crystal is the raw stem state of its token. It appears once its token has left the window, as a key/value column of
the deep blocks with the log-score as bias.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lepton.config import IdeaConfig, LeptonConfig
from lepton.errors import InputError
from lepton.model.attention import Slots
from lepton.model.ideas.idea import LONGEST, Contribution, Flow, Idea, Work, matrices, segment_within_window
from lepton.model.layers import norm
from lepton.model.parameters import BIAS, SCORE
from lepton.model.timeline import Timeline

# Steps of a score: a discrete choice may only depend on differences well above rounding.
QUANTUM = 1024
# Token ids that a crystal keeps, its own last, so that it can be shown as text.
CONTEXT = 16
# Position of a place without a crystal. Crystals carried over from another stream have negative positions.
EMPTY = -(1 << 40)


@dataclass(frozen=True, kw_only=True)
class CrystalsConfig(IdeaConfig):
    """The crystals."""

    slots: int = 64
    """Crystals that are kept."""
    per_segment: int = 4
    """Crystals that a closing segment offers."""

    name = "crystals"
    most = {"slots": 1 << 16, "per_segment": 1024}
    flat = {"slots": "slots", "crystals": "per_segment"}
    flat_switch = "slots"

    def check(self, config: LeptonConfig) -> None:
        self.at_least(1, "slots", "per_segment")
        if config.window is None:
            raise InputError("crystals appear where the window ends: give a window, or leave crystals out")
        segment_within_window(config)

    def build(self, config: LeptonConfig) -> "Crystals":
        return Crystals(config, self)


class Crystal(NamedTuple):
    """One crystal, as a person looks at it."""

    row: int
    """Sequence of the batch."""
    position: int
    """Where its token stands in the document; negative if it was carried over from an earlier stream."""
    score: float
    """What the model gave it, in 0..1."""
    tokens: list[int]
    """The token and up to 15 before it."""


@dataclass(frozen=True)
class RatedTokens:
    """Some crystals of each row, [B, C, ...]. Empty places come last and hold zeros, position `EMPTY` and ids -1."""

    states_BCD: Tensor
    log_score_BC: Tensor
    position_BC: Tensor
    ids_BCX: Tensor

    @staticmethod
    def empty(rows: int, count: int, width: int, dtype: torch.dtype, device: torch.device) -> "RatedTokens":
        """No crystals in `count` places."""
        precise = torch.promote_types(dtype, torch.float32)
        return RatedTokens(
            torch.zeros(rows, count, width, dtype=dtype, device=device),
            torch.zeros(rows, count, dtype=precise, device=device),
            torch.full((rows, count), EMPTY, device=device),
            torch.full((rows, count, CONTEXT), -1, device=device),
        )

    def take(self, index_BC: Tensor, keep_BC: Tensor) -> "RatedTokens":
        """Return the columns `index_BC`; those that are not kept become empty."""
        values = [_gather(getattr(self, field.name), index_BC) for field in fields(self)]
        blanks = (0, 0, EMPTY, -1)
        kept = [
            value.masked_fill(~keep_BC.view(*keep_BC.shape, *[1] * (value.dim() - 2)), blank)
            for value, blank in zip(values, blanks, strict=True)
        ]
        return RatedTokens(*kept)

    def join(self, other: "RatedTokens") -> "RatedTokens":
        """Return both side by side."""
        return RatedTokens(*(torch.cat([getattr(part, f.name) for part in (self, other)], 1) for f in fields(self)))

    def cleared(self) -> "RatedTokens":
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


def best_of_groups(priority_BJ: Tensor, group_BJ: Tensor, groups: int, count: int) -> tuple[Tensor, Tensor]:
    """Return the indices [B, G * count] of the `count` highest of each group, oldest first, and which of them exist.

    Elements come in order of position; those of lowest possible priority do not take part.
    """
    lowest = torch.iinfo(torch.int64).min
    group_BJ = torch.where(priority_BJ > lowest, group_BJ, groups)
    by_priority = priority_BJ.argsort(dim=1, descending=True, stable=True)
    by_group = group_BJ.gather(1, by_priority).argsort(dim=1, stable=True)
    order_BJ = by_priority.gather(1, by_group)
    sorted_group_BJ = group_BJ.gather(1, order_BJ)
    first_BJ = torch.searchsorted(sorted_group_BJ, sorted_group_BJ)
    rank_BJ = torch.arange(order_BJ.shape[1], device=order_BJ.device) - first_BJ
    chosen_BJ = (rank_BJ < count) & (sorted_group_BJ < groups)
    chosen_BJ = torch.zeros_like(chosen_BJ).scatter(1, order_BJ, chosen_BJ)
    # Each group's chosen, in order of position, fill its places from the left.
    within_BJ = _count_in_group(chosen_BJ, group_BJ, groups)
    place_BJ = torch.where(chosen_BJ, group_BJ * count + within_BJ, groups * count)
    rows, elements = order_BJ.shape
    index = torch.zeros(rows, groups * count + 1, dtype=torch.int64, device=order_BJ.device)
    source = torch.arange(elements, device=order_BJ.device).expand(rows, -1)
    filled = torch.zeros_like(index, dtype=torch.bool).scatter(1, place_BJ, True)
    return index.scatter(1, place_BJ, source)[:, :-1], filled[:, :-1]


def _count_in_group(chosen_BJ: Tensor, group_BJ: Tensor, groups: int) -> Tensor:
    """How many chosen elements of the same group stand before each element. Groups never decrease along the chosen."""
    before_BJ = chosen_BJ.cumsum(1) - chosen_BJ.long()
    totals_BG = before_BJ.new_zeros(len(before_BJ), groups + 1).scatter_add(1, group_BJ, chosen_BJ.long())
    starts_BG = totals_BG.cumsum(1) - totals_BG
    return before_BJ - starts_BG.gather(1, group_BJ)


class Crystals(Idea):
    """The score, and which crystals a chunk's tokens see."""

    name = "crystals"
    opens = True
    old_names = {"memory.store.": "memory.crystals.", "store.": "crystals."}
    declares = {"score.weight": SCORE, "score.bias": BIAS}

    def __init__(self, config: LeptonConfig, own: CrystalsConfig) -> None:
        super().__init__()
        assert config.window is not None
        self.window, self.slots, self.count = config.window, own.slots, own.per_segment
        self.score = nn.Linear(config.width, 1)

    def fresh(self, rows: int, dtype: torch.dtype, device: torch.device, *, allocate: bool) -> "Store":
        width = self.score.in_features
        kept = RatedTokens.empty(rows, self.slots if allocate else 0, width, dtype, device)
        pending = RatedTokens.empty(rows, self.count, width, dtype, device)
        return Store(kept, pending, torch.full((rows, CONTEXT - 1), -1, device=device))

    def limits(self, config: LeptonConfig) -> dict[str, tuple[float, float]]:
        """Crystals are ranked by numbers that hold a position in 31 bits."""
        ids = (-1, config.vocab_size - 1)
        scores = (-torch.inf, 0)
        return {"log_score_BC": scores, "position_BC": (EMPTY, LONGEST), "ids_BCX": ids, "ids_BR": ids}

    def carried(self, past: "Store", fresh: "Store") -> "Store":
        """Return the store as a new stream starts with it."""
        return past.carried(self.window)

    def contribute(self, flow: Flow, past: "Store") -> Contribution:
        """Rate the tokens, and show the crystals that have left the window."""
        slots, record = self(flow.h_BTD, flow.u_BTD, flow.tokens_BT, past, flow.timeline)
        return Contribution(slots=slots, update=record)

    def slots_of(self, groups: int) -> int:
        return (groups + 1) * self.count

    def flops(self, work: Work) -> float:
        return work.length * matrices(self)

    def forward(
        self, h_BTD: Tensor, u_BTD: Tensor, tokens_BT: Tensor, past: "Store", timeline: Timeline
    ) -> tuple[Slots, "CrystalUpdate"]:
        """Rate the stem states `h_BTD` (normed: `u_BTD`) and lay out the columns that the deep blocks see."""
        score_BT = F.linear(u_BTD, self.score.weight.to(u_BTD.dtype))[..., 0]
        precise = torch.promote_types(u_BTD.dtype, torch.float32)
        log_score_BT = F.logsigmoid(score_BT.to(precise) + self.score.bias.to(precise))
        history_BJ = torch.cat([past.ids_BR, tokens_BT.long()], 1)
        ids_BTX = history_BJ.unfold(1, CONTEXT, 1)
        age_X = torch.arange(CONTEXT - 1, -1, -1, device=tokens_BT.device)
        ids_BTX = ids_BTX.masked_fill(age_X > timeline.position_BT[..., None], -1)
        chunk = RatedTokens(h_BTD, log_score_BT, timeline.position_BT, ids_BTX)
        record = CrystalUpdate(self.slots, self.count, past, chunk, history_BJ, timeline)
        columns, alive_BGC = record.columns(None)
        alive_BTC = _gather(alive_BGC, timeline.group_BT)
        age_BTC = timeline.position_BT[:, :, None] - columns.position_BC[:, None]
        mask_BTC = alive_BTC & (age_BTC >= self.window)
        return Slots(norm(columns.states_BCD), mask_BTC, columns.log_score_BC), record


@dataclass(frozen=True)
class Store:
    """The crystals of the past: those kept, the open segment's best so far, and the last token ids."""

    kept: RatedTokens
    pending: RatedTokens
    ids_BR: Tensor
    """The last 15 ids, -1 before the document."""

    outlives_window = True

    def __iter__(self) -> Iterator[Crystal]:
        kept = self.kept
        for row, index in (kept.position_BC > EMPTY).nonzero().tolist():
            ids = [token for token in kept.ids_BCX[row, index].tolist() if token >= 0]
            position, score = int(kept.position_BC[row, index]), kept.log_score_BC[row, index].exp().item()
            yield Crystal(row, position, score, ids)

    def cleared(self) -> "Store":
        """Return the store without a crystal."""
        return Store(self.kept.cleared(), self.pending.cleared(), self.ids_BR)

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
        kept = RatedTokens(kept.states_BCD, kept.log_score_BC, position_BC, kept.ids_BCX)
        return Store(kept, self.pending.cleared(), torch.full_like(self.ids_BR, -1))


@dataclass(frozen=True)
class CrystalUpdate:
    """A chunk's candidates, from which the store after any prefix follows."""

    slots: int
    """Crystals that the store keeps."""
    count: int
    """Crystals that a segment offers."""
    past: Store
    chunk: RatedTokens
    history_BJ: Tensor
    timeline: Timeline

    def columns(self, count_B: Tensor | None) -> tuple[RatedTokens, Tensor]:
        """Return all columns [kept; best of group 0, 1, ...] of the first `count_B` tokens (None: all), and which of
        them are in the store while each group is open: alive [B, G, C].
        """
        timeline, count = self.timeline, self.count
        length = timeline.group_BT.shape[1]
        groups = timeline.opening_BG.shape[1] + 1
        offered = self.past.pending.join(self.chunk)
        zeros_BR = torch.zeros_like(self.past.pending.position_BC)
        group_BJ = torch.cat([zeros_BR, timeline.group_BT], 1)
        document_BJ = torch.cat([zeros_BR, timeline.document_BT], 1)
        priority_BJ = offered.priority()
        if count_B is not None:
            read_BT = torch.arange(length, device=count_B.device) < count_B[:, None]
            read_BJ = torch.cat([torch.ones_like(zeros_BR, dtype=torch.bool), read_BT], 1)
            priority_BJ = priority_BJ.masked_fill(~read_BJ, torch.iinfo(torch.int64).min)
        index_BC, filled_BC = best_of_groups(priority_BJ, group_BJ, groups, count)
        columns = self.past.kept.join(offered.take(index_BC, filled_BC))
        # Which document each column and each group belongs to, and since which group a column may be in the store.
        slots = self.past.kept.position_BC.shape[1]
        document_BC = F.pad(document_BJ.gather(1, index_BC), (slots, 0))
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
        stays_BGC = sorted_BGC & (sorted_BGC.cumsum(2) <= self.slots)
        alive_BGC = torch.zeros_like(stays_BGC).scatter(2, order_BC[:, None].expand(-1, groups, -1), stays_BGC)
        return columns, alive_BGC

    def after(self, count_B: Tensor, timeline: Timeline) -> Store:
        """Return the store once the first `count_B` tokens are read."""
        columns, alive_BGC = self.columns(count_B)
        group_B = self.timeline.at(self.timeline.group_BT, count_B, 0)
        goes_on_B1 = ~self.timeline.ended(count_B)[:, None]
        position_B = self.timeline.position_after(count_B)
        kept_BC = alive_BGC[torch.arange(len(group_B), device=group_B.device), group_B] & goes_on_B1
        slots, count = self.slots, self.count
        place_C = (
            torch.arange(columns.position_BC.shape[1], device=group_B.device) - self.past.kept.position_BC.shape[1]
        )
        pending_BC = (
            (place_C >= 0) & (place_C // count == group_B[:, None]) & (columns.position_BC > EMPTY) & goes_on_B1
        )
        index_BR = count_B[:, None] + torch.arange(CONTEXT - 1, device=count_B.device)
        in_document_BR = torch.arange(CONTEXT - 1, device=count_B.device) >= CONTEXT - 1 - position_B[:, None]
        ids_BR = self.history_BJ.gather(1, index_BR).masked_fill(~in_document_BR, -1)
        return Store(_oldest_first(columns, kept_BC, slots), _oldest_first(columns, pending_BC, count), ids_BR)


def _oldest_first(columns: RatedTokens, keep_BC: Tensor, places: int) -> RatedTokens:
    """Return the kept columns in order of position, then empty places, `places` in all."""
    missing = places - columns.position_BC.shape[1]
    if missing > 0:
        rows, _, width = columns.states_BCD.shape
        blank = RatedTokens.empty(rows, missing, width, columns.states_BCD.dtype, columns.states_BCD.device)
        columns, keep_BC = columns.join(blank), F.pad(keep_BC, (0, missing))
    position_BC = torch.where(keep_BC, columns.position_BC, torch.iinfo(torch.int64).max)
    index_BC = position_BC.argsort(dim=1, stable=True)[:, :places]
    return columns.take(index_BC, keep_BC.gather(1, index_BC))
