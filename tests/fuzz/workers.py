"""Cases in forked processes, each within bounds of time and memory. A process that dies is a finding, and replaced."""

import math
import multiprocessing
import multiprocessing.connection
import os
import resource
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple


class Limits(NamedTuple):
    """What one attempt may take."""

    cpu: float = 5.0
    """Seconds of CPU time: a busy machine makes no hang of a slow case."""
    wall: float = 15.0
    """Seconds in all: who waits for a pipe takes no CPU time."""
    memory: int = 1 << 30
    """Bytes on top of what the process has."""


class Overtime(BaseException):
    """The attempt took too long. No `Exception`, so that no handler of one hides it."""


class Died(NamedTuple):
    """A case whose process ended without an answer."""

    signal: int


def attempt(action: Callable[[], Any], limits: Limits) -> tuple[Any, BaseException | None]:
    """Return what `action` returns, or the exception that it raises, of whatever kind."""
    bounds = _Bounds(limits)
    try:
        try:
            result = action(), None
        except BaseException as error:
            result = None, error
        bounds.lift()
    except Overtime as error:  # in the very moment in which the action ended
        bounds.lift()
        result = None, error
    return result


class _Bounds:
    """Limits of this process, from now until they are lifted."""

    def __init__(self, limits: Limits) -> None:
        used = resource.getrusage(resource.RUSAGE_SELF)
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        bounds = {
            resource.RLIMIT_AS: pages * resource.getpagesize() + limits.memory,
            # Code that never returns to Python sees no exception: there the kernel ends the process.
            resource.RLIMIT_CPU: math.ceil(used.ru_utime + used.ru_stime + 2 * limits.cpu),
        }
        self._before = {kind: resource.getrlimit(kind) for kind in bounds}
        for kind, bound in bounds.items():
            resource.setrlimit(kind, (bound, self._before[kind][1]))
        self._raised = -math.inf
        for timer, (signum, seconds) in {
            signal.ITIMER_PROF: (signal.SIGPROF, limits.cpu),
            signal.ITIMER_REAL: (signal.SIGALRM, limits.wall),
        }.items():
            signal.signal(signum, self._late)
            signal.setitimer(timer, seconds, 1.0)  # again and again, where an exception is swallowed

    def _late(self, _signum: int, _frame: Any) -> None:
        if time.monotonic() - self._raised > 0.9:  # not by both timers at once
            self._raised = time.monotonic()
            raise Overtime

    def lift(self) -> None:
        for timer in (signal.ITIMER_PROF, signal.ITIMER_REAL):
            signal.setitimer(timer, 0)
        for kind, bound in self._before.items():
            resource.setrlimit(kind, bound)


def run_all(
    cases: Sequence[str], work: Callable[[str], Any], *, jobs: int = 1, limits: Limits
) -> Iterator[tuple[str, Any]]:
    """Yield (case, what `work(case)` returned, or `Died`) of every case, in forked processes, in no fixed order.

    `work` bounds itself with `attempt`; here only a process that does not answer at all is ended.
    """
    context = multiprocessing.get_context("fork")
    waiting = deque(cases)
    workers: dict[Any, _Worker] = {}

    def start() -> None:
        share = [waiting.popleft() for _ in range(min(len(waiting), max(1, min(50, len(cases) // jobs))))]
        here, there = context.Pipe(duplex=False)
        process = context.Process(target=_serve, args=(share, work, there), daemon=True)
        process.start()
        there.close()
        workers[here] = _Worker(process, share)

    try:
        while waiting or workers:
            while waiting and len(workers) < jobs:
                start()
            for pipe in multiprocessing.connection.wait(list(workers), timeout=1.0):
                worker = workers[pipe]
                try:
                    answer = pipe.recv()  # type: ignore[union-attr]
                except (EOFError, OSError):
                    worker.process.join()
                    del workers[pipe]
                    if worker.share:  # the first of them is the one that it was at
                        waiting.extendleft(reversed(worker.share[1:]))
                        yield worker.share[0], Died(-(worker.process.exitcode or 0))
                    continue
                worker.since = time.monotonic()
                yield worker.share.pop(0), answer
            for worker in workers.values():
                if time.monotonic() - worker.since > 2 * limits.wall:
                    worker.process.kill()
    finally:
        for worker in workers.values():
            worker.process.kill()


class _Worker:
    def __init__(self, process: Any, share: list[str]) -> None:
        self.process, self.share, self.since = process, share, time.monotonic()


def _serve(share: Sequence[str], work: Callable[[str], Any], pipe: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # libraries print their panics
        os.dup2(nowhere, stream)
    for case in list(share):
        pipe.send(work(case))
