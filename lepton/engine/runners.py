"""Who may use which runner: pools and graphs outlive the call that made them, but serve one engine at a time."""

import threading
from types import TracebackType

from lepton.engine.runner import Runner
from lepton.engine.speculation import bucket_of
from lepton.model import Network

_LOCK = threading.Lock()
MOST_KEPT = 4
"""Free runners that a model keeps."""
MOST_BYTES = 1 << 30
"""Bytes of a pool that a model keeps on a CPU, where a new one costs little. Graphs, and compiled cycles, are worth any
pool."""


class Lease:
    """The use of a runner inside a `with` block. A runner that is free again is kept with its model."""

    def __init__(self, model: Network, places: int, longest: int) -> None:
        """Ask for a runner of at least `places` sequences of at most `longest` tokens."""
        self._model, self._places, self._longest = model, places, longest

    def __enter__(self) -> "Lease":
        model = self._model
        free = _free(model)
        with _LOCK:
            free[:] = [each for each in free if each.is_current()]
            fitting = [each for each in free if each.fits(self._places, self._longest)]
            found = min(fitting, key=lambda each: (each.places, not each.is_warm), default=None)
            if found is not None:
                free.remove(found)
        places = bucket_of(self._places) if model.device.type == "cuda" else self._places
        self.runner = Runner(model, places, self._longest) if found is None else found
        self.runner.refresh()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        runner, free = self.runner, _free(self._model)
        cheap = self._model.device.type == "cpu" and not runner.is_warm
        small = not cheap or runner.pool.nbytes <= MOST_BYTES
        if small and (kind is None or issubclass(kind, GeneratorExit)):
            with _LOCK:
                free.append(runner)
                if len(free) > MOST_KEPT:  # the oldest, of those that are not warm if there are any
                    free.remove(min(free, key=lambda each: each.is_warm))


class Runners(list[Runner]):
    """The free runners of a model. They are not copied or saved with it."""

    def __reduce__(self) -> tuple[type["Runners"], tuple[()]]:
        return Runners, ()


def _free(model: Network) -> Runners:
    found: Runners = model.__dict__.setdefault("_runners", Runners())
    return found
