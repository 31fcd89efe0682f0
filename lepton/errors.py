"""The one exception that stands for a user's mistake, and the nearest-match helper its messages use."""

import contextlib
import difflib
from collections.abc import Iterable, Iterator

LONGEST = 800
"""Most characters of a message. Of a longer one the middle is left out: the value stands first, the fix last."""


class InputError(ValueError):
    """A value from outside (a flag, a file, an argument) that cannot be used.

    The message is one line that names the value and the fix. The command line prints it as
    ``error: ...`` and leaves with exit code 2; in Python it is an ordinary ``ValueError``.
    """

    def __init__(self, message: object = "") -> None:
        text = " ".join(str(message).splitlines())  # a name or a library's text may have line breaks, or any length
        half = LONGEST // 2
        super().__init__(text if len(text) <= LONGEST else f"{text[: half - 5]} ... {text[-half:]}")


def nearest(name: object, choices: Iterable[str]) -> str:
    """Return ``"; did you mean 'x'?"`` for the closest of `choices`, or a list of all of them."""
    choices = list(choices)
    close = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else f"; choose from {', '.join(choices)}"


def reason(error: BaseException) -> str:
    """Return the first line of an error's text, or its type if the text is empty."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


@contextlib.contextmanager
def naming(place: object) -> Iterator[None]:
    """Put `place`, such as the file of a wrong value, before the message of every `InputError` raised inside."""
    try:
        yield
    except InputError as error:
        raise InputError(f"{place}: {error}") from error


def shown(value: object) -> str:
    """Return a value as a message can show it: on one line, and not too long."""
    if isinstance(value, int) and value.bit_length() > 1000:  # Python prints no int of thousands of digits
        return f"a number of {value.bit_length():,} bits"
    try:
        text = " ".join(repr(value).split())
    except Exception:  # such as lists in lists without end: a message must never fail
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
