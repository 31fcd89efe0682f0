"""Where the seconds of a run go: a clock that at any moment counts for one named phase."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

FIRST = "start"
"""The phase in which a clock begins: reading libraries and files, until another one is named."""


class Phases:
    """Seconds by phase. A phase inside another one interrupts it, so that their sum is the time since the start."""

    def __init__(self, since: float | None = None) -> None:
        """Start counting; `since` is an earlier `time.perf_counter()` to count from."""
        self.seconds: dict[str, float] = {}
        self._running = FIRST
        self._mark = time.perf_counter() if since is None else since

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        """Count for `phase` inside the block, and then again for the phase around it."""
        around = self._running
        self._switch(phase)
        try:
            yield
        finally:
            self._switch(around)

    def fold(self, phase: str, then: str) -> str:
        """Return all so far in words, count it as one `phase`, and go on with the phase `then`."""
        self._switch(then)
        words = self.in_words()
        self.seconds = {phase: sum(self.seconds.values())}
        return words

    def in_words(self) -> str:
        """Return the seconds so far, such as '41 s: compile 30, data 8, start 3'; phases below 0.5 s are left out."""
        self._switch(self._running)
        ordered = sorted(self.seconds.items(), key=lambda item: -item[1])
        parts = [f"{phase} {seconds:,.0f}" for phase, seconds in ordered if seconds >= 0.5]
        return f"{sum(self.seconds.values()):,.0f} s" + (f": {', '.join(parts)}" if parts else "")

    def _switch(self, phase: str) -> None:
        now = time.perf_counter()
        self.seconds[self._running] = self.seconds.get(self._running, 0.0) + now - self._mark
        self._running, self._mark = phase, now
