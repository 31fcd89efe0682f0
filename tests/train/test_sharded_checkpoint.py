"""Sharded runs and their checkpoints: they go on in one process or in others, and are whole or not there."""

import json
import os
import shutil
import signal

import pytest
import torch

from lepton import checkpoint
from lepton.errors import InputError
from lepton.train.folder import sharded_steps
from lepton.train.sharded_checkpoint import VALUES, consolidated
from lepton.train.starting_point import newest
from tests.processes import train_in
from tests.train.small import losses_of, metrics_of, small_run, write_data
from tests.train.test_several_processes import RANK_LOST, ended, flags, tensors


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("sharded") / "data")


@pytest.fixture(scope="module")
def run(data, tmp_path_factory):
    """The folder of a sharded run of 8 steps, and its processes."""
    out = tmp_path_factory.mktemp("runs") / "out"
    return out, ended(out, flags(data, out, "--shard"))


@pytest.fixture(scope="module")
def single(data, tmp_path_factory):
    """The losses of the same run in one process."""
    out = tmp_path_factory.mktemp("runs") / "single"
    ended(out, flags(data, out), 1)
    return [loss for _, loss in losses_of(out)]


def test_a_sharded_run_trains_as_one_process_does(run, single):
    out, processes = run
    assert [loss for _, loss in losses_of(out)] == pytest.approx(single, rel=1e-4)
    files = {"best.pt", "final.pt", "metrics.jsonl"}
    assert {path.name for path in out.iterdir()} == {"step_4.dcp", "step_8.dcp", *files}
    said = [line for rank in range(2) for line in processes.said(rank).splitlines()]
    assert [line for line in said if "CPU process group does not support alltoall" not in line] == []
    assert processes.said(1, "stdout") == ""
    final = checkpoint.load(out / "final.pt")
    ours, theirs = (
        tensors(checkpoint.load(consolidated(shutil.copytree(out / "step_8.dcp", out.parent / "step_8.dcp")))),
        tensors(final),
    )
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def begun(run, tmp_path):
    """A copy of the first four steps."""
    out = tmp_path / "out"
    shutil.copytree(run[0], out)
    shutil.rmtree(out / "step_8.dcp")
    (out / "final.pt").unlink()
    return out


@pytest.mark.parametrize(("size", "more"), [(2, ["--shard"]), (2, []), (1, [])])
def test_a_sharded_checkpoint_goes_on_in_processes_of_any_number(data, run, single, tmp_path, size, more):
    out = begun(run, tmp_path)
    resume = "auto" if more else str(out / "step_4.dcp")
    processes = ended(out, flags(data, out, "--resume", resume, *more), size)
    assert f"resuming {out / 'step_4.pt'} at step 4" in processes.said(0, "stdout")
    assert [loss for _, loss in losses_of(out)] == pytest.approx(single, rel=1e-3)
    if more:
        assert metrics_of(out) == metrics_of(run[0])
        ours, theirs = (checkpoint.load(folder / "final.pt") for folder in (out, run[0]))
        assert all(torch.equal(a, b) for a, b in zip(tensors(ours), tensors(theirs), strict=True))


def test_a_file_of_one_process_goes_on_sharded(data, single, tmp_path):
    out = tmp_path / "out"
    ended(out, flags(data, out, steps=8), 1)
    for name in ("final.pt", "step_8.pt"):
        (out / name).unlink()
    ended(out, flags(data, out, "--resume", "auto", "--shard"))
    assert [loss for _, loss in losses_of(out)] == pytest.approx(single, rel=1e-3)


def test_a_process_killed_while_all_save_leaves_a_whole_checkpoint(data, tmp_path):
    out = tmp_path / "out"
    processes = train_in(tmp_path / "printed", flags(data, out, "--shard", "--save_every", "1", steps=900))
    processes.await_line("step 4/900")
    os.kill(processes.all[1].pid, signal.SIGKILL)
    assert processes.wait() == [RANK_LOST, -signal.SIGKILL]
    assert f"rank 1 is gone: killed, or the host is down; go on from the newest checkpoint in {out}" in processes.said(
        0
    )
    step, _ = sharded_steps(out)[-1]
    assert checkpoint.load(newest(out))["step"] == step >= 2
    assert len(sharded_steps(out)) <= 4, "the newest three are kept"


def test_a_signal_saves_a_sharded_checkpoint(data, tmp_path):
    out = tmp_path / "out"
    processes = train_in(tmp_path / "printed", flags(data, out, "--shard", "--save_every", "1000", steps=900))
    processes.await_line("step 3/900")
    os.kill(processes.all[0].pid, signal.SIGTERM)
    assert processes.wait() == [143, 143]
    ((step, path),) = sharded_steps(out)
    assert f"stopped at step {step}, saved {path}; go on with --resume {path}" in processes.said(0)


@pytest.mark.parametrize("damage", ["unfinished", "no values", "no shards", "values"])
def test_a_damaged_one_is_refused_and_an_earlier_one_resumed(run, tmp_path, damage):
    out = tmp_path / "out"
    shutil.copytree(run[0], out)
    path = out / "step_8.dcp"
    if damage == "unfinished":
        (path / ".metadata").unlink()
    elif damage == "no values":
        (path / VALUES).unlink()
    elif damage == "values":
        (path / VALUES).write_text(json.dumps({"model": {}}))
    else:
        for shard in path.glob("*.distcp"):
            shard.write_bytes(b"")
    with pytest.raises(InputError, match=r"step_8\.dcp"):
        consolidated(path)
    (out / "final.pt").unlink()
    (out / "best.pt").unlink()
    assert newest(out) == out / "step_4.pt"


def test_a_fresh_run_moves_an_earlier_sharded_one_aside(data, run, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(run[0], out)
    small_run(data, out, max_steps=1)
    assert {"step_4.dcp", "step_8.dcp"} <= {path.name for path in (out / "previous-1").iterdir()}
    assert not sharded_steps(out)


def test_one_process_cannot_share(data, tmp_path):
    with pytest.raises(InputError, match="--shard: one process has nobody to share with; start several with torchrun"):
        small_run(data, tmp_path / "out", shard=True)
