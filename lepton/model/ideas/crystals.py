"""Crystals: the best tokens of each closed segment, which the deep blocks attend to after they have left the window.

A learned score rates every token. When a segment closes, which is when the next one opens, its best few tokens enter a
store of fixed size, and the lowest leave it. The order is by quantised score, ties to the later position: in repetitive
text equal tokens have scores that differ only by rounding, and the way a text is cut into chunks must not decide which
is chosen. Scores do not decay with age, so the store is simply the best of all candidates so far, and any number of
closing segments is one sort.

A crystal is the stem state of its token. Once the token has left the window, the crystal is a slot of the deep blocks:
a key and a value, with the log-score added to its attention scores.
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
from lepton.model.ideas.idea import LONGEST, Contribution, Flow, Idea, Work, matrices
from lepton.model.layers import at_indices, norm
from lepton.model.parameters import BIAS, SCORE
from lepton.model.timeline import Timeline

QUANTUM = 1024
"""Quantisation steps per unit of log-score: a discrete choice may only depend on differences well above rounding."""
CONTEXT = 16
"""Token ids that a crystal carries (X), its own last, so that it can be shown as text."""
FEW = 256
"""Largest number of keys that are compared each with each."""
EMPTY = -(1 << 40)
"""Position of an empty entry. Crystals carried over from another stream have negative positions."""


@dataclass(frozen=True, kw_only=True)
class CrystalsConfig(IdeaConfig):
    """The crystals."""

    slots: int = 64
    """Largest number of crystals."""
    per_segment: int = 4
    """Tokens of a closing segment that may become crystals."""

    name = "crystals"
    most = {"slots": 1 << 16, "per_segment": 1024}
    flat = {"slots": "slots", "crystals": "per_segment"}
    flat_switch = "slots"

    def check(self, config: LeptonConfig) -> None:
        self.at_least(1, "slots", "per_segment")
        if config.window is None:
            raise InputError("crystals appear where the window ends: give a window, or leave crystals out")
        config.check_segment()

    def build(self, config: LeptonConfig) -> "Crystals":
        return Crystals(config, self)


class Crystal(NamedTuple):
    """One crystal, for people to look at."""

    row: int
    """Sequence of the batch."""
    position: int
    """Position of its token in the document; negative if it is from an earlier stream."""
    score: float
    """Score, in 0..1."""
    tokens: list[int]
    """The token and up to 15 before it."""


@dataclass(frozen=True)
class RatedTokens:
    """Rated tokens of each row, [B, C, ...]. Empty entries come last and hold zeros, position `EMPTY` and ids -1."""

    states_BCD: Tensor
    """Stem states."""
    log_score_BC: Tensor
    position_BC: Tensor
    ids_BCX: Tensor
    """The token's id and those before it, -1 before the document."""

    @staticmethod
    def empty(rows: int, count: int, width: int, dtype: torch.dtype, device: torch.device) -> "RatedTokens":
        """Return `count` empty entries per row."""
        precise = torch.promote_types(dtype, torch.float32)
        return RatedTokens(
            torch.zeros(rows, count, width, dtype=dtype, device=device),
            torch.zeros(rows, count, dtype=precise, device=device),
            torch.full((rows, count), EMPTY, device=device),
            torch.full((rows, count, CONTEXT), -1, device=device),
        )

    def take(self, index_BC: Tensor, keep_BC: Tensor) -> "RatedTokens":
        """Return the entries with indices `index_BC`; those where `keep_BC` is false become empty."""
        return RatedTokens(*(at_indices(getattr(self, each.name), index_BC) for each in fields(self))).where(keep_BC)

    def where(self, keep_BC: Tensor) -> "RatedTokens":
        """Return the entries where `keep_BC` ([B, C] or [B, 1]) is true, and empty ones in place of the others."""
        blanks = (0, 0, EMPTY, -1)
        values = (getattr(self, each.name) for each in fields(self))
        kept = (
            value.masked_fill(~keep_BC.view(*keep_BC.shape, *[1] * (value.dim() - 2)), blank)
            for value, blank in zip(values, blanks, strict=True)
        )
        return RatedTokens(*kept)

    def join(self, other: "RatedTokens") -> "RatedTokens":
        """Return the entries of both, concatenated."""
        return RatedTokens(*(torch.cat([getattr(part, f.name) for part in (self, other)], 1) for f in fields(self)))

    def cleared(self) -> "RatedTokens":
        """Return the same number of empty entries."""
        nothing_BC = torch.zeros_like(self.position_BC)
        return self.take(nothing_BC, nothing_BC.bool())

    def priority(self) -> Tensor:
        """Sort key of each entry, int64 [B, C]: quantised score, then position; lowest for empty entries."""
        key_BC = (self.log_score_BC.detach() * QUANTUM).round().long().clamp(min=-(1 << 30))
        return torch.where(self.position_BC > EMPTY, (key_BC << 31) + self.position_BC, torch.iinfo(torch.int64).min)


def order_of(key_BJ: Tensor, *, descending: bool = False) -> Tensor:
    """Return the indices that sort each row; equals stay in their order.

    A few keys are compared each with each: decoding has no more, and kernels that sort are slow, also to compile.
    """
    if key_BJ.shape[1] > FEW:
        return key_BJ.argsort(dim=1, descending=descending, stable=True)
    index_J = torch.arange(key_BJ.shape[1], device=key_BJ.device)
    first, second = key_BJ[:, :, None], key_BJ[:, None]
    before = second > first if descending else second < first
    place_BJ = (before | ((second == first) & (index_J < index_J[:, None]))).sum(2)
    return torch.zeros_like(place_BJ).scatter(1, place_BJ, index_J.expand_as(place_BJ))


def best_of_groups(priority_BJ: Tensor, group_BJ: Tensor, groups: int, count: int) -> tuple[Tensor, Tensor]:
    """Return the indices [B, groups x count] of the best `count` elements of each group, and which of them exist, bool.

    Elements are sorted by position, and so are those of each group in the result. Elements of the lowest int64 priority
    are never chosen.
    """
    lowest = torch.iinfo(torch.int64).min
    group_BJ = torch.where(priority_BJ > lowest, group_BJ, groups)
    by_priority = order_of(priority_BJ, descending=True)
    by_group = order_of(group_BJ.gather(1, by_priority))
    order_BJ = by_priority.gather(1, by_group)
    sorted_group_BJ = group_BJ.gather(1, order_BJ)
    first_BJ = (
        (sorted_group_BJ[:, None] < sorted_group_BJ[:, :, None]).sum(2)
        if sorted_group_BJ.shape[1] <= FEW
        else torch.searchsorted(sorted_group_BJ, sorted_group_BJ)
    )
    rank_BJ = torch.arange(order_BJ.shape[1], device=order_BJ.device) - first_BJ
    chosen_BJ = (rank_BJ < count) & (sorted_group_BJ < groups)
    chosen_BJ = torch.zeros_like(chosen_BJ).scatter(1, order_BJ, chosen_BJ)
    # The chosen elements of a group, sorted by position, fill its places from the left.
    within_BJ = _count_in_group(chosen_BJ, group_BJ, groups)
    place_BJ = torch.where(chosen_BJ, group_BJ * count + within_BJ, groups * count)
    rows, elements = order_BJ.shape
    index = torch.zeros(rows, groups * count + 1, dtype=torch.int64, device=order_BJ.device)
    source = torch.arange(elements, device=order_BJ.device).expand(rows, -1)
    filled = torch.zeros_like(index, dtype=torch.bool).scatter(1, place_BJ, True)
    return index.scatter(1, place_BJ, source)[:, :-1], filled[:, :-1]


def _count_in_group(chosen_BJ: Tensor, group_BJ: Tensor, groups: int) -> Tensor:
    """Return how many chosen elements of its group are before each element. Their groups never decrease."""
    before_BJ = chosen_BJ.cumsum(1) - chosen_BJ.long()
    totals_BG = before_BJ.new_zeros(len(before_BJ), groups + 1).scatter_add(1, group_BJ, chosen_BJ.long())
    starts_BG = totals_BG.cumsum(1) - totals_BG
    return before_BJ - starts_BG.gather(1, group_BJ)


class Crystals(Idea):
    """The score, and the crystals that a chunk's tokens attend to.

    Nothing of it is compiled: sorts and indexing leave nothing to fuse, and take the longest time to compile.
    """

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
        """Positions must fit into 31 bits of the sort key."""
        ids = (-1, config.vocab_size - 1)
        scores = (-torch.inf, 0)
        return {"log_score_BC": scores, "position_BC": (EMPTY, LONGEST), "ids_BCX": ids, "ids_BR": ids}

    def carried(self, past: "Store", fresh: "Store") -> "Store":
        """Return `past` as a new stream starts with it."""
        return past.carried(self.window)

    def lasting_slots(self, past: "Store") -> tuple[Tensor, Tensor]:
        return norm(past.kept.states_BCD), past.kept.log_score_BC

    def contribute(self, flow: Flow, past: "Store") -> Contribution:
        """Rate the tokens; crystals outside the window are slots."""
        slots, update = self(flow.h_BTD, flow.u_BTD, flow.tokens_BT, past, flow.timeline)
        return Contribution(slots=slots, update=update)

    def slots_of(self, groups: int) -> int:
        return (groups + 1) * self.count

    def flops(self, work: Work) -> float:
        return work.length * matrices(self)

    def forward(
        self, h_BTD: Tensor, u_BTD: Tensor, tokens_BT: Tensor, past: "Store", timeline: Timeline
    ) -> tuple[Slots, "CrystalUpdate"]:
        """Rate the tokens with stem states `h_BTD` (normed: `u_BTD`); return the slots, and the update of the state."""
        score_BT = F.linear(u_BTD, self.score.weight.to(u_BTD.dtype))[..., 0]
        precise = torch.promote_types(u_BTD.dtype, torch.float32)
        log_score_BT = F.logsigmoid(score_BT.to(precise) + self.score.bias.to(precise))
        history_BJ = torch.cat([past.ids_BR, tokens_BT.long()], 1)
        ids_BTX = history_BJ.unfold(1, CONTEXT, 1)
        age_X = torch.arange(CONTEXT - 1, -1, -1, device=tokens_BT.device)
        ids_BTX = ids_BTX.masked_fill(age_X > timeline.position_BT[..., None], -1)
        chunk = RatedTokens(h_BTD, log_score_BT, timeline.position_BT, ids_BTX)
        update = CrystalUpdate(self.slots, self.count, past, chunk, history_BJ, timeline)
        if update.within_segment:
            candidates = past.kept
            alive_BTC = (candidates.position_BC > EMPTY)[:, None].expand(-1, timeline.position_BT.shape[1], -1)
        else:
            candidates, alive_BGC = update.candidates(None)
            alive_BTC = at_indices(alive_BGC, timeline.group_BT)
        age_BTC = timeline.position_BT[:, :, None] - candidates.position_BC[:, None]
        mask_BTC = alive_BTC & (age_BTC >= self.window)
        return Slots(norm(candidates.states_BCD), mask_BTC, candidates.log_score_BC), update


@dataclass(frozen=True)
class Store:
    """The state of the crystals."""

    kept: RatedTokens
    """The crystals."""
    pending: RatedTokens
    """The best tokens so far of the open segment."""
    ids_BR: Tensor
    """The last R = 15 token ids, -1 before the document."""

    outlives_window = True

    def __iter__(self) -> Iterator[Crystal]:
        kept = self.kept
        for row, index in (kept.position_BC > EMPTY).nonzero().tolist():
            ids = [token for token in kept.ids_BCX[row, index].tolist() if token >= 0]
            position, score = int(kept.position_BC[row, index]), kept.log_score_BC[row, index].exp().item()
            yield Crystal(row, position, score, ids)

    def cleared(self) -> "Store":
        """Return the store without crystals."""
        return Store(self.kept.cleared(), self.pending.cleared(), self.ids_BR)

    def without(self, row: int, position: int) -> "Store":
        """Return the store without the crystals of `row` whose token has `position`."""
        kept = self.kept
        gone_BC = kept.position_BC == position
        gone_BC[:row] = gone_BC[row + 1 :] = False
        present_BC = (kept.position_BC > EMPTY) & ~gone_BC
        return Store(_oldest_first(kept, present_BC, kept.position_BC.shape[1]), self.pending, self.ids_BR)

    def carried(self, window: int) -> "Store":
        """Return the store as a new stream starts with it: no open segment, and all crystals outside the window."""
        everything = self.kept.join(self.pending)
        places = self.kept.position_BC.shape[1]
        rank = everything.priority().argsort(dim=1, descending=True, stable=True).argsort(dim=1)
        kept = _oldest_first(everything, (everything.position_BC > EMPTY) & (rank < places), places)
        present_BC = kept.position_BC > EMPTY
        last_B1 = kept.position_BC.masked_fill(~present_BC, 0).amax(1, keepdim=True)
        position_BC = torch.where(present_BC, kept.position_BC - last_B1 - window, EMPTY)
        kept = RatedTokens(kept.states_BCD, kept.log_score_BC, position_BC, kept.ids_BCX)
        return Store(kept, self.pending.cleared(), torch.full_like(self.ids_BR, -1))


@dataclass(frozen=True)
class CrystalUpdate:
    """The rated tokens of a chunk, from which the store after any number of its tokens follows."""

    slots: int
    """Largest number of crystals."""
    count: int
    """Tokens of a segment that may become crystals."""
    past: Store
    chunk: RatedTokens
    history_BJ: Tensor
    """Token ids: the last ones before the chunk, then those of the chunk."""
    timeline: Timeline

    @property
    def within_segment(self) -> bool:
        """Whether no segment opens in the chunk: the crystals then stay the same."""
        return self.timeline.opening_BG.shape[1] == 0

    def candidates(self, count_B: Tensor | None) -> tuple[RatedTokens, Tensor]:
        """Return every token that is a crystal at some point of the chunk, and a mask of when.

        Only the first `count_B` tokens of the chunk count; None: all. The entries are the kept crystals, then the best
        `count` tokens of each of the G segments. The second result [B, G, C] is true if an entry is in the store while
        a segment is open.
        """
        timeline, count = self.timeline, self.count
        groups = timeline.opening_BG.shape[1] + 1
        # The R = `count` pending tokens belong to the segment and the document that are open before the chunk.
        rated, priority_BJ = self.rated(count_B)
        zeros_BR = torch.zeros_like(self.past.pending.position_BC)
        group_BJ = torch.cat([zeros_BR, timeline.group_BT], 1)
        document_BJ = torch.cat([zeros_BR, timeline.document_BT], 1)
        index, filled = best_of_groups(priority_BJ, group_BJ, groups, count)
        entries = self.past.kept.join(rated.take(index, filled))
        # The document of each entry and each segment, and the first segment during which an entry may be a crystal.
        slots = self.past.kept.position_BC.shape[1]
        document_BC = F.pad(document_BJ.gather(1, index), (slots, 0))
        opening = timeline.opening_BG
        opened = timeline.document_BT.gather(1, opening.clamp(min=0)).masked_fill(opening < 0, -1)
        document_BG = F.pad(opened, (1, 0))
        enters_C = 1 + torch.arange(groups, device=index.device).repeat_interleave(count)
        enters_C = F.pad(enters_C, (slots, 0))
        group_G = torch.arange(groups, device=index.device)
        eligible_BGC = (enters_C <= group_G[:, None]) & (entries.position_BC > EMPTY)[:, None]
        eligible_BGC = eligible_BGC & (document_BC[:, None] == document_BG[:, :, None])
        order_BC = order_of(entries.priority(), descending=True)
        sorted_BGC = eligible_BGC.gather(2, order_BC[:, None].expand(-1, groups, -1))
        stays_BGC = sorted_BGC & (sorted_BGC.cumsum(2) <= self.slots)
        alive_BGC = torch.zeros_like(stays_BGC).scatter(2, order_BC[:, None].expand(-1, groups, -1), stays_BGC)
        return entries, alive_BGC

    def rated(self, count_B: Tensor | None) -> tuple[RatedTokens, Tensor]:
        """Return the pending tokens, followed by the chunk's, and their priorities.

        All but the first `count_B` tokens of the chunk have the lowest priority; None: none has.
        """
        rated = self.past.pending.join(self.chunk)
        priority_BJ = rated.priority()
        if count_B is not None:
            pending, entries = self.past.pending.position_BC.shape[1], priority_BJ.shape[1]
            unread_BJ = torch.arange(-pending, entries - pending, device=count_B.device) >= count_B[:, None]
            priority_BJ = priority_BJ.masked_fill(unread_BJ, torch.iinfo(torch.int64).min)
        return rated, priority_BJ

    def after(self, count_B: Tensor, timeline: Timeline) -> Store:
        """Return the store after the first `count_B` tokens."""
        goes_on_B1 = ~timeline.ended(count_B)[:, None]
        position_B = timeline.position_after(count_B)
        index_BR = count_B[:, None] + torch.arange(CONTEXT - 1, device=count_B.device)
        in_document_BR = torch.arange(CONTEXT - 1, device=count_B.device) >= CONTEXT - 1 - position_B[:, None]
        ids_BR = self.history_BJ.gather(1, index_BR).masked_fill(~in_document_BR, -1)
        if self.within_segment:
            rated, priority_BJ = self.rated(count_B)
            order_BJ = order_of(priority_BJ, descending=True)
            index_J = torch.arange(order_BJ.shape[1], device=count_B.device)
            best_BJ = torch.zeros_like(order_BJ).scatter(1, order_BJ, index_J.expand_as(order_BJ)) < self.count
            best_BJ = best_BJ & (priority_BJ > torch.iinfo(torch.int64).min) & goes_on_B1
            pending = _oldest_first(rated, best_BJ, self.count)
            return Store(self.past.kept.where(goes_on_B1), pending, ids_BR)
        entries, alive_BGC = self.candidates(count_B)
        group_B = timeline.at(timeline.group_BT, count_B, 0)
        kept_BC = alive_BGC[torch.arange(len(group_B), device=group_B.device), group_B] & goes_on_B1
        before = self.past.kept.position_BC.shape[1]
        place_C = torch.arange(entries.position_BC.shape[1], device=group_B.device) - before
        in_group_BC = (place_C >= 0) & (place_C // self.count == group_B[:, None])
        pending_BC = in_group_BC & (entries.position_BC > EMPTY) & goes_on_B1
        kept = _oldest_first(entries, kept_BC, self.slots)
        return Store(kept, _oldest_first(entries, pending_BC, self.count), ids_BR)


def _oldest_first(entries: RatedTokens, keep_BC: Tensor, places: int) -> RatedTokens:
    """Return the entries where `keep_BC` is true, sorted by position, then empty ones: `places` in all."""
    missing = places - entries.position_BC.shape[1]
    if missing > 0:
        rows, _, width = entries.states_BCD.shape
        blank = RatedTokens.empty(rows, missing, width, entries.states_BCD.dtype, entries.states_BCD.device)
        entries, keep_BC = entries.join(blank), F.pad(keep_BC, (0, missing))
    position_BC = torch.where(keep_BC, entries.position_BC, torch.iinfo(torch.int64).max)
    index = order_of(position_BC)[:, :places]
    return entries.take(index, keep_BC.gather(1, index))
