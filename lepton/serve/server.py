"""The server's process: its port, and its signals."""

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from lepton.errors import InputError, reason
from lepton.serve.app import Api

if TYPE_CHECKING:
    from uvicorn import Server

DRAIN_SECONDS = 30
"""Seconds that answers under way have, once the server is told to stop."""
BACKLOG = 2048
"""Connections that wait to be accepted."""


def listening(host: str, port: int) -> socket.socket:
    """Return a socket that listens; port 0 is any free one.

    Raises:
        InputError: there is no such address here, or the port is taken.
    """
    if not 0 <= port < 1 << 16:
        raise InputError(f"port {port}: must lie in 0..65535; 0 takes a free one")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except (OSError, UnicodeError) as error:
        raise InputError(f"cannot listen at {host}, port {port}: {reason(error)}; choose another --port") from None


def server_of(api: Api, *, drain_seconds: float = DRAIN_SECONDS) -> "Server":
    """Return uvicorn's server for an application; `run(sockets=[...])` runs it until `should_exit` is set."""
    import uvicorn

    return uvicorn.Server(
        uvicorn.Config(
            api.app(),
            loop="asyncio",
            http="h11",
            ws="none",
            lifespan="on",
            log_config=None,
            log_level="warning",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=int(drain_seconds),
        )
    )


def serve(api: Api, listener: socket.socket, *, drain_seconds: float, say: Callable[[str], None]) -> None:
    """Serve until SIGTERM or Ctrl-C: then no connection is accepted, and answers under way may end.

    A second signal ends them, too. After Ctrl-C it raises KeyboardInterrupt.
    """
    server = server_of(api, drain_seconds=drain_seconds)
    with _told_to_stop(say):
        server.run(sockets=[listener])


@contextlib.contextmanager
def _told_to_stop(say: Callable[[str], None]) -> Iterator[None]:
    """Let SIGTERM end the server and not the process: uvicorn raises it once more when all has been drained."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def drained(_signum: int, _frame: Any) -> None:
        say("stopped")

    before = signal.signal(signal.SIGTERM, drained)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
