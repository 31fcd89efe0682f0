"""How a run ends before its last step: whatever asks it to stop, what it has reached is saved and goes on exactly."""

import errno
import io
import os
import signal
from functools import partial
from pathlib import Path

import pytest

from lepton import checkpoint
from lepton.errors import InputError
from lepton.train.stop_request import Interrupted
from lepton.train.trainer import train
from tests.streams import Watched
from tests.train.small import metrics_of, small_run, small_settings

terminate = partial(signal.raise_signal, signal.SIGTERM)


@pytest.fixture(scope="module")
def finished(data, tmp_path_factory):
    """The folder of a run of 8 steps."""
    out = tmp_path_factory.mktemp("finished") / "out"
    small_run(data, out)
    return out


class Pipe(io.StringIO):
    """A pipe whose reader leaves after some lines, or a terminal that closes."""

    def __init__(self, lines, error):
        super().__init__()
        self.lines, self.error = lines, error

    def write(self, text):
        self.lines -= text.count("\n")
        if self.lines < 0:
            raise self.error
        return super().write(text)


def test_a_reader_that_leaves_stops_the_run_after_a_save(data, finished, tmp_path):
    """`train ... | head -5`: the fifth line is that of step 2."""
    with pytest.raises(Interrupted, match=r"stopped at step 4, saved .*step_4\.pt; go on with --resume ") as stop:
        train(small_settings(data, tmp_path), stream=Pipe(5, BrokenPipeError(errno.EPIPE, "Broken pipe")))
    assert stop.value.exit_code == 141
    small_run(data, tmp_path, resume="auto")
    assert metrics_of(tmp_path) == metrics_of(finished)


def test_a_terminal_that_is_gone_does_not_stop_a_run_that_was_to_outlive_it(data, finished, tmp_path):
    """`train ... & disown`: no SIGHUP comes, and what is printed goes nowhere."""
    train(small_settings(data, tmp_path), stream=Pipe(2, OSError(errno.EIO, "Input/output error")))
    assert metrics_of(tmp_path) == metrics_of(finished)


@pytest.mark.parametrize("hint", ["validating ...", "writing a sample ..."])
def test_a_signal_in_a_validation_or_a_sample_saves_after_it(data, finished, tmp_path, hint):
    with pytest.raises(Interrupted) as stop:
        train(small_settings(data, tmp_path, sample_every=2), stream=Watched(hint, terminate, nth=2, terminal=True))
    (step,) = [step for step, _ in checkpoint.steps_in(tmp_path)][-1:]
    assert f"stopped at step {step}, saved {tmp_path / f'step_{step}.pt'}" in str(stop.value)
    small_run(data, tmp_path, resume="auto")
    assert metrics_of(tmp_path) == metrics_of(finished)


def test_a_signal_during_the_save_of_the_best_names_no_file_that_is_not_there(data, tmp_path, monkeypatch):
    replace = os.replace

    def interrupted(unfinished, path):
        if Path(path).name == "best.pt":
            terminate()
        replace(unfinished, path)

    monkeypatch.setattr("os.replace", interrupted)
    with pytest.raises(Interrupted, match="stopped at step 3"):
        small_run(data, tmp_path, eval_every=2, save_every=8)
    assert [step for step, _ in checkpoint.steps_in(tmp_path)] == [3]


def test_a_full_disk_while_metrics_are_written_is_one_line(data, tmp_path, monkeypatch):
    fsync, metrics = os.fsync, tmp_path / "metrics.jsonl"
    calls = iter("12345")

    def full(file):
        if os.path.samestat(os.fstat(file), metrics.stat()) and next(calls) == "2":
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(file)

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError, match=r"cannot write .*metrics\.jsonl: No space left on device; "):
        small_run(data, tmp_path)
    assert checkpoint.load(tmp_path / "step_4.pt")["step"] == 4
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_second_run_in_a_folder_is_refused_and_touches_nothing(data, finished, tmp_path):
    refused = []

    def start_another():
        for resume in (None, "auto", str(tmp_path / "step_4.pt")):
            with pytest.raises(InputError, match="is in use by another run"):
                small_run(data, tmp_path, seed=1, resume=resume)
            refused.append(resume)

    train(small_settings(data, tmp_path), stream=Watched("step 6/8", start_another))
    assert len(refused) == 3
    assert metrics_of(tmp_path) == metrics_of(finished)
    assert not (tmp_path / "previous-1").exists()


def test_a_run_among_several_processes_is_refused_before_it_makes_a_folder(data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"WORLD_SIZE=2: a launcher other than torchrun started several processes"):
        small_run(data, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_on_a_terminal_the_last_line_is_wiped_before_what_follows(data, tmp_path):
    stream = Watched("step 1/3", terminate, terminal=True)
    with pytest.raises(Interrupted):
        train(small_settings(data, tmp_path, log_every=1, max_steps=3), stream=stream)
    assert "\rvalidating ..." in stream.getvalue()
    assert stream.getvalue().endswith(" \r")
