"""Law 7: a run that is killed at any moment and resumed has, bit for bit, the losses of one that was not.

Real processes, killed from outside at random moments while they save after every step, and from inside in the
middle of writing a checkpoint and between the files of one step.
"""

import os
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lepton import checkpoint
from tests.train.small import SHAPE, metrics_of, write_data

ROOT = Path(__file__).parents[2]
STEPS = 40
KILLED = 9

# Dies without warning, as if killed, at the n-th call of what a save consists of.
DIES = """
import os, sys, torch
from lepton import checkpoint
from lepton.cli.train import main

place, n = sys.argv[1], int(sys.argv[2])
calls = 0

def dying(function, before):
    def call(*args, **options):
        global calls
        calls += 1
        if calls == n:
            before(*args)
            os._exit({killed})
        return function(*args, **options)
    return call

def half_a_file(payload, file):
    torch.serialization.save(payload, file)
    file.truncate(file.tell() // 2)
    file.flush()

if place == "write":
    torch.save = dying(torch.save, half_a_file)
elif place == "rename":
    os.replace = dying(os.replace, lambda *args: None)
else:
    checkpoint.duplicate = dying(checkpoint.duplicate, lambda *args: None)
sys.exit(main(sys.argv[3:]))
""".replace("{killed}", str(KILLED))


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return write_data(tmp_path_factory.mktemp("law") / "data")


def flags(data, out):
    shape = [word for name, value in SHAPE.items() for word in ("--override", f"{name}={value}")]
    every = [word for name in ("save", "log") for word in (f"--{name}_every", "1")]
    return [
        "--model_size", "nano", *shape, "--data_dir", str(data), "--tokenizer", str(data / "tokenizer.json"),
        "--checkpoint_dir", str(out), "--resume", "auto", "--max_steps", str(STEPS), "--seq_len", "24",
        "--batch_size", "2", "--grad_accum", "2", *every, "--eval_every", "5", "--eval_batches", "1",
        "--sample_every", "7", "--sample_tokens", "2", "--device", "cpu", "--threads", "1",
    ]  # fmt: skip


def start(*line):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([sys.executable, *map(str, line)], cwd=ROOT, env=environment, text=True, **pipe)


def finish(process):
    _, errors = process.communicate()
    return process.returncode, errors


@pytest.fixture(scope="module")
def undisturbed(data, tmp_path_factory):
    out = tmp_path_factory.mktemp("law") / "undisturbed"
    assert finish(start("train.py", *flags(data, out))) == (0, "")
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


def test_killed_at_random_moments(data, undisturbed, tmp_path):
    chance = random.Random(7)
    kills = 0
    while True:
        process = start("train.py", *flags(data, tmp_path))
        lines = chance.randrange(6, 15)  # a line a step comes before its save, so short delays kill in the save
        while lines and (line := process.stdout.readline()):
            lines -= line.startswith("step ")
        time.sleep(chance.random() * 0.03)
        process.kill()
        code, errors = finish(process)
        assert errors == ""
        if code == 0:
            break
        kills += 1
    assert kills >= 1
    assert_same_run(tmp_path, undisturbed)


@pytest.mark.parametrize(("place", "n"), [("write", 7), ("rename", 13), ("duplicate", 2)])
def test_killed_amid_a_save(data, undisturbed, tmp_path, place, n):
    code, errors = finish(start("-c", DIES, place, n, *flags(data, tmp_path)))
    assert (code, errors) == (KILLED, "")
    if place != "duplicate":
        assert list(tmp_path.glob("*.tmp"))
    assert finish(start("train.py", *flags(data, tmp_path))) == (0, "")
    assert_same_run(tmp_path, undisturbed)
