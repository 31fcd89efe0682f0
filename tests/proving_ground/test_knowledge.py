"""Knowledge: the facts are as they should be, scores are judged as they say, and heads tell what they were taught."""

import json

import pytest
import torch

from benchmarks.proving_ground.facts import CLOSED, SEEN, SEVERAL, WORDS, Knowledge
from benchmarks.proving_ground.knowledge import (
    Seen,
    alone,
    calibrated,
    doubt,
    gain,
    judged,
    learned,
    main,
    of_pairs,
    plain_scores,
    told,
)
from benchmarks.proving_ground.task import EOS
from lepton.errors import InputError
from lepton.model.ideas.uncertainty import paired

TASK = Knowledge(subjects=90, syllables=64, facts=4)
relation_Q = torch.arange(TASK.questions) % TASK.relations


def test_half_of_the_questions_have_one_right_answer():
    count_Q = (TASK.right_QV > 0).sum(1)
    torch.testing.assert_close(TASK.right_QV.sum(1), torch.ones(TASK.questions))
    assert torch.equal(TASK.right_QV.amax(1) * count_Q, torch.ones(TASK.questions)), "drawn alike"
    for kind in range(TASK.relations):
        counts = {*count_Q[relation_Q == kind].tolist()}
        assert counts == ({1} if kind < len(CLOSED) else {*SEVERAL[kind - len(CLOSED)]})
    assert TASK.open_Q.double().mean() == 0.5


def test_no_relation_has_an_answer_of_another():
    answers = [(TASK.right_QV[relation_Q == kind] > 0).any(0) for kind in range(TASK.relations)]
    assert int(torch.stack(answers).sum(0).max()) == 1
    assert not torch.stack(answers)[:, : TASK.relation + TASK.relations].any()


def test_no_two_questions_are_alike_and_neither_name_nor_relation_says_how_often_they_are_asked():
    everyone = torch.arange(TASK.questions + 2000)
    assert len(TASK.words(everyone).unique(dim=0)) == len(everyone), "strangers have names of their own"
    for kind in range(TASK.relations):
        times, counts = TASK.seen_Q[relation_Q == kind].unique(return_counts=True)
        assert times.tolist() == [*SEEN]
        assert counts.tolist() == [10] * len(SEEN)
    among_S = TASK.seen_Q.view(TASK.subjects, -1).double()
    assert torch.corrcoef(among_S.T).fill_diagonal_(0).abs().max() < 0.35  # 90 subjects


def test_each_question_is_asked_as_often_as_it_should_be():
    rows, found, strangers = 6, torch.zeros(TASK.questions, dtype=torch.int64), []
    number = {tuple(words): i for i, words in enumerate(TASK.words(torch.arange(TASK.questions)).tolist())}
    whole = len(TASK.order_E) // (rows // 2 * TASK.facts)
    for step in range(whole):
        for row in TASK.training(step, whole, rows).tokens.tolist():
            for at in range(1, len(row), WORDS):
                asked = number.get(tuple(row[at : at + 3]))
                assert row[at + 4] == EOS
                if asked is None:
                    strangers.append(tuple(row[at : at + 3]))
                else:
                    assert TASK.right_QV[asked, row[at + 3]] > 0
                    found[asked] += 1
    assert TASK.steps(rows) in (whole, whole + 1)
    lacking = TASK.seen_Q - found
    assert lacking.min() >= 0
    assert lacking.sum() < 2 * rows // 2 * TASK.facts
    assert len(strangers) / (len(strangers) + found.sum().item()) == pytest.approx(TASK.strangers, abs=0.01)
    assert len(strangers) == 2 * len({*strangers}), "each is met twice, in one batch"


def test_strangers_need_names():
    with pytest.raises(InputError, match="syllables=16: too few names"):
        Knowledge(subjects=90, syllables=16)


def test_two_rows_ask_the_same_and_answer_by_themselves():
    batch = TASK.training(0, 10, 8)
    inputs = batch.tokens[:, :-1]
    position_T = (torch.arange(inputs.shape[1]) - 1) % WORDS  # the row begins with the end of a document
    position_T[0] = 0
    following = batch.answers.masked_fill(~batch.targets, -100)
    where = paired(inputs, following, position_T.expand(len(inputs), -1))
    assert torch.equal(where, batch.targets[::2])
    answers = batch.answers[batch.targets].view(4, 2, -1)
    assert 0 < (answers[:, 0] != answers[:, 1]).double().mean() < 0.6


def test_the_parts_share_no_question():
    parts = [TASK.part(number) for number in range(3)]
    assert [len(part) for part in parts] == [360, 144, 216]
    assert torch.equal(torch.cat(parts).sort().values, torch.arange(TASK.questions))


def world(count=6000, seed=0):
    """Questions with one right answer or four, half of them known; state and logits say which in another way each.

    Whether it is known stands in the state, one time in ten the contrary; the largest probability is near 1/4 for all
    but what is known and closed.
    """
    generator = torch.Generator().manual_seed(seed)
    known_N, open_N = torch.randint(2, (2, count), generator=generator)
    right_NV = torch.zeros(count, 9)
    right_NV[:, 0] = 1
    right_NV[open_N == 1, :4] = 0.25
    right_NV[known_N == 0] = right_NV[known_N == 0].roll(5, 1)
    logits_NV = torch.full((count, 9), -4.0)
    logits_NV[:, :4] = torch.rand(count, 4, generator=generator) / 5 + 2
    logits_NV[(known_N == 1) & (open_N == 0), 0] = 7.0
    shown_N = known_N ^ (torch.rand(count, generator=generator) < 0.1)
    hidden_ND = torch.stack([shown_N - 0.5, open_N - 0.5, torch.randn(count, generator=generator)], 1)
    return Seen(torch.arange(count), hidden_ND, logits_NV, torch.zeros(count, 3), right_NV, torch.ones(count))


def test_known_is_half_of_the_probability_for_right_answers_of_what_was_asked():
    seen = world(8)
    seen.times_N[:2] = 0
    wrong_N = 1 - (seen.chance_NV * (seen.right_NV > 0)).sum(1)
    torch.testing.assert_close(seen.wrong_N.float(), wrong_N)
    assert seen.unknown_N.tolist() == [float(i < 2 or wrong > 0.5) for i, wrong in enumerate(wrong_N.tolist())]
    best = seen.logits_NV.argmax(1).tolist()
    assert seen.best_wrong_N.tolist() == [float(seen.right_NV[i, token] == 0) for i, token in enumerate(best)]


def test_pairs_are_of_their_questions():
    seen = world(50)
    pairs = seen.pairs(3, torch.Generator().manual_seed(0))
    assert pairs.place_M.tolist() == [i for i in range(50) for _ in range(3)]
    closed_M = (seen.right_NV.amax(1) == 1)[pairs.place_M]
    assert pairs.same_M[closed_M].all()
    assert 0 < pairs.same_M[~closed_M].double().mean() < 0.6
    likely_M = (seen.chance_NV * seen.right_NV).sum(1)[pairs.place_M]
    torch.testing.assert_close(pairs.chance_M2[closed_M], likely_M[closed_M, None].expand(-1, 2))


def judge_of(loss, worlds):
    """Return a head that learned by a loss, its pairs for calibration, and its figures."""
    learning, line, test = worlds
    generator = torch.Generator().manual_seed(3)
    learn, other = (seen.pairs(1, generator) for seen in (learning, line))
    head = learned(learning, learn, loss, 20, 1e-2, 0)
    calibrated(head, line, other, loss)
    return head, other, judged(doubt(head, test), test, is_chance=True)


def test_a_head_of_pairs_knows_what_one_of_single_answers_cannot():
    worlds = [world(seed=seed) for seed in range(3)]
    found = {loss.__name__: judge_of(loss, worlds)[2] for loss in (of_pairs, alone, told)}
    plain = {name: judged(score, worlds[2], is_chance=False) for name, score in plain_scores(worlds[2]).items()}
    assert found["of_pairs"]["auroc_known"] > 0.9
    assert found["of_pairs"]["ece"] < 0.05
    assert found["told"]["ece"] < 0.03
    assert found["told"]["auroc_known"] == pytest.approx(found["of_pairs"]["auroc_known"], abs=0.02)
    assert found["alone"]["ece"] > 0.1, "three of four times another answer is drawn"
    assert max(row["auroc_known"] for row in plain.values()) < 0.8


def test_calibration_mends_a_line():
    worlds = [world(seed=seed) for seed in range(3)]
    head, line, good = judge_of(of_pairs, worlds)
    with torch.no_grad():
        head.line.copy_(torch.tensor([3.0, 2.0]))
    assert judged(doubt(head, worlds[2]), worlds[2], is_chance=True)["ece"] > good["ece"] + 0.01
    calibrated(head, worlds[1], line, of_pairs)
    mended = judged(doubt(head, worlds[2]), worlds[2], is_chance=True)
    assert mended["ece"] == pytest.approx(good["ece"], abs=1e-5)
    assert mended["auroc_known"] == pytest.approx(good["auroc_known"], abs=1e-9)


def test_a_score_without_both_kinds_has_no_rank():
    seen = world(100)
    seen.times_N[:] = 0
    figures = judged(seen.wrong_N, seen, is_chance=True)
    assert figures["auroc_known"] is None
    assert figures["ece"] == 0


def test_gain_is_over_the_best_of_three():
    values = {"max-probability": 0.8, "entropy": 0.9, "margin": 0.7, "two samples agree": 0.99, "head": 0.95}
    table = {name: {"auroc_known": value} for name, value in values.items()}
    assert gain(table, "head") == pytest.approx(0.05)
    table["entropy"]["auroc_known"] = None
    assert gain(table, "head") is None


def test_smoke(capsys):
    main(["--smoke"])
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["facts"] == 360
    assert [row["seen"] for row in found["by_seen"]] == [*SEEN]
    assert {"max-probability", "entropy", "margin", "head of pairs", "head of pairs, training"} <= found["table"].keys()
    assert all(any(line.startswith(name) for line in lines) for name in found["table"])
    assert 0 <= found["table"]["head of pairs"]["ece"] <= 1
