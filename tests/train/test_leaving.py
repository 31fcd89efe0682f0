"""How a run ends before its last step: whatever asks it to stop, what it has reached is saved and goes on exactly."""

import errno
import io
import signal

import pytest

from lepton import checkpoint
from lepton.errors import InputError
from lepton.train import trainer
from lepton.train.folder import RunFolder
from lepton.train.signals import Interrupted
from lepton.train.trainer import train
from tests.train.small import Terminal, metrics_of, small_run, small_settings


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
    """`train ... | head -4`: the fourth line is that of step 2."""
    with pytest.raises(Interrupted, match=r"stopped at step 4, saved .*step_4\.pt; go on with --resume ") as stop:
        train(small_settings(data, tmp_path), stream=Pipe(4, BrokenPipeError(errno.EPIPE, "Broken pipe")))
    assert stop.value.exit_code == 141
    small_run(data, tmp_path, resume="auto")
    assert metrics_of(tmp_path) == metrics_of(finished)


def test_a_terminal_that_is_gone_does_not_stop_a_run_that_was_to_outlive_it(data, finished, tmp_path):
    """`train ... & disown`: no SIGHUP comes, and what is printed goes nowhere."""
    train(small_settings(data, tmp_path), stream=Pipe(2, OSError(errno.EIO, "Input/output error")))
    assert metrics_of(tmp_path) == metrics_of(finished)


@pytest.mark.parametrize("name", ["validation_loss", "sample_text"])
def test_a_signal_in_a_validation_or_a_sample_saves_after_it(data, finished, tmp_path, monkeypatch, name):
    function = getattr(trainer, name)
    calls = iter("12345")

    def interrupted(*args, **options):
        if next(calls) == "2":
            signal.raise_signal(signal.SIGTERM)
        return function(*args, **options)

    monkeypatch.setattr(trainer, name, interrupted)
    with pytest.raises(Interrupted) as stop:
        small_run(data, tmp_path, sample_every=2)
    monkeypatch.undo()
    (step,) = [step for step, _ in checkpoint.steps_in(tmp_path)][-1:]
    assert f"stopped at step {step}, saved {tmp_path / f'step_{step}.pt'}" in str(stop.value)
    small_run(data, tmp_path, resume="auto")
    assert metrics_of(tmp_path) == metrics_of(finished)


def test_a_signal_during_the_save_of_the_best_names_no_file_that_is_not_there(data, tmp_path, monkeypatch):
    save = RunFolder.save

    def interrupted(self, payload, *, best, step):
        if best and not step:
            signal.raise_signal(signal.SIGTERM)
        save(self, payload, best=best, step=step)

    monkeypatch.setattr(RunFolder, "save", interrupted)
    with pytest.raises(Interrupted, match="stopped at step 3"):
        small_run(data, tmp_path, eval_every=2, save_every=8)
    assert [step for step, _ in checkpoint.steps_in(tmp_path)] == [3]


def test_a_full_disk_while_metrics_are_written_is_one_line(data, tmp_path, monkeypatch):
    sync = trainer.MetricsRecorder.sync
    calls = iter("12345")

    def full(*args):
        raise OSError(errno.ENOSPC, "No space left on device")

    def synced(self):
        if next(calls) == "2":
            monkeypatch.setattr("os.fsync", full)
        sync(self)

    monkeypatch.setattr(trainer.MetricsRecorder, "sync", synced)
    with pytest.raises(InputError, match=r"cannot write .*metrics\.jsonl: No space left on device; "):
        small_run(data, tmp_path)
    assert checkpoint.load(tmp_path / "step_4.pt")["step"] == 4
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_a_second_run_in_a_folder_is_refused_and_touches_nothing(data, finished, tmp_path, monkeypatch):
    refused = []
    step = trainer.Trainer._train_step

    def with_a_second_run(self, micro_step):
        if self.step == 6:
            monkeypatch.undo()
            for resume in (None, "auto", str(tmp_path / "step_4.pt")):
                with pytest.raises(InputError, match="is in use by another run"):
                    small_run(data, tmp_path, seed=1, resume=resume)
                refused.append(resume)
        step(self, micro_step)

    monkeypatch.setattr(trainer.Trainer, "_train_step", with_a_second_run)
    small_run(data, tmp_path)
    assert len(refused) == 3
    assert metrics_of(tmp_path) == metrics_of(finished)
    assert not (tmp_path / "previous-1").exists()


def test_a_run_among_several_processes_is_refused_before_it_makes_a_folder(data, tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match=r"WORLD_SIZE=2: a launcher such as torchrun started several processes"):
        small_run(data, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_on_a_terminal_the_last_line_is_wiped_before_what_follows(data, tmp_path, monkeypatch):
    stream = Terminal()
    monkeypatch.setattr(trainer.Trainer, "_save", lambda self, **kinds: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(Interrupted):
        train(small_settings(data, tmp_path, save_every=1, max_steps=3), stream=stream)
    assert "\rvalidating ..." in stream.getvalue()
    assert stream.getvalue().endswith(" \r")
