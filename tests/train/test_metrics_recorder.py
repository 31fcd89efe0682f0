import io
import json

import pytest
import torch

from lepton.errors import InputError
from lepton.train.metrics_log import MetricsLog
from lepton.train.metrics_recorder import MetricsRecorder
from lepton.train.progress import MOVES_AFTER, Progress
from tests.train.small import Terminal


@pytest.fixture
def gpu(monkeypatch):
    """A GPU, as far as torch reports."""
    monkeypatch.setattr("torch.cuda.get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda device: 2_500_000_000)
    return torch.device("cuda")


@pytest.fixture
def made(tmp_path):
    """A recorder of ten steps, and functions that return what it wrote and showed."""
    stream = io.StringIO()
    log = MetricsLog(tmp_path / "metrics.jsonl")
    recorder = MetricsRecorder(log, Progress(stream), torch.device("cpu"), flops_per_target=1e6, first=0, last=10)
    yield recorder, lambda: MetricsLog.read(log.path), stream.getvalue
    recorder.close()


@pytest.fixture
def wait(monkeypatch):
    """A clock that stands still until this is called with a number of seconds."""
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])

    def pass_time(seconds):
        now[0] += seconds

    return pass_time


def add(recorder, step, loss=2.0, norm=1.0):
    recorder.add(step, {"loss": torch.tensor(loss), "grad_norm": torch.tensor(norm)}, lr=1e-3, targets=100)


def test_steps_are_written_when_it_flushes(made):
    recorder, written, _ = made
    for step in (1, 2):
        add(recorder, step, loss=2.0 / step)
    recorder.sync()
    assert [(entry["step"], entry["loss"], entry["lr"]) for entry in written()] == [(1, 2.0, 1e-3), (2, 1.0, 1e-3)]
    assert all(entry["tokens_per_s"] > 0 for entry in written())
    recorder.sync()
    assert len(written()) == 2


def test_a_line_for_people(made):
    recorder, _, shown = made
    add(recorder, 1)
    recorder.show()
    assert shown().startswith("step 1/10  loss 2.000  lr 1.0e-03  ")
    assert "tokens/s" in shown()
    assert shown().endswith("left\n")
    add(recorder, 10)
    recorder.show()
    assert "left" not in shown().splitlines()[-1]


def test_a_line_on_a_gpu_has_utilisation_and_memory(tmp_path, gpu, wait):
    stream, log = io.StringIO(), MetricsLog(tmp_path / "metrics.jsonl")
    recorder = MetricsRecorder(log, Progress(stream), gpu, flops_per_target=1e12, first=0, last=10)
    wait(0.25)
    add(recorder, 1)  # 100 tokens
    recorder.show()
    recorder.close()
    assert MetricsLog.read(log.path)[0]["tokens_per_s"] == 400
    assert "  40 % of the GPU's peak  2.5 GB" in stream.getvalue()


def test_on_a_terminal_the_line_moves_while_a_step_runs(tmp_path, wait):
    stream, log = Terminal(), MetricsLog(tmp_path / "metrics.jsonl")
    recorder = MetricsRecorder(log, Progress(stream), torch.device("cpu"), flops_per_target=1e6, first=0, last=4)
    recorder.move(1, 0.5)
    assert stream.getvalue() == "", "not more often than someone reads it"
    wait(MOVES_AFTER)
    recorder.move(1, 0.5)
    assert stream.getvalue().startswith("\rstep 1/4 (50%)  ")
    assert stream.getvalue().endswith(" left")
    add(recorder, 1)
    recorder.show()
    wait(MOVES_AFTER)
    recorder.move(2, 0.25)
    last = stream.getvalue().rpartition("\r")[2]
    assert last.startswith("step 2/4 (25%)  loss 2.000  lr 1.0e-03  ")
    assert last.rstrip().endswith(" left")
    recorder.close()


def test_elsewhere_nothing_moves(made, wait):
    recorder, _, shown = made
    wait(MOVES_AFTER)
    recorder.move(1, 0.5)
    assert shown() == ""


@pytest.mark.parametrize("bad", [{"loss": float("nan")}, {"norm": float("inf")}])
def test_a_figure_that_is_not_finite_stops(made, bad):
    recorder, written, _ = made
    add(recorder, 1)
    add(recorder, 2, **bad)
    add(recorder, 3)
    with pytest.raises(InputError, match=r"is (nan|inf) at step 2; .*lower --lr"):
        recorder.sync()
    recorder.sync()
    assert [entry["step"] for entry in written()] == [1]
    with pytest.raises(InputError, match="val_loss is nan"):
        recorder.note({"step": 3, "val_loss": float("nan")})
    assert len(json.dumps(written())) > 0
