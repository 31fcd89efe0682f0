"""Metrics for TensorBoard: every record is there, and what a resumed run does again is hidden."""

import importlib.util

import pytest

from lepton.cli.main import main
from lepton.train.metrics_log import MetricsLog
from lepton.train.tensorboard import FOLDER, TensorBoardLog

pytest.importorskip("tensorboard")


def scalars(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / FOLDER))
    events.Reload()
    return {name: [(each.step, each.value) for each in events.Scalars(name)] for name in events.Tags()["scalars"]}


def test_records_are_in_the_file_and_in_tensorboard(tmp_path):
    log = TensorBoardLog(tmp_path / "metrics.jsonl", 0)
    entries = [{"step": 1, "loss": 3.0}, {"step": 2, "loss": 2.0}, {"step": 2, "val_loss": 2.5}]
    for entry in entries:
        log.write(entry)
    log.sync()
    log.close()
    assert MetricsLog.read(tmp_path / "metrics.jsonl") == entries
    assert scalars(tmp_path) == {"loss": [(1, 3.0), (2, 2.0)], "val_loss": [(2, 2.5)]}


def test_steps_that_are_done_again_are_hidden(tmp_path):
    for first, losses in ((0, [5.0, 4.0, 3.0]), (1, [2.0, 1.0])):
        log = TensorBoardLog(tmp_path / "metrics.jsonl", first)
        for step, loss in enumerate(losses, first + 1):
            log.write({"step": step, "loss": loss})
        log.close()
    assert scalars(tmp_path)["loss"] == [(1, 5.0), (2, 2.0), (3, 1.0)]


def test_without_tensorboard_one_line_says_how_to_get_it(tmp_path, monkeypatch, capsys):
    real = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "tensorboard" else real(name))
    assert main(["train", "--model_size", "nano", "--tensorboard", "--checkpoint_dir", str(tmp_path / "run")]) == 2
    assert "--tensorboard needs tensorboard; get it with" in capsys.readouterr().err
