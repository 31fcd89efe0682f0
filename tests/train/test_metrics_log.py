import errno
import json
import os

import pytest

from lepton.errors import InputError
from lepton.train.metrics_log import LONGEST_LINE, MetricsLog


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


BAD_LINES = [
    b'{"step": 2, "lo\n', b'{"loss": 1.0}\n', b'{"step": "3"}\n', b'{"step": 3.0}\n', b'{"step": true}\n', b"[1]\n",
    b'{"step": 2, "loss": "\xff"}\n', b"\0\0\0\n", b"[" * 200_000 + b"\n",
]  # fmt: skip


@pytest.mark.parametrize("bad", BAD_LINES, ids=lambda line: repr(line[:20]))
def test_lines_that_are_no_records_are_kept_aside_and_nothing_else_is_lost(tmp_path, bad):
    path = tmp_path / "metrics.jsonl"
    good = [b'{"step": 1}\n', b'{"step": 3}\r\n', b'{"step": 4}\n', b'{"step": 5}\n']
    path.write_bytes(good[0] + bad + b"\n" + b"".join(good[1:]))
    assert MetricsLog.rewind(path, 4) == 1
    assert path.read_bytes() == b'{"step": 1}\n{"step": 3}\n{"step": 4}\n'
    aside = tmp_path / "metrics.jsonl.bad"
    assert aside.read_bytes() == bad
    assert MetricsLog.rewind(path, 4) == 0, "said once"
    assert aside.read_bytes() == bad


def test_a_line_without_an_end_is_read_in_pieces(tmp_path):
    line = b"x" * (5 * LONGEST_LINE // 2)
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line + b'\n{"step": 1}\n')
    assert MetricsLog.rewind(path, 4) == 3
    assert path.read_bytes() == b'{"step": 1}\n'
    assert (tmp_path / "metrics.jsonl.bad").read_bytes() == line + b"\n"


def full(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a full device")
def test_a_full_disk_is_one_line(tmp_path, monkeypatch):
    log = MetricsLog(tmp_path / "metrics.jsonl")
    log.write({"step": 1})
    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match=r"cannot write .*metrics\.jsonl: No space left on device; .* --resume auto"):
        log.sync()
    log.close()
    log._file = open("/dev/full", "ab", buffering=0)  # noqa: SIM115
    with pytest.raises(InputError, match=r"cannot write .*metrics\.jsonl: No space left on device"):
        log.write({"step": 2})
    log.close()
    assert MetricsLog.read(log.path) == [{"step": 1}]


def test_rewinding_nothing_makes_no_file(tmp_path):
    MetricsLog.rewind(tmp_path / "metrics.jsonl", 4)
    assert list(tmp_path.iterdir()) == []


def test_names_that_the_system_does_not_take_are_refused(tmp_path):
    for path in (tmp_path / ("x" * 300), str(tmp_path) + "\0"):
        with pytest.raises(InputError):
            MetricsLog.read(path) or MetricsLog.rewind(path, 1) or MetricsLog(path)
