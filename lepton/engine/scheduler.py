"""Which sequences have a place of the pool, and which of them share the next pass.

The host launches a cycle before it has read the one before, so it plans with what it knows: of a cycle that is not read
yet, it knows how many tokens it had, not how many were accepted. The scheduler computes nothing itself; plain integers
go in and out.
"""

import heapq
from collections import OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache

from lepton.engine.sequence import Sequence

PATIENCE = 4
"""Cycles that a sequence waits for others that open a segment too."""
ENOUGH = 16
"""It does not wait if one in so many of the sequences may open one."""


@dataclass(frozen=True, eq=False)
class Prefill:
    """Sequences whose prompts are read; each gets its first new token from its prompt's last one."""

    sequences: list[Sequence]
    places: list[int]
    """Of each sequence. It stays here when the sequence has given its place back."""


@dataclass(frozen=True, eq=False)
class Launch:
    """Running sequences that share one pass. Each reads its newest token and `drafts` drafts."""

    sequences: list[Sequence]
    places: list[int]
    """Of each sequence. It stays here when the sequence has given its place back."""
    routed: bool
    """Whether tokens may skip the deep blocks; each sequence then has a depth of its own."""
    rounds: int
    """Rounds of thinking: the most that one of the sequences wants."""
    opening: bool
    """Whether one of the sequences may open a segment in this pass."""
    drafts: int


class Scheduler:
    """First come, first served: a free place admits the first sequence that waits, and it keeps it until it ends.

    Once the outcome of a prefill or a launch is known, `finish` must be called, in the order in which they ran. Any
    number of them may be launched in between.
    """

    def __init__(
        self,
        places: int,
        segment: int,
        *,
        rounds: int = 0,
        drafts: Callable[[int, bool], int] = lambda _rows, _routed: 0,
        together: int | None = None,
    ) -> None:
        """Make a scheduler without sequences.

        Args:
            places: rows of the pool, numbered from 0.
            segment: tokens of a segment.
            rounds: rounds of thinking of a sequence that asks for no number.
            drafts: how many tokens to draft in a pass of so many rows, routed or not; asked once for each launch.
            together: largest number of rows that share a pass whether they may open a segment or not; None: no limit.
                Of more rows, those that may open one have passes of their own: an opening costs every row of its pass.
        """
        assert places > 0, "no places"
        assert segment > 0, "an empty segment"
        self._segment, self._rounds, self._drafts, self._together = segment, rounds, drafts, together
        self._free = list(range(places))  # a heap: the pool is used from its start
        self._waiting: OrderedDict[Sequence, None] = OrderedDict()
        self._running: dict[Sequence, None] = {}
        self._held: dict[Sequence, int] = {}
        """Sequences that wait to open a segment together with others, and how many cycles they have waited."""

    @property
    def waiting(self) -> int:
        """Sequences that wait for a place."""
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Sequences that hold a place."""
        return len(self._running)

    @property
    def sequences(self) -> list[Sequence]:
        """Those that wait or hold a place."""
        return [*self._waiting, *self._running]

    def add(self, sequence: Sequence) -> None:
        """Queue a new sequence."""
        assert sequence.status == "waiting", f"a sequence that is {sequence.status}"
        assert sequence not in self._waiting, "a sequence that waits already"
        self._waiting[sequence] = None

    def cancel(self, sequence: Sequence) -> None:
        """End a sequence that waits or runs; no effect if it has ended."""
        sequence.cancel()
        self._waiting.pop(sequence, None)
        self._free_ended(sequence)

    def admit(self) -> Prefill:
        """Give the free places to what waits."""
        admitted = [self._admit() for _ in range(min(len(self._free), len(self._waiting)))]
        return Prefill(admitted, _places(admitted))

    def launches(self) -> list[Launch]:
        """Group all that runs: what may skip deep blocks shares passes, apart from what may not."""
        groups: dict[bool, list[Sequence]] = {}
        for sequence in self._running:
            if not sequence.exhausted:
                groups.setdefault(sequence.routed, []).append(sequence)
        return [
            self._launch(routed, part, opening)
            for routed, sequences in groups.items()
            for part, opening in self._apart(sequences)
        ]

    def _apart(self, sequences: list[Sequence]) -> list[tuple[list[Sequence], bool]]:
        """Split the sequences of a pass into those that open no segment and those that may, if they are many.

        The latter wait for others, at most `PATIENCE` cycles. With each part it says whether one may open a segment.
        """
        openers = [each for each in sequences if possible_phases(each, self._segment) & 1]
        if self._together is None or len(sequences) <= self._together:
            return [(sequences, bool(openers))]
        held = {each: self._held.get(each, 0) + 1 for each in openers}
        others = [each for each in sequences if each not in held] if held else sequences
        if openers and (len(openers) * ENOUGH >= len(sequences) or max(held.values()) > PATIENCE):
            self._held = {}
            return [(part, part is openers) for part in (others, openers) if part]
        self._held = held
        return [(others, False)] if others else []

    def finish(self, sequences: Iterable[Sequence], ids: Iterable[list[int]]) -> list[list[int]]:
        """Take in the outcome of a prefill or a launch, or a part of it; free the places of those that have ended.

        Args:
            sequences: those that it is about. It is the oldest of theirs whose outcome is not known yet.
            ids: new tokens of each sequence, as the pass computed them: one of a prefill, the accepted drafts and one
                more of a launch. What it gives for a sequence that had ended before does not matter.

        Returns:
            Those that count, of each sequence.
        """
        counted = []
        for sequence, new in zip(sequences, ids, strict=True):
            if sequence.unread.popleft():
                sequence.phase = (sequence.phase + len(new)) % self._segment
            counted.append(sequence.take(new))
            if sequence.reason is not None:
                self._free_ended(sequence)
        return counted

    def _admit(self) -> Sequence:
        sequence, _ = self._waiting.popitem(last=False)
        sequence.status, sequence.place = "running", heapq.heappop(self._free)
        sequence.phase = phase_after_prompt(sequence, self._segment)
        sequence.unread.append(0)
        self._running[sequence] = None
        return sequence

    def _launch(self, routed: bool, sequences: list[Sequence], opening: bool) -> Launch:
        speculative = any(each.options.use_speculative for each in sequences)
        drafts = self._drafts(len(sequences), routed) if speculative else 0
        thinks = {each.options.think for each in sequences}
        rounds = max(self._rounds if think is None else think for think in thinks)
        for sequence in sequences:
            sequence.unread.append(1 + drafts)
        return Launch(sequences, _places(sequences), routed, rounds, opening, drafts)

    def _free_ended(self, sequence: Sequence) -> None:
        """Free the place of a sequence that has ended and is in no pass whose outcome is not known yet."""
        if sequence.place is not None and sequence.ended and not sequence.unread:
            heapq.heappush(self._free, sequence.place)
            sequence.place = None
            del self._running[sequence]


def _places(sequences: list[Sequence]) -> list[int]:
    places = [each.place for each in sequences if each.place is not None]
    assert len(places) == len(sequences), "a sequence without a place"
    return places


def phase_after_prompt(sequence: Sequence, segment: int) -> int:
    """Return the phase of the token after the prompt.

    The last token of a prompt of several opens a segment. One alone continues the segment of the state before it. The
    first token of a document opens a segment.
    """
    if sequence.prompt[-1] == sequence.eos_id:
        return 0
    opened = 0 if len(sequence.prompt) > 1 else sequence.past_phase
    return (opened + 1) % segment


def possible_phases(sequence: Sequence, segment: int) -> int:
    """Return the phases that the next token of a sequence may have, as bits: bit f stands for phase f."""
    phases = 1 << sequence.phase
    for tokens in sequence.unread:
        phases = phases_after(phases, tokens, segment)
    return phases


@lru_cache(maxsize=1 << 16)
def phases_after(phases: int, tokens: int, segment: int) -> int:
    """Return the possible phases, as bits, after a pass of `tokens` tokens whose outcome is not known.

    From phase f they are f + 1 to f + `tokens`, at most `segment`, which is phase 0: no pass goes beyond an opening.
    After a prefill, of 0 tokens, the phases are those before.
    """
    if tokens == 0:
        return phases
    reached = 0
    for count in range(1, tokens + 1):
        reached |= phases << count
    ring = (1 << segment) - 1
    return reached & ring | (reached >> segment) & 1
