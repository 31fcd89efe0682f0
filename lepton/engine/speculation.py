"""How many tokens to draft in a pass: measured, not set.

More drafts give more tokens a pass and make it slower. What pays depends on the device, on the number of rows and on
the text. So the time of a pass is measured for each number of rows and drafts, the tokens for each number of drafts,
and the choice that gives the most tokens a second runs. Two accounts of time bound what the search costs:

- The balance of probes. Each second of decoding adds `PROBES` of a second to it. A choice that does not run is probed
  once the balance covers the time that its probe is expected to lose. So a probe that costs little comes often, and one
  that costs much comes rarely.
- The debt against plain decoding. What drafting loses against it is added, what drafting gains and `BOUND` of each
  second are subtracted. While the debt is above `CREDIT` plain passes, nothing is drafted. So in any time drafting
  loses at most `BOUND` of it, and `CREDIT` plain passes and a bit once.

The first pass of a choice may take a hundred times longer, because something is compiled or captured; it is not
counted. The tokens that are generated do not depend on what is decided here.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from statistics import median_low
from typing import Any

PROBES = 0.01
"""Share of the time that probes may lose."""
BOUND = 0.02
"""Share of the time that drafting may lose against plain decoding, probes included."""
CREDIT = 32
"""Plain passes that drafting may lose against plain decoding before it has gained anything."""
PASSES = 3
"""Passes of a probe: the median of three withstands one outlier."""
ROWS = 8
"""Rows of all passes of a probe: tokens of few rows are a matter of luck."""
LEAST_LOSS = 0.1
"""A probe counts as if each of its passes lost this share of its time or more, so that no probe is free."""
RECENT = 15
"""Passes whose median is the time of a choice."""
KEPT = 2
"""Of these, those that count beside the passes of a new probe: fewer than its own."""
MEMORY_ROWS, MEMORY_PASSES = 64, 16
"""The mean of tokens follows the text: an old pass counts less by the factor e after so many rows, and so many
passes."""


def bucket_of(rows: int) -> int:
    """Return the number of rows, rounded up to a power of two."""
    return 1 << (rows - 1).bit_length()


@dataclass
class Gain:
    """New tokens of a row in a pass: a mean that follows the text."""

    mean: float = 0.0
    weight: float = 0.0
    """Rows that the mean is of; older ones count less."""

    def add(self, tokens: int, rows: int) -> None:
        """Add a pass."""
        kept = 1 - min(1 / MEMORY_PASSES, rows / MEMORY_ROWS)
        self.weight = kept * self.weight + rows
        self.mean += (tokens - rows * self.mean) / self.weight

    def fade(self) -> None:
        """Count what is known no more than a new probe."""
        self.weight = min(self.weight, ROWS)


@dataclass
class Cost:
    """Seconds of a pass: a running median."""

    passes: int = 0
    """Passes so far, the first one included, which is not counted."""
    recent: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT))
    seconds: float = 0.0

    def add(self, seconds: float) -> None:
        """Add a pass."""
        self.passes += 1
        if self.passes > 1:
            self.recent.append(seconds)
            self.seconds = median_low(self.recent)

    def fade(self) -> None:
        """Let the passes of a new probe be the majority."""
        while len(self.recent) > KEPT:
            self.recent.popleft()


class Bucket:
    """What is measured and decided for one number of rows."""

    def __init__(self, choices: Sequence[int]) -> None:
        self.costs = {choice: Cost() for choice in choices}
        self.probed, self.left = 0, 0
        """The choice that is probed or was last, and passes of this probe that are still to come."""
        self.probes = 0
        self.balance = 0.0
        """Seconds that probes may lose now."""
        self.debt = 0.0
        """Seconds that drafting lost against plain decoding, less its allowance."""


class Speculation:
    """Chooses the number of drafts of each pass by what earlier ones took and gave. Passes below depth 1, which
    take another time, need one of their own.

    `choose` is called once for each pass, `record` when its outcome is known: a few passes may lie in between.
    """

    def __init__(self, choices: Sequence[int]) -> None:
        """Make one that has measured nothing. `choices` are numbers of drafts: 0, and larger ones in rising order."""
        assert choices[0] == 0, "plain decoding is always a choice"
        assert list(choices) == sorted(set(choices)), "the choices rise"
        self.choices = tuple(choices)
        self._gains = {choice: Gain() for choice in choices}
        self._buckets: dict[int, Bucket] = {}

    def choose(self, bucket: int) -> int:
        """Return how many tokens to draft in the next pass of `bucket` rows; see `bucket_of`."""
        if len(self.choices) == 1:
            return 0
        state = self._buckets.setdefault(bucket, Bucket(self.choices))
        plain = state.costs[0].seconds
        if plain and state.debt > CREDIT * plain:
            return 0
        if not state.left:
            self._plan_probe(state, bucket)
        if not state.left:
            return self._best(state)
        state.left -= 1
        return state.probed

    def record(self, bucket: int, drafts: int, seconds: float, tokens: int, rows: int) -> None:
        """Take in a pass: its number of drafts, its time, and the new tokens of its rows.

        Args:
            bucket: as given to `choose`.
            drafts: drafts of each row.
            seconds: time of the pass, drafting included.
            tokens: new tokens of those rows.
            rows: rows that had not ended before the pass.
        """
        state = self._buckets.setdefault(bucket, Bucket(self.choices))
        cost = state.costs[drafts]
        cost.add(seconds)
        if rows:
            self._gains[drafts].add(tokens, rows)
        plain = state.costs[0].seconds
        if not plain or not cost.seconds:
            return
        state.balance += PROBES * cost.seconds
        lost = cost.seconds - plain * tokens / rows if drafts and rows else 0.0
        state.debt = max(0.0, state.debt + lost - BOUND * cost.seconds)

    def figures(self) -> dict[str, Any]:
        """Return what was measured.

        `tokens` of a row and pass are by number of drafts. `buckets` are by number of rows: the `seconds` of a pass and
        the number of `passes`, both by number of drafts, the number of `probes`, and the `best` number of drafts.
        """
        measured = {
            bucket: {
                "seconds": {choice: cost.seconds for choice, cost in state.costs.items() if cost.seconds},
                "passes": {choice: cost.passes for choice, cost in state.costs.items() if cost.passes},
                "probes": state.probes,
                "best": self._best(state),
            }
            for bucket, state in sorted(self._buckets.items())
        }
        tokens = {choice: gain.mean for choice, gain in self._gains.items() if gain.weight}
        return {"tokens": tokens, "buckets": measured}

    def _best(self, state: Bucket) -> int:
        """Return the measured choice with the fewest seconds a token; plain if there is none."""
        known = [choice for choice in self.choices if self._seconds_per_token(state, choice)]
        return min(known, key=lambda choice: self._seconds_per_token(state, choice), default=0)

    def _seconds_per_token(self, state: Bucket, choice: int) -> float:
        """Return the seconds of a row's token, 0 if not known."""
        mean = self._gains[choice].mean
        return state.costs[choice].seconds / mean if mean else 0.0

    def _plan_probe(self, state: Bucket, bucket: int) -> None:
        """Begin a probe of the next choice that is not the best, if it is new or the balance covers it."""
        new = [choice for choice in self.choices if not state.costs[choice].seconds]
        if new:
            state.probed, state.left = new[0], 1 + self._passes(bucket, new[0])
            return
        best = self._best(state)
        others = [choice for choice in self.choices if choice != best]
        probed = next((choice for choice in others if choice > state.probed), others[0])
        passes, cost = self._passes(bucket, probed), state.costs[probed].seconds
        lost = cost - self._gains[probed].mean * self._seconds_per_token(state, best)
        expected = passes * max(lost, LEAST_LOSS * cost)
        if state.balance >= expected:
            state.balance -= expected
            state.probed, state.left, state.probes = probed, passes, state.probes + 1
            state.costs[probed].fade()
            self._gains[probed].fade()

    def _passes(self, bucket: int, choice: int) -> int:
        """Return the passes of a probe. Plain decoding gives a token a pass, which needs no mean."""
        return max(PASSES, -(-ROWS // bucket)) if choice else PASSES


class Always(Speculation):
    """Drafts as many tokens as it can in every pass, whether that pays or not: for measuring the drafts."""

    def choose(self, bucket: int) -> int:
        """Return the largest number of drafts."""
        return self.choices[-1]
