"""All on: text and tasks in one batch, in one vocabulary, and one model that learns both."""

import json

import numpy as np
import pytest
import torch

from benchmarks.proving_ground.all_on import Mixed, MixedTraining, config_of, main, read
from benchmarks.proving_ground.mixture import LENGTH, TURNS, parts_of, rows_of_tasks
from benchmarks.proving_ground.task import EOS, Questions
from lepton.api import Lepton
from lepton.config import LeptonConfig
from lepton.data.shards import Batch
from lepton.model.size_config import count_params, size_config


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory):
    folder = tmp_path_factory.mktemp("all_on")
    rows = np.random.default_rng(0).integers(2, 50, (40, 2049), dtype=np.uint16)
    np.save(folder / "shard_00000.npy", rows)
    return str(folder)


@pytest.fixture(scope="module")
def parts(data_dir):
    return parts_of(data_dir, "", "", 0)


def test_a_row_of_each_task_fits_a_batch(parts):
    for part in parts[0].values():
        for step in (0, 9):
            rows = part.training(step, 10, 3)
            assert rows.tokens.shape == (3, LENGTH + 1)
            assert rows.targets.shape == rows.level.shape == (3, LENGTH)
            assert not (rows.tokens == EOS).any()
            assert int(rows.tokens.max()) < 50_257
            assert rows.targets.any(1).all()
            beyond = torch.arange(LENGTH) >= rows.lengths[:, None] - 1
            assert not (rows.targets & beyond).any()
            assert ((rows.level > 0) <= rows.targets).all()


def test_answers_alone_are_targets(parts):
    """In the ids of the task they are what the task asks for, and copies stand one after the other."""
    part = parts[0]["chains"]
    assert part.copies == 25
    one, rows = part.task.training(9, 10, 2 * part.copies), part.training(9, 10, 2)
    assert rows.targets.sum(1).tolist() == [25, 25]
    back = {int(token): i for i, token in enumerate(part.ids)}
    answers = [back[int(token)] for token in rows.tokens[:, 1:][rows.targets]]
    assert answers == one.answers[one.targets].tolist()
    assert rows.level[rows.targets].tolist() == one.level[one.targets].tolist()
    width = one.tokens.shape[1]
    assert torch.equal(rows.tokens[1, width : 2 * width], part.ids[one.tokens[part.copies + 1]])


def test_tasks_share_no_ids(parts):
    own = [parts[0][name].ids for name in ("hops", "chains", "recall", "two_step")]
    ids = torch.cat([*own, parts[0]["babi"].ids[50_257:]])
    assert len(ids.unique()) == len(ids)
    assert int(ids.min()) >= 50_257 // 2
    assert int(ids.max()) < 50_257


def test_the_test_has_other_questions(parts):
    for part in parts[0].values():
        seen = {tuple(row) for step in range(10) for row in part.training(step, 10, 8).tokens.tolist()}
        asked = part.held_out(0, 8).tokens
        assert not (asked == EOS).any()
        assert not any((*row, *[1] * (LENGTH + 1 - len(row))) in seen for row in asked.tolist())


def test_the_longer_test_has_the_ids_of_its_task(parts):
    longer, usual = parts[1]["recall_1024"], parts[0]["recall"]
    rows = longer.held_out(0, 2)
    assert rows.tokens.shape == (2, 1025)
    assert int(rows.level.max()) > 512 // usual.task.window
    assert torch.isin(rows.tokens, usual.ids).all()


def test_all_tasks_have_their_turn(parts):
    whole = rows_of_tasks(parts[0], 3, 10, len(TURNS))
    counts = {name: TURNS.count(name) for name in parts[0]}
    assert min(counts.values()) >= 2
    assert whole.tokens.shape == (16, LENGTH + 1)
    assert int(whole.targets.sum()) > 16 * 40
    few = [rows_of_tasks(parts[0], step, 10, 4).tokens for step in range(4)]
    of_chains = [int(torch.isin(rows, parts[0]["chains"].ids).sum(1).gt(100).sum()) for rows in few]
    assert sum(of_chains) == counts["chains"]


def test_the_loss_is_of_text_and_answers_by_their_rows():
    torch.manual_seed(0)
    model = Lepton(LeptonConfig(width=64, layers=4, heads=1, kv_heads=1, ffn=64, vocab_size=97))
    training = MixedTraining(model, "plain", 1, seed=0)
    training.prepare(3, LENGTH)
    text = Batch(torch.randint(1, 97, (3, LENGTH + 1)), torch.full((3,), LENGTH + 1))
    targets = torch.zeros(1, LENGTH, dtype=torch.bool)
    targets[:, 100] = True
    tasks = Questions(torch.randint(1, 97, (1, LENGTH + 1)), torch.tensor([LENGTH + 1]), targets, targets.long())
    losses = [model.loss(text.tokens, lengths=text.lengths), model.loss(tasks.tokens, targets=targets)]
    expected = 0.75 * losses[0].loss + 0.25 * losses[1].loss
    gradients = torch.autograd.grad(expected, [*model.parameters()])
    norm = torch.stack([each.norm() for each in gradients]).norm()
    found = training.step([Mixed(text, tasks)], 0, 0.0)
    assert found["loss"].item() == pytest.approx(losses[0].parts["ce"].item(), rel=1e-4)
    assert found["answers"].item() == pytest.approx(losses[1].parts["ce"].item(), rel=1e-4)
    assert found["grad_norm"].item() == pytest.approx(norm.item(), rel=1e-3)


@pytest.mark.parametrize("variant", ["complete", "dense"])
def test_variants_have_the_parameters_of_the_size(variant):
    config = config_of("tiny", variant, ["window=64", "wide_window=128"])
    assert count_params(config) == pytest.approx(count_params(size_config("tiny")), rel=0.002)
    assert (config.window, config.wide_window) == ((64, 128) if variant == "complete" else (None, None))
    assert config.dense == (variant == "dense")
    if variant == "complete":
        assert config.idea("thoughts").over_tokens
        assert config.idea("memory").reads == 2


def test_defaults():
    arguments, chosen = read(["--data_dir", "x"])
    assert (arguments.size, arguments.batch_size, arguments.seq_len, arguments.tokens) == ("tiny", 64, 512, 49e6)
    assert (chosen.variant, chosen.share) == ("complete", 0.25)


@pytest.mark.parametrize("variant", ["complete", "dense_flops"])
def test_smoke(data_dir, capsys, variant):
    small = ["--change", "memory.heads=2", "thoughts.rounds=1", "thoughts.most_rounds=1"]
    main(["--smoke", "--data_dir", data_dir, "--variant", variant, *small])
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    tasks = ["hops", "chains", "recall", "two_step", "needle", "babi", "recall_1024"]
    assert [line.split()[0] for line in lines[-7:]] == tasks
    assert all(found[name]["asked_at_level"] for name in tasks)
    assert found["steps"] == round(3 * found["steps_ratio"])
    assert len(found["answers_curve"]) == 2
    assert found["val_loss"] > 0
    if variant == "complete":
        assert found["steps_ratio"] == 1
        assert set(found["loss_at_depth"]) == {"0.75", "0.5"}
        assert set(found["speculation"]) == {"T=0", "T=1"}
        assert "uncertainty" in found["reliability"]["scores"]
    else:
        assert found["steps_ratio"] > 1
        assert "speculation" not in found


def test_what_there_is_no_time_for_is_said(data_dir, capsys):
    main(["--smoke", "--data_dir", data_dir, "--variant", "dense", "--deadline", "0"])
    *lines, last = capsys.readouterr().out.splitlines()
    assert "hops: not judged, the time is up" in lines
    found = json.loads(last)
    assert found["val_loss"] > 0
    assert "hops" not in found
