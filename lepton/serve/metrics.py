"""Counters and histograms of a server, in the text form that Prometheus reads (version 0.0.4)."""

import bisect
import threading
from collections import defaultdict
from collections.abc import Iterable

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
"""Upper ends of a histogram's buckets."""
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"

Sample = tuple[str, str, str, float]
"""Name, type, help and value."""


class Histogram:
    """Counts durations."""

    def __init__(self, name: str, help: str) -> None:
        self.name, self.help = name, help
        self._counts, self._sum = [0] * (len(SECONDS) + 1), 0.0
        self._lock = threading.Lock()

    def add(self, seconds: float) -> None:
        """Count one."""
        with self._lock:
            self._counts[bisect.bisect_left(SECONDS, seconds)] += 1
            self._sum += seconds

    def lines(self) -> Iterable[str]:
        """Return its lines."""
        with self._lock:
            counts, total = list(self._counts), self._sum
        yield f"# HELP {self.name} {self.help}"
        yield f"# TYPE {self.name} histogram"
        seen = 0
        for end, count in zip([*map(str, SECONDS), "+Inf"], counts, strict=True):
            seen += count
            yield f'{self.name}_bucket{{le="{end}"}} {seen}'
        yield f"{self.name}_sum {total}"
        yield f"{self.name}_count {seen}"


class Metrics:
    """What a server counts of its requests; the figures of its engine are given when they are read."""

    def __init__(self) -> None:
        self._requests: dict[tuple[str, int], int] = defaultdict(int)
        self._lock = threading.Lock()
        self.first_token = Histogram(
            "lepton_time_to_first_token_seconds", "From a request's arrival to the first text of an answer."
        )
        self.request = Histogram("lepton_request_seconds", "From a request's arrival to the end of its reply.")

    def count(self, path: str, status: int) -> None:
        """Count a request; `status` is that of the reply, 499 where the client left before it began."""
        with self._lock:
            self._requests[path, status] += 1

    def text(self, samples: Iterable[Sample]) -> str:
        """Return everything; `samples` are the figures of the engine."""
        lines = ["# HELP lepton_requests_total Requests by path and status.", "# TYPE lepton_requests_total counter"]
        with self._lock:
            requests = sorted(self._requests.items())
        lines += [f'lepton_requests_total{{path="{path}",code="{code}"}} {n}' for (path, code), n in requests]
        for name, kind, help, value in samples:
            lines += [f"# HELP {name} {help}", f"# TYPE {name} {kind}", f"{name} {value}"]
        return "\n".join([*lines, *self.first_token.lines(), *self.request.lines(), ""])
