"""The thread of the engine: answers join and leave between cycles, and what they gain is handed out once a cycle."""

import queue
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable

import torch

from lepton.engine.engine import Engine
from lepton.engine.runners import Lease
from lepton.engine.stats import Stats
from lepton.errors import reason
from lepton.generate.generation import MOST_AT_ONCE
from lepton.model import Network
from lepton.serve.answer import Answer, Piece
from lepton.serve.turns import ending, placed, read_answers
from lepton.values import whole

PROMPT_TOKENS = 1 << 13
"""Prompt tokens that join at once, at most, unless a single prompt has more: what runs waits meanwhile."""
ENOUGH = 16
"""Prompts join at once if one in so many of the places is free: a cycle in which some join costs all that run."""
PATIENCE = 4
"""Cycles that they wait for more places to become free."""

Deliver = Callable[[list[tuple[Answer, Piece]]], None]
"""Is given what one cycle added, in the thread of the engine."""


class Worker:
    """Runs an engine in a thread of its own. All methods may be called from any thread, and none waits for a cycle.

    An error of the engine ends the answers that are in it, each with a piece that says so. Those that wait go on with a
    new engine.
    """

    def __init__(
        self,
        model: Network,
        deliver: Deliver,
        *,
        places: int = 64,
        longest: int = 1 << 14,
        ahead: int | None = None,
    ) -> None:
        """Make a worker that has not started.

        Args:
            model: what generates, in eval mode.
            deliver: is given what each cycle adds to answers, at least the end of each. It must not raise.
            places: answers that are in the engine at once; more wait.
            longest: tokens of a prompt and its answer. A model without a window has room for so many in each place.
            ahead: see `Engine`.
        """
        self.model, self.places, self.longest = model, whole("places", places, 1, MOST_AT_ONCE), longest
        self.stats = Stats()
        """Counts over all answers."""
        self.failures = 0
        """Engines that ended with an error."""
        self._ahead = ahead
        self._deliver, self._threads = deliver, torch.get_num_threads()
        self._inbox: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._waiting: OrderedDict[Answer, None] = OrderedDict()
        self._inside: dict[int, Answer] = {}
        """Answers in the engine, by the identity of their sequences."""
        self._since_join = 0
        """Cycles since prompts have joined."""
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)

    def start(self) -> None:
        """Start the thread."""
        self._thread.start()

    @property
    def is_alive(self) -> bool:
        """Whether it generates."""
        return self._thread.is_alive()

    @property
    def running(self) -> int:
        """Answers in the engine."""
        return len(self._inside)

    @property
    def waiting(self) -> int:
        """Answers that wait for a place."""
        return len(self._waiting)

    def submit(self, answers: Iterable[Answer]) -> None:
        """Let answers wait for a place, first come, first served."""
        added = list(answers)
        self._inbox.put(lambda: self._waiting.update(dict.fromkeys(added)))

    def cancel(self, answers: Iterable[Answer]) -> None:
        """End answers before the next cycle; no effect on those that have ended."""
        ended = list(answers)
        self._inbox.put(lambda: self._cancel(ended))

    def close(self) -> None:
        """Cancel what there is, end the thread and wait for it."""
        self._inbox.put(self._close)
        if self._thread.ident is not None:
            self._thread.join()

    def _close(self) -> None:
        self._closing = True
        self._cancel([*self._waiting, *self._inside.values()])

    def _cancel(self, answers: Iterable[Answer]) -> None:
        pieces = []
        for answer in answers:
            if answer.ended_by is None:
                answer.sequence.cancel()
                pieces.append((answer, answer.end("cancelled")))
            self._waiting.pop(answer, None)
        if pieces:
            self._deliver(pieces)

    def _run(self) -> None:
        torch.set_num_threads(self._threads)  # a thread begins with the library's own number
        if self.model.device.type == "cuda":
            torch.cuda.set_device(self.model.device)  # and with the first GPU
        while not self._closing:
            try:
                with Lease(self.model, self.places, self.longest) as lease:
                    self._serve(Engine(lease.runner, stats=self.stats, ahead=self._ahead))
            except Exception as error:  # the model's numbers, the device's memory: told to those whom it concerns
                self._fail(reason(error))

    def _serve(self, engine: Engine) -> None:
        """Run cycles until the worker is closed."""
        while not self._closing:
            self._read_inbox(wait=engine.idle and not self._waiting)
            self._leave(engine)
            self._join(engine)
            if engine.idle:
                continue
            pieces = []
            for output in engine.step():
                answer = self._inside[id(output.sequence)]
                if answer.ended_by is None:
                    pieces.append((answer, answer.take(output)))
            if pieces:
                self._deliver(self._kept(pieces))
            self._leave(engine)
        engine.close()

    def _kept(self, pieces: list[tuple[Answer, Piece]]) -> list[tuple[Answer, Piece]]:
        """Return the pieces once the states of conversations are up to date; where that fails, it is told."""
        ended = ending(pieces)
        try:
            read_answers(self.model, ended)
        except Exception as error:
            self.failures += 1
            failed = {answer: answer.end("error", reason(error)) for answer in ended}
            return [(answer, failed.get(answer, piece)) for answer, piece in pieces]
        return pieces

    def _read_inbox(self, *, wait: bool) -> None:
        """Do what other threads have asked for; with `wait`, sleep until there is something."""
        if wait:
            self._inbox.get()()
        while not self._inbox.empty():
            self._inbox.get()()

    def _leave(self, engine: Engine) -> None:
        """Let go of answers that have ended; of those that ended here, such as by a stop text, the engine is told."""
        for key, answer in [*self._inside.items()]:
            if answer.ended_by is not None:
                engine.cancel(answer.sequence)
                del self._inside[key]

    def _join(self, engine: Engine) -> None:
        """Let answers that wait into the engine while there are places; not in each cycle, or what runs would stand."""
        self._since_join += 1
        free = self.places - len(self._inside)
        if not self._waiting or not free:
            return
        enough = free * ENOUGH >= self.places or self._since_join > PATIENCE
        if self._inside and not (enough and self._since_join > 1):
            return
        self._since_join = 0
        tokens = 0
        while self._waiting and len(self._inside) < self.places:
            answer = next(iter(self._waiting))
            tokens += len(answer.prompt)
            if tokens > PROMPT_TOKENS and tokens > len(answer.prompt):
                break
            del self._waiting[answer]
            self._inside[id(answer.sequence)] = answer
            placed(answer, self.model.device)
            if answer.scoring is not None:
                self._deliver([(answer, answer.read_prompt(answer.scoring.scores(self.model)))])
            if answer.ended_by is None:
                engine.add(answer.sequence)

    def _fail(self, text: str) -> None:
        """End the answers in an engine that failed."""
        self.failures += 1
        ended = [answer for answer in self._inside.values() if answer.ended_by is None]
        if not ended:  # the engine could not be made
            self._read_inbox(wait=not self._waiting)
            ended = [*self._waiting]
            self._waiting.clear()
        self._inside.clear()
        self._deliver([(answer, answer.end("error", text)) for answer in ended])
