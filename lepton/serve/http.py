"""What the routes share: bodies of requests, replies, keys, and the count of requests."""

import asyncio
import hashlib
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
OWNER = "lepton.owner"
"""Where a request's scope holds a digest of the key that was given; it is empty where there are no keys."""
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
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise Refusal("give the body as JSON, with the header Content-Type: application/json", status=415)
    return await read_content(request, limits.max_body, limits.max_seconds)


async def read_content(request: "Request", most: int, seconds: float) -> bytes:
    """Return the body of a request, whatever it holds: at most `most` bytes, in at most `seconds`.

    Raises:
        Refusal: it is too large, or takes too long.
    """
    from starlette.requests import ClientDisconnect

    too_large = Refusal(f"the body has more than {most:,} bytes", code="body_too_large", status=413)
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length[:20]) > most:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(seconds):
            async for part in request.stream():
                parts.append(part)
                size += len(part)
                if size > most:
                    raise too_large
    except ClientDisconnect:
        raise Refusal("the client left", status=CLIENT_LEFT) from None
    except TimeoutError:
        raise Refusal("the body did not arrive in time", code="timeout", status=408) from None
    return b"".join(parts)


class Guard:
    """Lets in those who have a key, and where there is none those who call this machine by its own name."""

    def __init__(self, app: Any, keys: Collection[str], any_host: bool) -> None:
        self._app, self._keys, self._any_host = app, [key.encode() for key in keys], any_host

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or raise a Refusal."""
        if scope["type"] == "http":
            headers = dict(scope["headers"])
            key = self._key(headers)
            refusal = self._host(headers) or self._without_key(scope["path"], key)
            scope[OWNER] = "" if key is None else hashlib.sha256(b"owner of conversations: " + key).hexdigest()[:32]
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

    def _key(self, headers: dict[bytes, bytes]) -> bytes | None:
        """Return the key that was given, if it is one."""
        kind, _, given = headers.get(b"authorization", b"").partition(b" ")
        if kind.lower() != b"bearer":
            return None
        found = [key for key in self._keys if hmac.compare_digest(given.strip(), key)]
        return found[0] if found else None

    def _without_key(self, path: str, key: bytes | None) -> Refusal | None:
        if not self._keys or key is not None or path in OPEN:
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
