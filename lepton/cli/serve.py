"""`python -m lepton serve`: answer requests of OpenAI's form over HTTP."""

import argparse
import dataclasses
import ipaddress
import os
import sys
from pathlib import Path

from lepton.cli.loading import add_loading, choose, load_with_record
from lepton.errors import InputError
from lepton.requirements import need
from lepton.serve.limits import Limits
from lepton.values import whole

KEY = "LEPTON_API_KEY"
MAX_KEYS = 1 << 16
"""Bytes of all keys, at most."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add_loading(parser)
    parser.add_argument("--host", default="127.0.0.1", metavar="ADDRESS", help="where to listen (default: %(default)s)")
    parser.add_argument("--port", type=int, default=8000, metavar="N", help="0 takes a free one (default: %(default)s)")
    parser.add_argument("--name", default="lepton", metavar="NAME", help="the model's id (default: %(default)s)")
    parser.add_argument(
        "--api_key_file",
        metavar="FILE",
        help=f"file with the keys of clients, one a line (default: ${KEY}, if it is set)",
    )
    parser.add_argument(
        "--places", type=int, default=64, metavar="N", help="answers that are computed at once (default: %(default)s)"
    )
    parser.add_argument(
        "--warm_up", type=int, nargs="+", default=[], metavar="ROWS", help="compile for so many answers at once first"
    )
    parser.add_argument(
        "--drain_seconds", type=int, default=30, metavar="N", help="time to end after SIGTERM (default: %(default)s)"
    )
    parser.add_argument(
        "--conversations", type=int, default=64, metavar="N", help="conversations in memory (default: %(default)s)"
    )
    parser.add_argument(
        "--conversation_folder",
        metavar="DIR",
        help="where the others are kept, and all when the server ends (default: a folder that ends with it)",
    )
    for field in dataclasses.fields(Limits):
        help = f"limit: {field.metadata['help']} (default: %(default)s)"
        parser.add_argument(f"--{field.name}", type=int, default=field.default, metavar="N", help=help)


def run(args: argparse.Namespace) -> int:
    """Load the model, listen, and serve until SIGTERM or Ctrl-C."""
    limits = Limits(**{field.name: getattr(args, field.name) for field in dataclasses.fields(Limits)})
    whole("--places", args.places, 1)
    whole("--conversations", args.conversations, 1)
    whole("--drain_seconds", args.drain_seconds, 0, 1 << 20)
    for rows in args.warm_up:
        whole("--warm_up", rows, 1, args.places, "; give numbers up to --places")
    if not args.name or not args.name.isprintable() or "/" in args.name:
        raise InputError(f"--name {args.name!r}: give a name without slashes")
    keys = read_keys(args.api_key_file)
    local = is_loopback(args.host)
    if not local and not keys:
        raise InputError(
            f"--host {args.host}: others can reach this address, so clients must give a key: put one of your making in "
            f"a file and name it with --api_key_file, or in ${KEY}"
        )
    for name in ("starlette", "uvicorn"):
        need(name, "the server")
    from lepton.data.chat import ChatTemplate
    from lepton.engine.runners import Lease
    from lepton.runtime.device import freeze_objects
    from lepton.serve.app import Api
    from lepton.serve.conversations import Conversations
    from lepton.serve.requests import Reader
    from lepton.serve.server import listening, serve

    choose(args)
    listener = listening(args.host, args.port)
    with listener:
        say(f"loading {args.checkpoint}")
        model, tokenizer, record = load_with_record(args)
        talks = "chat" in (record.get("data") or {})
        reader = Reader(model, tokenizer, args.name, limits, ChatTemplate(tokenizer) if talks else None)
        kept = Conversations(
            model,
            in_memory=args.conversations,
            most=limits.max_conversations,
            folder=args.conversation_folder and Path(args.conversation_folder),
        )
        api = Api(reader, places=args.places, keys=keys, any_host=bool(keys), conversations=kept)
        if args.warm_up:
            with Lease(model, args.places, api.calls.worker.longest) as lease:
                for rows in sorted({*args.warm_up}):
                    lease.runner.warm_up(rows, say=say)
            freeze_objects()
        host = f"[{args.host}]" if ":" in args.host else args.host
        say(f"serving {args.name} at http://{host}:{listener.getsockname()[1]}/v1; Ctrl-C stops")
        serve(api, listener, drain_seconds=args.drain_seconds, say=say)
    return 0


def say(text: str) -> None:
    """Print a line on stderr."""
    print(text, file=sys.stderr, flush=True)


def is_loopback(host: str) -> bool:
    """Whether an address is reached from this machine alone."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def read_keys(path: str | None) -> tuple[str, ...]:
    """Return the keys in a file, one a line, or the one in the environment; there may be none.

    Raises:
        InputError: one is no key: empty, or with characters that a header cannot hold.
    """
    from lepton.files import read_bytes

    if path is None:
        place, key = f"${KEY}", os.environ.get(KEY)
        if key is None:
            return ()
        keys = [key]
    else:
        place, content = path, read_bytes(Path(path), "key", MAX_KEYS)
        keys = [line.strip() for line in content.decode("utf-8", "replace").splitlines() if line.strip()]
    for key in keys or [""]:
        if not key or not key.isascii() or not key.isprintable() or " " in key:
            raise InputError(f"{place}: a key has one or more printable ASCII characters without spaces")
    return tuple(keys)
