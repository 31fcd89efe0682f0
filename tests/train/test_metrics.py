import io
import json

import pytest

from lepton.train.metrics import MetricsLog, Progress, Stopwatch, duration


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_log_appends_a_line_for_each_object(tmp_path):
    path = tmp_path / "new" / "metrics.jsonl"
    for step in (1, 2):
        log = MetricsLog(path)
        log.write({"step": step, "loss": 0.1})
        log.sync()
        log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1, "loss": 0.1},
        {"step": 2, "loss": 0.1},
    ]


def test_rewinding_drops_later_steps_and_a_torn_line(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 4, "loss": 1.5}, {"step": 4, "val_loss": 2.0}, {"step": 5, "loss": 1.4}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 6, "lo')
    MetricsLog.rewind(path, 4)
    assert MetricsLog.read(path) == lines[:2]
    assert path.read_text().endswith("}\n"), "the next line starts on its own"
    assert [file.name for file in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("torn", [b'{"step": 6, "loss": 1.', b"{", b"\xff\xfe{", b"\0\0", b"\n"])
def test_a_torn_end_of_any_kind_is_survived(tmp_path, torn):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 5, "loss": 1.5}\n' + torn)
    MetricsLog.rewind(path, 9)
    assert MetricsLog.read(path) == [{"step": 5, "loss": 1.5}]


def test_rewinding_nothing_makes_no_file(tmp_path):
    MetricsLog.rewind(tmp_path / "metrics.jsonl", 4)
    assert list(tmp_path.iterdir()) == []


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
