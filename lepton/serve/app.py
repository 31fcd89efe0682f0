"""The server's routes over HTTP, as an ASGI application of Starlette."""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Collection
from concurrent.futures import ThreadPoolExecutor
from importlib import resources
from typing import TYPE_CHECKING, Any

from lepton.serve.answer import Piece
from lepton.serve.calls import Call, Calls, ClientLeft, stopping, watched
from lepton.serve.conversation_routes import ConversationRoutes
from lepton.serve.conversations import Conversation, Conversations
from lepton.serve.http import OWNER, Guard, Observer, Receive, Scope, Send, event, read_body, reply
from lepton.serve.limits import Refusal
from lepton.serve.metrics import CONTENT_TYPE, Metrics, Sample
from lepton.serve.openapi import description
from lepton.serve.replies import Replies
from lepton.serve.requests import Reader, Task

if TYPE_CHECKING:
    from starlette.applications import Starlette
    from starlette.requests import Request


POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; connect-src 'self'; img-src data:"
PAGE_HEADERS = {
    "Content-Security-Policy": f"{POLICY}; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}

THREADS = 4
"""Threads that read requests, and read and write conversations. Each has an arena of the allocator for itself."""
CACHED_WORDS = 1000
"""Words whose tokens each of them remembers."""
LAST_SECONDS = 5.0
"""Seconds for the error that ends a stream to be taken."""


class Api:
    """What the routes do. `app` is the application."""

    def __init__(
        self,
        reader: Reader,
        *,
        places: int = 64,
        keys: Collection[str] = (),
        any_host: bool = False,
        conversations: Conversations | None = None,
    ) -> None:
        """Make the application of a model; its worker starts and ends with the application.

        Args:
            reader: the model, its tokenizer, its name and the limits of requests.
            places: answers that are computed at once.
            keys: one of these clients must give as `Authorization: Bearer KEY`; none: nothing.
            any_host: whether the server may be called by any name. Else by the names of this machine alone, so that no
                page of the web can reach it through a name of its own.
            conversations: those that are kept; None: in memory, and in a folder that ends with the application.
        """
        self.reader, self.limits, self.metrics = reader, reader.limits, Metrics()
        longest = min(self.limits.max_prompt + self.limits.max_tokens, self.limits.max_request)
        self.calls = Calls(reader.model, most=self.limits.max_streams, places=places, longest=longest)
        most = self.limits.max_conversations
        if conversations is None:
            conversations = Conversations(reader.model, in_memory=places, most=most)
        self.conversations = conversations
        reader.tokenizer.limit_cache(CACHED_WORDS)
        self._keys, self._any_host = keys, any_host
        self._created = int(time.time())
        self._description: dict[str, Any] = {}

    def app(self) -> "Starlette":
        """Return the application."""
        from starlette.applications import Starlette
        from starlette.exceptions import HTTPException
        from starlette.middleware import Middleware
        from starlette.routing import Route

        routes = [
            Route("/", self.page),
            Route("/health", self.health),
            Route("/metrics", self.show_metrics),
            Route("/openapi.json", self.describe),
            Route("/v1/models", self.models),
            Route("/v1/models/{name}", self.model),
            Route("/v1/completions", self.completions, methods=["POST"]),
            Route("/v1/chat/completions", self.chat, methods=["POST"]),
        ]
        routes += ConversationRoutes(self.reader, self.conversations).routes()
        paths = [route.path for route in routes]
        self._description = description(routes, self.reader, with_keys=bool(self._keys))
        return Starlette(
            routes=routes,
            middleware=[Middleware(Observer, self.metrics, paths), Middleware(Guard, self._keys, self._any_host)],
            exception_handlers={Refusal: _refused, HTTPException: _http_error, Exception: _failed},
            lifespan=self._lifespan,
        )

    @contextlib.asynccontextmanager
    async def _lifespan(self, _app: "Starlette") -> AsyncIterator[None]:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS, "requests"))
        await self.conversations.open()
        self.calls.start()
        yield
        await asyncio.to_thread(self.calls.worker.close)
        await self.conversations.close()

    async def page(self, request: "Request") -> Any:
        """`/`: a page to write with the model. It fetches nothing from elsewhere, nor may it."""
        from starlette.responses import HTMLResponse

        text = resources.files("lepton.serve").joinpath("page.html").read_text(encoding="utf-8")
        return HTMLResponse(text, headers=PAGE_HEADERS)

    async def health(self, request: "Request") -> Any:
        """`/health`: whether the server can answer, and how much it has to do."""
        worker = self.calls.worker
        figures = {"model": self.reader.name, "running": worker.running, "waiting": worker.waiting}
        ok = worker.is_alive
        return reply({"status": "ok" if ok else "failed"} | figures, 200 if ok else 503)

    async def show_metrics(self, request: "Request") -> Any:
        """`/metrics`: everything that is counted."""
        from starlette.responses import Response

        return Response(self.metrics.text(self._samples()), media_type=CONTENT_TYPE)

    async def describe(self, request: "Request") -> Any:
        """`/openapi.json`: all routes and what they take, as OpenAPI 3.1 says it."""
        return reply(self._description)

    async def models(self, request: "Request") -> Any:
        """`/v1/models`: the one model."""
        return reply({"object": "list", "data": [self._model()]})

    async def model(self, request: "Request") -> Any:
        """`/v1/models/NAME`: the model of this name."""
        name = request.path_params["name"]
        if name != self.reader.name:
            text = f"there is no model {name[:60]!r} here; choose {self.reader.name!r}"
            raise Refusal(text, param="model", code="model_not_found", status=404)
        return reply(self._model())

    async def completions(self, request: "Request") -> Any:
        """`/v1/completions`: the continuation of prompts."""
        return await self._answer(request, chat=False)

    async def chat(self, request: "Request") -> Any:
        """`/v1/chat/completions`: the next message of a conversation."""
        return await self._answer(request, chat=True)

    def _model(self) -> dict[str, Any]:
        model, limits = self.reader.model, self.limits
        thoughts = model.idea("thoughts")
        known = {"id": self.reader.name, "object": "model", "created": self._created, "owned_by": "lepton"}
        return known | {
            "parameters": model.num_params(),
            "ideas": sorted(model.ideas),
            "layers": model.config.layers,
            "stem_layers": model.config.stem_layers,
            "rounds": 0 if thoughts is None else thoughts.rounds,
            "max_tokens": limits.max_tokens,
            "max_think": limits.max_think,
            "risks": self.reader.risks,
            "costs": self.reader.costs,
        }

    async def _answer(self, request: "Request", *, chat: bool) -> Any:
        since = time.monotonic()
        body = await read_body(request, self.limits)
        task = await asyncio.to_thread(self.reader.task, body, chat=chat)
        return Answering(self, task, since)

    @contextlib.asynccontextmanager
    async def turn(self, task: Task, owner: str) -> AsyncIterator[Conversation | None]:
        """Let a conversation change inside the block, if the task goes on with one.

        Raises:
            Refusal: there is none, it is busy, or it would become too long.
        """
        if task.conversation is None:
            yield None
            return
        async with self.conversations.change(owner, task.conversation, create=True) as found:
            longest, before = self.calls.worker.longest, found.notes.tokens
            if self.reader.model.config.window is None and before + task.most_tokens > longest:
                text = f"the conversation has {before:,} tokens, and the model reads at most {longest:,}: begin another"
                raise Refusal(text, code="context_length_exceeded")
            yield found

    def _samples(self) -> list[Sample]:
        worker, stats = self.calls.worker, self.calls.worker.stats
        return [
            ("lepton_places", "gauge", "Answers that can be computed at once.", worker.places),
            ("lepton_answers_running", "gauge", "Answers that are computed now.", worker.running),
            ("lepton_answers_waiting", "gauge", "Answers that wait for a place.", worker.waiting),
            ("lepton_answers_cancelled_total", "counter", "Answers ended early by their client.", self.calls.cancelled),
            ("lepton_tokens_total", "counter", "New tokens.", stats.new_tokens),
            ("lepton_tokens_drafted_total", "counter", "Tokens that were drafted.", sum(stats.drafted)),
            ("lepton_tokens_accepted_total", "counter", "Drafted tokens that were right.", sum(stats.accepted)),
            ("lepton_passes_total", "counter", "Passes through the model.", stats.forward_calls),
            ("lepton_positions_total", "counter", "Tokens computed, those of prompts included.", stats.positions),
            ("lepton_blocks_total", "counter", "Blocks that these went through.", stats.blocks),
            ("lepton_conversations", "gauge", "Conversations that are kept.", self.conversations.count),
            ("lepton_conversations_in_memory", "gauge", "Those in memory.", self.conversations.in_memory),
            ("lepton_failures_total", "counter", "Errors of the engine.", worker.failures),
        ]


class Answering:
    """The reply to one task, as an ASGI application: whole, or streamed as events."""

    def __init__(self, api: Api, task: Task, since: float) -> None:
        self._api, self._task, self._since = api, task, since
        self._replies = Replies(task)
        self._started, self._has_text = False, False
        self._turn: Conversation | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Generate and send, until it is done, the client leaves or the time is over."""
        task, api = self._task, self._api
        try:
            async with api.turn(task, scope.get(OWNER, "")) as self._turn:
                past = None if self._turn is None else self._turn.state
                with api.calls.open(task.answers(past)) as call:
                    work = self._stream(call, send) if task.stream else self._whole(call)
                    found = await watched(work, receive, self._since + api.limits.max_seconds - time.monotonic())
        except ClientLeft:
            return
        except (Refusal, asyncio.CancelledError) as error:  # cancelled: the time to drain is over
            refusal = error if isinstance(error, Refusal) else stopping()
            if not self._started:
                raise refusal from None
            with contextlib.suppress(TimeoutError):  # who does not read is not waited for
                await asyncio.wait_for(send(_body(event(refusal.to_dict()))), LAST_SECONDS)
            return
        if found is not None:
            await reply(found)(scope, receive, send)
        api.metrics.request.add(time.monotonic() - self._since)

    async def _whole(self, call: Call) -> dict[str, Any]:
        pieces: list[list[Piece]] = [[] for _ in range(self._task.n * len(self._task.prompts))]
        async for index, piece in call.pieces():
            self._saw(piece, call)
            pieces[index].append(piece)
        return self._replies.whole(call.answers, pieces)

    async def _stream(self, call: Call, send: Send) -> None:
        """Send events. Nothing is sent before the first piece is there: until then, what fails has a status."""
        task, replies = self._task, self._replies
        count = task.n * len(task.prompts)
        pieces = call.pieces() if call.answers else _nothing(count)
        async for index, piece in pieces:
            self._saw(piece, call)
            if not self._started:
                self._started = True
                headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
                await send({"type": "http.response.start", "status": 200, "headers": headers})
                first = [replies.begin(i) for i in range(count)]
                await send(_body(*(event(each) for each in first if each is not None), more=True))
            chunk = replies.chunk(index, piece)
            if chunk is not None:
                await send(_body(event(chunk), more=True))
        usage = [event(replies.last(call.answers))] if task.include_usage else []
        await send(_body(*usage, b"data: [DONE]\n\n"))

    def _saw(self, piece: Piece, call: Call) -> None:
        """Count the time to the first text; with its end, before the client gets it, a turn is part of what is kept."""
        if not self._has_text and piece.text:
            self._api.metrics.first_token.add(time.monotonic() - self._since)
            self._has_text = True
        if self._turn is not None and piece.ended_by is not None:
            state = call.answers[0].state
            assert state is not None, "it is there before the end is told"
            self._api.conversations.commit(self._turn, state, turns=1)


async def _nothing(count: int) -> AsyncIterator[tuple[int, Piece]]:
    """Yield the ends of answers of no tokens."""
    for index in range(count):
        yield index, Piece(ended_by="length")


def _body(*parts: bytes, more: bool = False) -> dict[str, Any]:
    return {"type": "http.response.body", "body": b"".join(parts), "more_body": more}


async def _refused(_request: "Request", refusal: Exception) -> Any:
    assert isinstance(refusal, Refusal)
    return reply(refusal.to_dict(), refusal.status, {"Retry-After": "1"} if refusal.status == 429 else None)


async def _http_error(request: "Request", error: Any) -> Any:
    """Say in OpenAI's form that a path or a method is unknown."""
    text = {404: "there is no such path", 405: "this path takes another method"}.get(error.status_code, error.detail)
    refusal = Refusal(f"{request.method} {request.url.path[:60]}: {text}", status=error.status_code)
    return reply(refusal.to_dict(), refusal.status, error.headers)


async def _failed(_request: "Request", _error: Exception) -> Any:
    return reply(Refusal("the server failed; its log says why", status=500).to_dict(), 500)
