"""Requests under way: they give answers to the worker, and get its pieces in the event loop."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from lepton.model import Network
from lepton.serve.answer import Answer, Piece
from lepton.serve.limits import Refusal
from lepton.serve.worker import Worker

Result = TypeVar("Result")
Receive = Callable[[], Awaitable[Any]]


class ClientLeft(Exception):
    """The client has closed its connection."""


class Call:
    """A request under way. `pieces` gives what its answers gain."""

    def __init__(self, answers: list[Answer]) -> None:
        self.answers = answers
        self._arrived: asyncio.Queue[tuple[int, Piece]] = asyncio.Queue()
        self._index = {answer: i for i, answer in enumerate(answers)}

    def arrive(self, answer: Answer, piece: Piece) -> None:
        """Take in a piece of an answer."""
        self._arrived.put_nowait((self._index[answer], piece))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Yield pieces with the numbers of their answers, until all answers have ended.

        Raises:
            Refusal: an answer was ended by the server: its model fails, or it stops.
        """
        left = len(self.answers)
        while left:
            index, piece = await self._arrived.get()
            if piece.ended_by == "error":
                raise Refusal(f"the model failed: {piece.error}", code="model_failed", status=500)
            if piece.ended_by == "cancelled":
                raise stopping()
            left -= piece.ended_by is not None
            yield index, piece


def stopping() -> Refusal:
    """Return what those are told whom the server does not serve to the end."""
    return Refusal("the server is stopping; ask again later", code="stopping", status=503)


class Calls:
    """All requests under way, and the worker that serves them. But for its pieces, all happens in the event loop."""

    def __init__(self, model: Network, *, most: int, places: int, longest: int) -> None:
        """Make the worker, which `start` starts. At most `most` answers run or wait."""
        self.worker = Worker(model, self._deliver, places=places, longest=longest)
        self.cancelled = 0
        """Answers that were ended early, because their client left or their time was over."""
        self._most = most
        self._call_of: dict[Answer, Call] = {}
        self._loop: asyncio.AbstractEventLoop | None = None

    def start(self) -> None:
        """Start the worker; pieces go to the event loop that runs now."""
        self._loop = asyncio.get_running_loop()
        self.worker.start()

    @property
    def under_way(self) -> int:
        """Answers that run or wait."""
        return len(self._call_of)

    @contextlib.contextmanager
    def open(self, answers: list[Answer]) -> Any:
        """Let answers be generated inside the block, as a `Call`; those that have not ended at its end are cancelled.

        Raises:
            Refusal: too many are under way.
        """
        if self.under_way + len(answers) > self._most:
            text = f"{self.under_way} answers are under way, at most {self._most}: ask again later"
            raise Refusal(text, code="too_many_requests", status=429)
        call = Call(answers)
        self._call_of.update(dict.fromkeys(answers, call))
        self.worker.submit(answers)
        try:
            yield call
        finally:
            if left := [answer for answer in answers if self._call_of.pop(answer, None)]:
                self.cancelled += len(left)
                self.worker.cancel(left)

    def _deliver(self, added: list[tuple[Answer, Piece]]) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # the loop is closed: nobody waits for pieces
            self._loop.call_soon_threadsafe(self._arrive, added)

    def _arrive(self, added: list[tuple[Answer, Piece]]) -> None:
        for answer, piece in added:
            call = self._call_of.get(answer)
            if call is not None:
                call.arrive(answer, piece)
                if piece.ended_by is not None:
                    del self._call_of[answer]


async def watched(work: Awaitable[Result], receive: Receive, seconds: float) -> Result:
    """Return the result of `work`, which is cancelled when the client leaves or the time is over.

    Args:
        work: what is awaited.
        receive: ASGI's function; the body must have been read.
        seconds: the time that is left.

    Raises:
        ClientLeft: the client has closed the connection.
        Refusal: the time is over.
    """
    doing = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_left(receive))
    try:
        done, _ = await asyncio.wait({doing, leaving}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
        if doing in done:
            return doing.result()
        if leaving in done:
            raise ClientLeft
        text = "the request took longer than the server allows; ask for fewer tokens"
        raise Refusal(text, code="timeout", status=408)
    finally:
        for each in (doing, leaving):
            each.cancel()
        await asyncio.gather(doing, leaving, return_exceptions=True)


async def _left(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
