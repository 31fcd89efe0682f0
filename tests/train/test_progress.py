import errno
import io

import pytest

from lepton.train.progress import Progress, Stopwatch, duration
from tests.train.small import Terminal


def test_progress_is_plain_lines_where_there_is_no_terminal():
    stream = io.StringIO()
    progress = Progress(stream)
    progress.update("step 1")
    progress.say("saved")
    progress.update("step 2")
    assert stream.getvalue() == "step 1\nsaved\nstep 2\n"


def test_progress_is_one_moving_line_on_a_terminal():
    stream = Terminal()
    progress = Progress(stream)
    progress.update("step 10, long")
    progress.update("step 11")
    progress.say("saved")
    assert "\n" not in stream.getvalue().partition("saved")[0]
    shown = ""
    for piece in stream.getvalue().removesuffix("saved\n").split("\r"):
        shown = piece + shown[len(piece) :]
    assert shown.strip() == "", "the line is wiped before another one stays"


def test_progress_never_wraps(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    stream = Terminal()
    Progress(stream).update("x" * 50)
    assert stream.getvalue() == "\r" + "x" * 19


class Failing(io.StringIO):
    """A stream that takes no more."""

    def __init__(self, error):
        super().__init__()
        self.error = error

    def write(self, text):
        raise self.error


def test_what_cannot_be_printed_stops_nothing_and_a_closed_pipe_is_noted():
    for error, closed in ((BrokenPipeError(errno.EPIPE, ""), True), (OSError(errno.EIO, ""), False)):
        progress = Progress(Failing(error))
        progress.say("step 1")
        progress.update("step 2")
        assert progress.closed == closed
    Progress(None).say("no stream at all")


def test_a_console_without_a_character_shows_a_question_mark():
    buffer = io.BytesIO()
    console = io.TextIOWrapper(buffer, encoding="cp1252")
    Progress(console).say("日本 é")
    assert buffer.getvalue().decode("cp1252").rstrip() == "?? é"


def test_a_terminal_is_shown_what_takes_a_moment():
    stream = Terminal()
    progress = Progress(stream)
    progress.hint("validating ...")
    progress.clear()
    assert stream.getvalue() == "\rvalidating ...\r" + " " * 14 + "\r"
    stream = io.StringIO()
    Progress(stream).hint("validating ...")
    assert stream.getvalue() == ""


def test_the_stopwatch_counts_laps(monkeypatch):
    now = iter([10.0, 12.0, 15.0])
    monkeypatch.setattr("time.perf_counter", lambda: next(now))
    watch = Stopwatch()
    assert (watch.lap(), watch.lap()) == (2.0, 3.0)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.4, "0 s"),
        (45, "45 s"),
        (89.4, "89 s"),
        (90, "2 min"),
        (3600, "60 min"),
        (7500, "2 h 05 min"),
        (3e5, "3 d 11 h"),
    ],
)
def test_durations_for_people(seconds, text):
    assert duration(seconds) == text
