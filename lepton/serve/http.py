"""What the routes share: bodies of requests, replies, keys, and the count of requests."""

import asyncio
import hmac
import json
from collections.abc import Awaitable, Callable, Collection
from typing import TYPE_CHECKING, Any

from lepton.serve.limits import Limits, Refusal
from lepton.serve.metrics import Metrics

if TYPE_CHECKING:
    from starlette.requests import Request

Scope = dict[str, Any]
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]

OPEN = ("/", "/health")
"""Paths that need no key."""
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")
"""Names by which a machine calls itself."""
CLIENT_LEFT = 499
"""Status under which a request is counted whose client left; nobody gets it."""


def event(value: object) -> bytes:
    """Return a server-sent event."""
    return b"data: " + json.dumps(value, allow_nan=False).encode() + b"\n\n"


def reply(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Any:
    """Return a response of JSON, in ASCII: lone surrogates in it could not be encoded otherwise."""
    from starlette.responses import Response

    text = json.dumps(value, allow_nan=False)
    return Response(text, status_code=status, media_type="application/json", headers=headers)


async def read_body(request: "Request", limits: Limits) -> bytes:
    """Return the body of a request.

    Raises:
        Refusal: it is too large, takes too long, or is not said to be JSON. A page of the web can send other types to a
            server on this machine without asking it first.
    """
    from starlette.requests import ClientDisconnect

    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal("give the body as JSON, with the header Content-Type: application/json", status=415)
    too_large = Refusal(f"the body has more than {limits.max_body:,} bytes", code="body_too_large", status=413)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > limits.max_body:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(limits.max_seconds):
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > limits.max_body:
                    raise too_large
    except ClientDisconnect:
        raise Refusal("the client left", status=CLIENT_LEFT) from None
    except TimeoutError:
        raise Refusal("the body did not arrive in time", code="timeout", status=408) from None
    return b"".join(parts)


class Guard:
    """Lets in those who have the key, and where there is none those who call this machine by its own name."""

    def __init__(self, app: Any, key: str | None, any_host: bool) -> None:
        self._app, self._key, self._any_host = app, key, any_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or raise a Refusal."""
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            refusal = self._host(headers) or self._without_key(scope["path"], headers)
            if refusal is not None:
                more = {"WWW-Authenticate": "Bearer"} if refusal.status == 401 else None
                await reply(refusal.to_dict(), refusal.status, more)(scope, receive, send)
                return
        await self._app(scope, receive, send)

    def _host(self, headers: dict[bytes, bytes]) -> Refusal | None:
        name = headers.get(b"host", b"localhost").decode("latin-1").lower()
        if not name.endswith("]"):
            name = name.rpartition(":")[0] or name
        if self._any_host or name in LOOPBACK:
            return None
        return Refusal(f"this server is not called {name[:60]!r}: use http://localhost", code="wrong_host", status=403)

    def _without_key(self, path: str, headers: dict[bytes, bytes]) -> Refusal | None:
        if self._key is None or path in OPEN:
            return None
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() == b"bearer" and hmac.compare_digest(given.strip(), self._key.encode()):
            return None
        return Refusal("give the server's key: Authorization: Bearer KEY", code="invalid_api_key", status=401)


class Observer:
    """Counts requests by path and status; all paths but `paths` are counted as one."""

    def __init__(self, app: Any, metrics: Metrics, paths: Collection[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status = CLIENT_LEFT  # unless a reply begins

        async def noted(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        try:
            await self._app(scope, receive, noted)
        except Exception:
            status = 500
            raise
        finally:
            path = scope["path"] if scope["path"] in self._paths else "other"
            self._metrics.count(path, status)
