"""Time limits: how long a contender may take, and how many steps fit into what it has."""

import time

TIMED = 5
"""Steps of which the time of one is measured."""


class Clock:
    """A limit in seconds, which runs from now on."""

    def __init__(self, seconds: float) -> None:
        self.begun, self.seconds = time.perf_counter(), seconds

    @property
    def spent(self) -> float:
        return time.perf_counter() - self.begun

    @property
    def left(self) -> float:
        """Seconds that are left; negative afterwards."""
        return self.seconds - self.spent


def fitted(steps: int, seconds: float, seconds_a_step: float, runs: float) -> int:
    """Return how many of `steps` fit into `seconds`, at least one, where `runs` times that many are taken in all.

    The length of a run is fixed before it begins, so that its schedule comes to an end.
    """
    return max(1, min(steps, int(seconds / (seconds_a_step * runs))))
