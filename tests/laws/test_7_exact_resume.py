"""Law 7: a run that is killed at any moment and resumed has, bit for bit, the losses of one that was not.

Real processes, killed from outside at random moments while they save after every step, and from inside in the
middle of writing a checkpoint and between the files of one step.
"""

import itertools
import multiprocessing
import os
import random
import sys
import time

import pytest
import torch

from lepton import checkpoint
from lepton.cli.train import main
from tests.train.small import SHAPE, metrics_of, write_data

STEPS = 24
KILLED = 9

# Each process is forked from one that has imported torch already, where the system can: that is most of its time.
FORKS = "forkserver" in multiprocessing.get_all_start_methods()
CONTEXT = multiprocessing.get_context("forkserver" if FORKS else "spawn")
CONTEXT.set_forkserver_preload([__name__, "torch._dynamo"])  # what making an optimizer imports, too


def half_a_file(payload, file):
    torch.serialization.save(payload, file)
    file.truncate(file.tell() // 2)
    file.flush()


def die(place, n):
    """Let this process end without warning, as if killed, at the n-th call of what a save consists of."""
    calls = itertools.count(1)

    def dying(function, before):
        def call(*args, **options):
            if next(calls) == n:
                before(*args)
                os._exit(KILLED)
            return function(*args, **options)

        return call

    if place == "write":
        torch.save = dying(torch.save, half_a_file)
    elif place == "rename":
        os.replace = dying(os.replace, lambda *args: None)
    else:
        checkpoint.duplicate = dying(checkpoint.duplicate, lambda *args: None)


def command(words, printed, death):
    """Be `train.py` with the flags `words`; stdout and stderr go to the files `printed`."""
    for number, path in enumerate(printed, 1):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    if death is not None:
        die(*death)
    sys.exit(main(words))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("law") / "data")


def flags(data, out):
    shape = [word for name, value in SHAPE.items() for word in ("--override", f"{name}={value}")]
    every = [word for name in ("save", "log") for word in (f"--{name}_every", "1")]
    return [
        "--model_size", "nano", *shape, "--data_dir", str(data), "--tokenizer", str(data / "tokenizer.json"),
        "--checkpoint_dir", str(out), "--resume", "auto", "--max_steps", str(STEPS), "--seq_len", "24",
        "--batch_size", "2", "--grad_accum", "2", *every, "--eval_every", "8", "--eval_batches", "1",
        "--sample_every", "7", "--sample_tokens", "2", "--device", "cpu", "--threads", "1",
    ]  # fmt: skip


def start(data, out, death=None):
    """Start a process; return it, and the files of its stdout and stderr."""
    printed = [out.with_name(f"{out.name}.{stream}") for stream in ("stdout", "stderr")]
    for path in printed:
        path.write_text("")
    process = CONTEXT.Process(target=command, args=(flags(data, out), printed, death))
    process.start()
    return process, *printed


def finish(process, _, errors):
    """Return how a process ended, and what it wrote to stderr."""
    process.join()
    return process.exitcode, errors.read_text()


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("law") / "undisturbed"
    assert finish(*start(data, out)) == (0, "")
    return out


def flat(value):
    """All tensors and numbers in nested dicts, in order."""
    if isinstance(value, dict):
        return [item for key in value for item in flat(value[key])]
    return [item for part in value for item in flat(part)] if isinstance(value, list | tuple) else [value]


def assert_same_run(out, undisturbed, steps=STEPS):
    assert metrics_of(out) == metrics_of(undisturbed)
    for name in ("final.pt", "best.pt", f"step_{steps}.pt"):
        ours, theirs = checkpoint.load(out / name), checkpoint.load(undisturbed / name)
        for part in ("step", "model", "optimizer", "rng", "validation", "best"):
            for a, b in zip(flat(ours[part]), flat(theirs[part]), strict=True):
                assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    assert not list(out.glob("*.tmp"))


def await_steps(process, printed, count):
    """Wait until a process has printed so many steps, or has ended."""
    with printed.open() as file:
        while count and process.is_alive():
            line = file.readline()
            count -= line.startswith("step ")
            if not line:
                time.sleep(0.001)


def test_killed_at_random_moments(data, undisturbed, tmp_path):
    chance = random.Random(7)
    kills = 0
    while True:
        process, printed, errors = start(data, tmp_path)
        # A line a step comes before its save, so short delays kill in the save.
        await_steps(process, printed, chance.randrange(6, 15))
        time.sleep(chance.random() * 0.03)
        process.kill()
        code, said = finish(process, printed, errors)
        assert said == ""
        if code == 0:
            break
        kills += 1
    assert kills >= 1
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize(("place", "n"), [("write", 7), ("rename", 13), ("duplicate", 2)])
def test_killed_amid_a_save(data, undisturbed, tmp_path, place, n):
    assert finish(*start(data, tmp_path, (place, n))) == (KILLED, "")
    if place != "duplicate":
        assert list(tmp_path.glob("*.tmp"))
    assert finish(*start(data, tmp_path)) == (0, "")
    assert_same_run(tmp_path, undisturbed)
