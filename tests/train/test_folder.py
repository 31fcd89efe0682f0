import os

import pytest
import torch

from lepton import checkpoint
from lepton.errors import InputError
from lepton.train.folder import RunFolder


def payload(step):
    return {"model": {"w": torch.ones(3)}, "config": {}, "step": step}


def names(folder):
    return sorted(path.relative_to(folder.path).as_posix() for path in folder.path.rglob("*") if path.is_file())


def test_the_newest_are_kept_and_best_and_final_always(tmp_path):
    folder = RunFolder(tmp_path, keep=2)
    for step in (5, 10, 15, 100):
        folder.save(payload(step), best=step == 5, step=True)
    folder.finish(payload(100))
    assert names(folder) == ["best.pt", "final.pt", "step_100.pt", "step_15.pt"]
    assert checkpoint.load(tmp_path / "best.pt")["step"] == 5
    assert checkpoint.load(tmp_path / "final.pt")["step"] == 100


def test_a_failed_save_deletes_nothing(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path, keep=1)
    folder.save(payload(5), best=True, step=True)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(InputError):
        folder.save(payload(10), best=True, step=True)
    assert names(folder) == ["best.pt", "step_5.pt"]
    assert checkpoint.load(tmp_path / "best.pt")["step"] == 5


def test_a_best_one_between_checkpoints_is_saved_alone(tmp_path):
    folder = RunFolder(tmp_path, keep=1)
    folder.save(payload(5), best=False, step=True)
    folder.save(payload(7), best=True, step=False)
    assert names(folder) == ["best.pt", "step_5.pt"]
    assert checkpoint.load(tmp_path / "best.pt")["step"] == 7


def test_the_final_one_needs_no_step_file(tmp_path):
    folder = RunFolder(tmp_path, keep=1)
    assert checkpoint.load(folder.finish(payload(3)))["step"] == 3


def test_a_fresh_run_moves_an_earlier_one_aside(tmp_path):
    folder = RunFolder(tmp_path, keep=3)
    assert folder.set_aside() is None
    for n in (1, 2):
        folder.save(payload(5), best=True, step=True)
        folder.metrics.write_text("{}\n")
        assert folder.set_aside() == tmp_path / f"previous-{n}"
        moved = ("best.pt", "metrics.jsonl", "step_5.pt")
        assert names(folder) == [f"previous-{i}/{name}" for i in range(1, n + 1) for name in moved]
    folder.metrics.write_text("{}\n")
    assert folder.set_aside() is None, "a run without a checkpoint leaves nothing worth keeping"
    assert not folder.metrics.exists()


def test_resuming_moves_only_what_lies_after(tmp_path):
    folder = RunFolder(tmp_path, keep=5)
    for step in (5, 10, 15):
        folder.save(payload(step), best=True, step=True)
    folder.metrics.write_text("{}\n")
    assert folder.set_aside(after=15) is None
    assert folder.set_aside(after=10) == tmp_path / "previous-1"
    moved = ["previous-1/best.pt", "previous-1/metrics.jsonl", "previous-1/step_15.pt"]
    assert names(folder) == ["metrics.jsonl", *moved, "step_10.pt", "step_5.pt"]


@pytest.mark.parametrize("name", ["step_5.pt.tmp", ".metrics.jsonl.0123abcd.tmp"])
def test_unfinished_files_go(tmp_path, name):
    (tmp_path / name).write_bytes(b"half")
    assert names(RunFolder(tmp_path, keep=1)) == []


def test_lines_that_are_no_records_move_with_their_metrics(tmp_path):
    folder = RunFolder(tmp_path, keep=1)
    folder.save(payload(5), best=False, step=True)
    folder.metrics.write_text("{}\n")
    (tmp_path / "metrics.jsonl.bad").write_text("oops\n")
    folder.set_aside()
    assert names(folder) == [f"previous-1/{name}" for name in ("metrics.jsonl", "metrics.jsonl.bad", "step_5.pt")]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs named pipes")
def test_a_pipe_is_no_metrics_file_and_stays(tmp_path):
    folder = RunFolder(tmp_path, keep=1)
    os.mkfifo(folder.metrics)
    with pytest.raises(InputError, match=r"metrics\.jsonl is a pipe, not a metrics file"):
        folder.set_aside()
    assert folder.metrics.is_fifo()


@pytest.mark.parametrize(("best", "stays"), [(5, True), (15, False)])
def test_the_best_one_stays_when_it_belongs_to_the_resumed_run(tmp_path, best, stays):
    folder = RunFolder(tmp_path, keep=3)
    for step in (5, 10, 15):
        folder.save(payload(step), best=step == best, step=True)
    aside = folder.set_aside(after=10)
    assert aside is not None
    assert folder.has_best == stays
    assert (aside / "best.pt").exists()
    assert not (tmp_path / "step_15.pt").exists()
