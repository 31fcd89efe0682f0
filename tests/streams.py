"""A stream that acts on what is printed to it: how a test does something in the middle of a command or a run."""

import io
from collections.abc import Callable


class Watched(io.StringIO):
    """Calls `action` when `text` is printed for the `nth` time."""

    def __init__(self, text: str, action: Callable[[], object], *, nth: int = 1, terminal: bool = False) -> None:
        super().__init__()
        self._text, self._action, self._left, self._terminal = text, action, nth, terminal

    def write(self, text: str) -> int:
        written = super().write(text)
        if self._text in text:
            self._left -= 1
            if self._left == 0:
                self._action()
        return written

    def isatty(self) -> bool:
        return self._terminal
