"""Data parallel runs: two processes do what one does, and end together whatever happens to one of them."""

import itertools
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lepton import checkpoint
from lepton.cli.train import main
from tests.processes import Processes, train_in
from tests.train.small import SHAPE, losses_of, metrics_of, write_data

ROOT = Path(__file__).parents[2]
RANK_LOST, BAD_INPUT = 1, 2


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("several") / "data")


def flags(data, out, *more, steps=8):
    shape = [word for name, value in SHAPE.items() for word in ("--override", f"{name}={value}")]
    return [
        "--model_size", "nano", *shape, "--data_dir", str(data), "--tokenizer", str(data / "tokenizer.json"),
        "--checkpoint_dir", str(out), "--max_steps", str(steps), "--seq_len", "50", "--batch_size", "2",
        "--grad_accum", "4", "--save_every", "4", "--log_every", "1", "--eval_every", "4", "--eval_batches", "1",
        "--sample_tokens", "2", "--device", "cpu", "--dtype", "fp32", "--threads", "1", *more,
    ]  # fmt: skip


def ended(out, words, size=2):
    """Train to the end; return the processes."""
    processes = train_in(out.with_name(out.name + ".printed"), words, size)
    assert processes.wait() == [0] * size, [processes.said(rank) for rank in range(size)]
    return processes


@pytest.fixture(scope="module")
def runs(data, tmp_path_factory):
    """The folder of a run of 8 steps, by its number of processes, and what these printed."""
    folder = tmp_path_factory.mktemp("runs")
    return {
        size: (folder / str(size), ended(folder / str(size), flags(data, folder / str(size)), size)) for size in (1, 2)
    }


def tensors(content):
    states = [state for group in content["optimizer"]["states"].values() for state in group.values()]
    return [*content["model"].values(), *(tensor for state in states for tensor in state.values())]


def test_two_processes_train_as_one_does(runs):
    """The windows are of 50, 50 and 28 targets, so that the last ones weigh less."""
    one, two = losses_of(runs[1][0]), losses_of(runs[2][0])
    assert [step for step, _ in two] == [*range(1, 9)]
    assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=1e-4)
    ours, theirs = (checkpoint.load(runs[size][0] / "step_4.pt") for size in (2, 1))
    for a, b in zip(tensors(ours), tensors(theirs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


def test_rank_0_alone_prints_and_writes(runs):
    out, processes = runs[2]
    assert {path.name for path in out.iterdir()} == {path.name for path in runs[1][0].iterdir()}
    assert "fp32" in processes.said(0, "stdout")
    assert "on 2 x CPU" in processes.said(0, "stdout")
    assert processes.said(0, "stdout").count("step 8/8") == 1
    assert [processes.said(1, stream) for stream in ("stdout", "stderr")] == ["", ""]
    assert processes.said(0) == ""


def begun(data, runs, tmp_path, size):
    """A copy of the first four steps of a run of so many processes."""
    out = tmp_path / "out"
    shutil.copytree(runs[size][0], out)
    for name in ("final.pt", "step_8.pt"):
        (out / name).unlink()
    return out


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_a_run_goes_on_with_as_many_processes_or_others(data, runs, tmp_path, before, after):
    out = begun(data, runs, tmp_path, before)
    ended(out, flags(data, out, "--resume", "auto"), after)
    if before == after:
        assert metrics_of(out) == metrics_of(runs[2][0])
        ours, theirs = (checkpoint.load(folder / "final.pt") for folder in (out, runs[2][0]))
        assert all(torch.equal(a, b) for a, b in zip(tensors(ours), tensors(theirs), strict=True))
    steps, losses = zip(*losses_of(out), strict=True)
    assert steps == (*range(1, 9),)
    assert losses == pytest.approx([loss for _, loss in losses_of(runs[1][0])], rel=1e-3)


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_to_any_process_ends_all_after_a_save(data, runs, tmp_path, rank, signum):
    out = tmp_path / "out"
    processes = train_in(tmp_path / "printed", flags(data, out, steps=900))
    processes.await_line("step 3/900")
    os.kill(processes.all[rank].pid, signum)
    assert processes.wait() == [128 + signum] * 2
    (step,) = [step for step, _ in checkpoint.steps_in(out)][-1:]
    assert f"stopped at step {step}, saved {out / f'step_{step}.pt'}; go on with --resume" in processes.said(0)
    assert processes.said(1) == ""


def test_a_process_that_is_killed_ends_the_run_with_what_was_reached(data, tmp_path):
    out = tmp_path / "out"
    processes = train_in(tmp_path / "printed", flags(data, out, "--save_every", "1000", steps=900))
    processes.await_line("step 3/900")
    os.kill(processes.all[1].pid, signal.SIGKILL)
    assert processes.wait() == [RANK_LOST, -signal.SIGKILL]
    assert "error: rank 1 is gone: killed, or the host is down; stopped at step " in processes.said(0)
    ((step, path),) = checkpoint.steps_in(out)
    assert metrics_of(out)[-1]["step"] == step
    assert f"saved {path}; go on with --resume {path}" in processes.said(0)
    resumed = ended(out, flags(data, out, "--resume", "auto", "--save_every", "1000", steps=step + 2))
    assert f"resuming {path} at step {step}" in resumed.said(0, "stdout")


def test_the_first_process_may_be_killed_too(data, tmp_path):
    out = tmp_path / "out"
    processes = train_in(tmp_path / "printed", flags(data, out, "--save_every", "1", steps=900))
    processes.await_line("step 3/900")
    os.kill(processes.all[0].pid, signal.SIGKILL)  # in a step or a save
    codes = processes.wait()
    assert codes == [-signal.SIGKILL, RANK_LOST]
    assert checkpoint.newest_whole(out) is not None


def fails(words):
    """Be `train.py`; in rank 1 the 21st backward pass fails."""
    if os.environ["RANK"] == "1":
        backward, calls = torch.Tensor.backward, itertools.count(1)

        def failing(loss):
            if next(calls) == 21:
                raise RuntimeError("the card is on fire")
            backward(loss)

        torch.Tensor.backward = failing
    return main(words)


def test_a_process_that_fails_is_named_and_what_was_reached_is_saved(data, tmp_path):
    out = tmp_path / "out"
    processes = Processes(tmp_path / "printed", fails, flags(data, out, "--save_every", "1000", steps=12))
    assert processes.wait() == [RANK_LOST, 99]
    assert "RuntimeError: the card is on fire" in processes.said(1)
    saved = f"stopped at step 10, saved {out / 'step_10.pt'}; go on with --resume {out / 'step_10.pt'}"
    assert processes.said(0) == f"error: rank 1 failed: the card is on fire; {saved}\n"


DIES = """
import itertools, os, signal, sys
import torch
from lepton.cli.train import main

if (os.environ["RANK"], os.environ["TORCHELASTIC_RESTART_COUNT"]) == ("1", "0"):
    backward, calls = torch.Tensor.backward, itertools.count(1)

    def dying(loss):
        if next(calls) == 11:
            os.kill(os.getpid(), signal.SIGKILL)
        backward(loss)

    torch.Tensor.backward = dying
sys.exit(main())
"""


def test_torchrun_starts_them_again_and_the_run_goes_on_by_itself(data, runs, tmp_path):
    """Rank 1 kills itself in step 6; what step 5 has reached is saved and resumed, although no flag says so."""
    script, out = tmp_path / "dies.py", tmp_path / "out"
    script.write_text(DIES)
    torchrun = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--max_restarts", "1"]
    words = [sys.executable, "-m", *torchrun, str(script), *flags(data, out)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=100, check=False, env=environment, cwd=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert f"resuming {out / 'step_5.pt'} at step 5" in done.stdout
    assert "rank 1 is gone: killed, or the host is down; stopped at step 5" in done.stderr
    assert metrics_of(out) == metrics_of(runs[2][0])


def test_micro_batches_that_cannot_be_shared_are_refused(data, tmp_path):
    processes = train_in(tmp_path / "printed", flags(data, tmp_path / "out", "--grad_accum", "3"))
    assert BAD_INPUT in processes.wait()
    assert (
        "grad_accum=3: 2 processes cannot share 3 micro-batches a step evenly: use --batch_size 1 --grad_accum 6 (the "
        "same step), or --grad_accum 2 or 4, or start 1 process"
    ) in processes.said(0)
    assert not (tmp_path / "out").exists()
