"""Signals: after the first one the loop saves at the end of its step; a second Ctrl-C ends the run at once."""

import contextlib
import os
import signal
import threading
from types import FrameType
from typing import Any

NAMES = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU", "SIGBREAK")
"""Signals that end a process and leave it time: from a keyboard, a terminal that closes (SIGHUP), a scheduler that
announces the end of a job's time (SIGUSR1, SIGUSR2, SIGXCPU), and Windows' console (SIGBREAK)."""
SIGPIPE = 13
"""Signal number in the exit code when the reader of a pipe has left, on every platform."""


class Interrupted(Exception):
    """The run was asked to stop, and has saved what there was to save."""

    def __init__(self, signum: int, message: str) -> None:
        super().__init__(message)
        self.exit_code = 128 + signum


class StopRequest:
    """While entered, records the signals of NAMES in `signum`, which then do not end the process.

    One that is ignored stays ignored: `nohup` and shells that start a job in the background rely on it.
    """

    def __init__(self, *, says: bool = True) -> None:
        """`says`: whether this process prints that a signal has come; of several, one does."""
        self._says = says
        self.signum: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handlers
            for signum in (getattr(signal, name) for name in NAMES if hasattr(signal, name)):
                before = signal.getsignal(signum)
                if before not in (signal.SIG_IGN, None):  # None: it belongs to code outside Python
                    self._before[signum] = signal.signal(signum, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, frame: FrameType | None) -> None:
        if self.signum is not None and signum == signal.SIGINT:
            raise KeyboardInterrupt
        self.signum = signum
        if not self._says:
            return
        text = (
            f"\n{signal.Signals(signum).name}: stopping after this step, then saving; a further Ctrl-C leaves at once\n"
        )
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, text.encode())  # print may have been interrupted halfway
