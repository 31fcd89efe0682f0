"""Trials of a queue: each runs once, on the batches of its seed, and its row says what was found."""

import json
import math
import threading
import time

import numpy as np
import pytest
import torch

from benchmarks import trunk_trials
from benchmarks.trunk_trials import Data, Rows, Training, claim, main, run, run_all
from lepton.data.shards import ShardedDataset
from tests.trunk import SMALL, rows, small

CPU = torch.device("cpu")


@pytest.fixture
def folder(tmp_path):
    """A data set whose tokens count up, so that much of it can be learnt soon."""
    path = tmp_path / "data"
    path.mkdir()
    tokens = np.arange(60 * 55, dtype=np.uint16).reshape(60, 55) % 90 + 1
    np.save(path / "shard_00000.npy", tokens)
    return path


def queue_of(tmp_path, *lines):
    path = tmp_path / "queue"
    path.write_text("".join(json.dumps({**SMALL, **line}) + "\n" for line in lines))
    return path


def read_rows(path):
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def call(tmp_path, folder, queue, *words):
    found = tmp_path / "found.jsonl"
    files = map(str, ["--data_dir", folder, "--queue", queue, "--json", found])
    main([*files, "--device", "cpu", *words])
    return read_rows(found)


def test_a_queue_is_run_once_and_rows_are_appended(tmp_path, folder, capsys):
    queue = queue_of(tmp_path, {"name": "one"}, {"name": "two", "conv": 3, "backout": False})
    one, two = call(tmp_path, folder, queue)
    assert (one["name"], two["name"], two["trial"]["conv"]) == ("one", "two", 3)
    assert [line["name"] for line in map(json.loads, capsys.readouterr().out.splitlines())] == ["one", "two"]
    assert one["tokens"] == 20 * 2 * 20 - sum(20 - 14 for length in lengths_of(folder) if length == 15)
    assert (len(one["curve"]), one["numbers"].keys(), two["numbers"].keys()) == (8, {"backout"}, set())
    assert two["params"] - one["params"] == 2 * 4 * 2 * 32 - 1
    assert one["loss"] != two["loss"]
    assert one["device"].startswith("CPU")
    assert len(call(tmp_path, folder, queue)) == 2, "all are claimed"
    queue.write_text(queue.read_text() + json.dumps({**SMALL, "name": "three"}))
    *_, three = call(tmp_path, folder, queue)
    assert {**three, "name": 0, "trial": 0, "seconds": 0, "tokens_per_s": 0, "prepare_s": 0} == {
        **one, "name": 0, "trial": 0, "seconds": 0, "tokens_per_s": 0, "prepare_s": 0
    }, "the same but for the clock"  # fmt: skip


def lengths_of(folder):
    """Return the valid tokens of the rows of the 20 batches of the small trial."""
    return Data(folder, CPU).train(small()).lengths.flatten().tolist()


def test_of_many_that_want_a_trial_one_gets_it(tmp_path):
    got = []
    threads = [threading.Thread(target=lambda: got.append(claim(tmp_path / "claims", "x"))) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(got) == [False] * 7 + [True]
    assert claim(tmp_path / "claims", "y")


def test_what_another_process_has_taken_is_left_to_it(tmp_path, folder):
    queue = queue_of(tmp_path, {"name": "theirs"}, {"name": "ours"})
    assert claim(tmp_path / "queue.claims", "theirs")
    assert [row["name"] for row in call(tmp_path, folder, queue)] == ["ours"]


def test_after_the_deadline_nothing_is_begun_or_claimed(tmp_path, folder, capsys):
    queue = queue_of(tmp_path, {"name": "late"})
    assert call(tmp_path, folder, queue, "--deadline", "-1") == []
    assert "late: left for another call" in capsys.readouterr().out
    assert [row["name"] for row in call(tmp_path, folder, queue)] == ["late"]


def test_a_trial_that_fails_leaves_a_row_and_the_next_one_runs(tmp_path, folder, capsys):
    queue = queue_of(tmp_path, {"name": "long", "seq_len": 56, "tokens": 1200}, {"name": "fine"})
    failed, fine = call(tmp_path, folder, queue)
    assert "seq_len=56" in failed["error"]
    assert "seq_len=56" in capsys.readouterr().err
    assert "error" not in fine


@pytest.mark.parametrize(
    ("text", "words", "said"),
    [
        ('{"name": "a", "shiftd_keys": "all"}', [], "did you mean 'shifted_keys'"),
        ('{"name": "a"}', ["--json", "nowhere/found.jsonl"], "no such folder: nowhere"),
        (None, [], "cannot read the queue"),
    ],
)
def test_what_cannot_run_is_said_at_once(tmp_path, capsys, text, words, said):
    queue = tmp_path / "queue"
    if text is not None:
        queue.write_text(text)
    with pytest.raises(SystemExit):
        main(["--queue", str(queue), *words])
    assert said in capsys.readouterr().err
    assert not (tmp_path / "queue.claims").exists()


def test_without_a_queue_there_is_nothing_to_do(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "--queue" in capsys.readouterr().err


def test_batches_are_decided_by_seed_and_step(folder):
    data = Data(folder, CPU)
    one, switched, other = (data.train(small(**each)) for each in ({}, {"conv": 3, "embed_lr": 0.1}, {"seed": 1}))
    assert torch.equal(one.tokens, switched.tokens)
    assert not torch.equal(one.tokens, other.tokens)
    shards = ShardedDataset(folder, split="train", seq_len=20, seed=0, vocab_size=97)
    for step in (0, 7, 19):
        wanted = shards.batch(step, batch_size=2)
        assert torch.equal(one.tokens[step], wanted.tokens.int())
        assert torch.equal(one.lengths[step], wanted.lengths)
    held_out = ShardedDataset(folder, split="val", seq_len=20, seed=0, vocab_size=97)
    assert sum(len(batch.tokens) for batch in data.held_out(small())) == held_out.windows


def test_the_held_out_loss_is_over_all_targets():
    trial = small()
    training = Training(trial, CPU, torch.float32)
    tokens, lengths = rows(trial)
    batches = [Rows(tokens, lengths), Rows(tokens[:1] % 50 + 1, torch.tensor([8]))]
    with torch.no_grad():
        nats = [training.model.loss(*batch)[2] for batch in batches]
    wanted = sum(each.sum() for each in nats) / (40 + 7)
    assert training.held_out_loss(batches) == pytest.approx(wanted.item(), rel=1e-5)


def test_a_run_learns_and_does_not_depend_on_the_one_before(folder):
    data, trial = Data(folder, CPU), small(tokens=100 * 40)
    first, again = run(trial, data, CPU), run(trial, data, CPU)
    assert first["curve"][0] == pytest.approx(math.log(97), rel=0.1)
    assert first["curve"][-1] < 2
    assert first["loss"] < 2
    assert (first["loss"], first["curve"]) == (again["loss"], again["curve"])


def test_a_loss_that_is_no_number_is_none(folder):
    found = run(small(embed_std=1e30), Data(folder, CPU), CPU)
    assert json.loads(json.dumps(found, allow_nan=False))["curve"][-1] is None


def test_the_smoke_run_has_two_trials_of_its_own(tmp_path, capsys):
    main(["--smoke", "--device", "cpu", "--json", str(tmp_path / "found.jsonl")])
    one, other = read_rows(tmp_path / "found.jsonl")
    assert (one["trial"]["shifted_keys"], other["trial"]["shifted_keys"]) == ("odd", "none")
    assert one["loss"] < math.log(50257) - 1
    assert len(capsys.readouterr().out.splitlines()) == 2


def test_a_smoke_run_of_a_queue_keeps_its_switches(tmp_path):
    trial = trunk_trials.smaller(small(conv=3, seed=5, momentum=(0.8, 0.9, 0.85)))
    assert (trial.size, trial.rows, trial.width) == ("nano", 2, 192)
    assert (trial.conv, trial.seed, trial.momentum) == (3, 5, (0.8, 0.9, 0.85))


def test_an_interrupt_is_no_failed_trial(folder, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(trunk_trials, "run", interrupted)
    found = []
    with pytest.raises(KeyboardInterrupt):
        run_all([small(), small(name="b")], None, Data(folder, CPU), found.append, time.perf_counter() + 100)
    assert found == []


@pytest.mark.gpu
def test_captured_steps_are_the_plain_ones():
    device = torch.device("cuda")
    trial = small(second_moments=True, conv=3, head_gates=True, smear="gated", residual_scale=True, reinjection=True)
    plain, captured = (Training(trial, device, torch.float32) for _ in range(2))
    captured.prepare()
    plain.on_gpu = False
    for step in range(5):
        batch = Rows(*(each.to(device) for each in rows(trial, step)))
        wanted, found = plain.step(step, batch).tolist(), captured.step(step, batch).tolist()
        assert found == pytest.approx(wanted, rel=1e-3), step
