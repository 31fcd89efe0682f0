"""`python -m lepton COMMAND`: find the command, run it, and turn a user's mistake into one line and an exit code."""

import contextlib
import importlib
import os
import sys
from collections.abc import Callable, Sequence

from lepton import __version__, requirements
from lepton.cli.arguments import Parser
from lepton.errors import InputError, nearest

COMMANDS = {
    "train": "train a model; without --data_dir on the source of Python's standard library",
    "generate": "continue a prompt with a trained model",
    "chat": "talk with a model that was fine-tuned on conversations",
    "serve": "serve a model over HTTP, with an API like OpenAI's and a page for the browser",
    "eval": "measure a checkpoint on held-out text",
    "calibrate": "calibrate a checkpoint's uncertainty, or find thresholds for abstaining and skipping blocks",
    "tune": "train a checkpoint's drafter on the model's own text: faster drafts, the same text",
    "plot": "draw loss, gradients and speed of runs side by side",
    "export": "write the weights alone, as safetensors or as a folder for transformers",
    "prepare": "turn text, code, tables or conversations into training shards",
    "tokenizer": "train a tokenizer",
    "sizes": "list the model sizes, counted on the built models",
}
"""Each command is the module ``lepton.cli.<name>`` with ``add_arguments(parser)`` and ``run(args) -> int``.

What needs torch is imported inside ``run``, so that help and mistakes in flags appear at once.
"""

BAD_INPUT, INTERRUPTED, PIPE_CLOSED = 2, 130, 141
"""Exit codes: a user's mistake, Ctrl-C (128 + SIGINT), a reader that left early (128 + SIGPIPE)."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that `argv` (default: the process's arguments) names and return the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    return guarded(lambda: _dispatch(words))


def run_command(name: str, argv: Sequence[str], *, prog: str | None = None) -> int:
    """Run the command `name` with its own arguments `argv`; `prog` is the name that its help shows.

    Returns 0, 2 for a user's mistake, 130 after Ctrl-C, or what the command itself returns. ``train.py`` uses it too.
    """
    return guarded(lambda: _parse_and_run(name, argv, prog or f"python -m lepton {name}"))


def _dispatch(words: list[str]) -> int:
    if not words:
        print(overview(), file=sys.stderr)
        return BAD_INPUT
    name, *rest = words
    if name in ("-h", "--help"):
        print(overview())
    elif name == "--version":
        print(__version__)
    elif name in COMMANDS:
        return _parse_and_run(name, rest, f"python -m lepton {name}")
    elif name.startswith("-"):
        raise InputError(f"unknown flag '{name}': a command comes first{nearest(name, COMMANDS)}")
    else:
        raise InputError(f"unknown command '{name}'{nearest(name, COMMANDS)}")
    return 0


def _parse_and_run(name: str, argv: Sequence[str], prog: str) -> int:
    command = importlib.import_module(f"lepton.cli.{name}")
    parser = Parser(prog=prog, description=COMMANDS[name])
    command.add_arguments(parser)
    args = parser.parse_args(argv)
    requirements.check()
    code: int = command.run(args)
    return code


def guarded(action: Callable[[], int]) -> int:
    """Return `action`'s exit code; a user's mistake, Ctrl-C and a closed pipe become theirs, without a traceback."""
    _hold_standard_streams()
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")  # a character that the console lacks (cp1252) prints as "?"
    try:
        code = action()
    except (InputError, requirements.MissingLibrary) as error:
        code = _fail(str(error))
    except KeyboardInterrupt:
        code = INTERRUPTED
    except BrokenPipeError:
        code = PIPE_CLOSED
    except OSError as error:
        if error.errno is None:
            raise
        place = "" if error.filename is None else f"{error.filename}: "
        code = _fail(f"{place}{error.strerror}")
    except SystemExit as leave:  # --help leaves this way
        code = leave.code if isinstance(leave.code, int) else 0
    return _flushed(code)


def complain(text: str) -> None:
    """Print a line on stderr, or nothing where nobody is left to read it."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def _fail(text: str) -> int:
    complain(f"error: {text}")
    return BAD_INPUT


def _flushed(code: int) -> int:
    """Return the exit code after all that was printed has left; what nobody takes does not count as printed."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError as error:
            # It goes nowhere, so that the interpreter's own last flush stays quiet.
            with contextlib.suppress(OSError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
            if code == 0:
                code = PIPE_CLOSED if isinstance(error, BrokenPipeError) else _fail(f"output: {error.strerror}")
    return code


def _hold_standard_streams() -> None:
    """Connect standard streams that are closed (`>&-`) to the null device.

    Otherwise the next file that is opened, such as a checkpoint, has their number, and gets what is printed.
    """
    for number, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115  (until the process ends)


def overview() -> str:
    """Return the help of `python -m lepton`: the commands, a line each."""
    lines = [f"  {name:<11}{help}" for name, help in COMMANDS.items()]
    return "\n".join(
        [
            "usage: python -m lepton COMMAND [flags]",
            "",
            *lines,
            "",
            "generate, chat, serve and eval take the model that comes with LEPTON, or --checkpoint FILE.",
            "For a model of your own run train; with text of your own, prepare comes before.",
            "python -m lepton COMMAND --help lists its flags.",
        ]
    )
