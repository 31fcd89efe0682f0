"""Knowledge: the facts are as they should be, scores are judged as they say, and heads tell what they were taught."""

import json

import pytest
import torch

from benchmarks.proving_ground import knowledge
from benchmarks.proving_ground.facts import CLOSED, SEEN, SEVERAL, WORDS, Knowledge
from benchmarks.proving_ground.knowledge import Seen, calibrated, doubt, judged, learned, main, plain_scores
from benchmarks.proving_ground.task import EOS
from lepton.model.ideas.uncertainty import pair_loss, paired

TASK = Knowledge(subjects=90, syllables=16, facts=4)


def test_half_of_the_questions_have_one_right_answer():
    count_Q = (TASK.right_QV > 0).sum(1)
    torch.testing.assert_close(TASK.right_QV.sum(1), torch.ones(TASK.questions))
    assert torch.equal(TASK.right_QV.amax(1) * count_Q, torch.ones(TASK.questions)), "drawn alike"
    for kind in range(TASK.relations):
        counts = {*count_Q[TASK.kind_Q == kind].tolist()}
        assert counts == ({1} if kind < len(CLOSED) else {*SEVERAL[kind - len(CLOSED)]})
    assert TASK.open_Q.double().mean() == 0.5


def test_no_relation_has_an_answer_of_another():
    answers = [(TASK.right_QV[TASK.kind_Q == kind] > 0).any(0) for kind in range(TASK.relations)]
    assert int(torch.stack(answers).sum(0).max()) == 1
    assert not torch.stack(answers)[:, : TASK.relation + TASK.relations].any()


def test_no_two_questions_are_alike_and_neither_name_nor_relation_says_how_often_they_are_asked():
    assert len(TASK.asked_Q3.unique(dim=0)) == TASK.questions
    for kind in range(TASK.relations):
        times, counts = TASK.seen_Q[TASK.kind_Q == kind].unique(return_counts=True)
        assert times.tolist() == [*SEEN]
        assert counts.tolist() == [10] * len(SEEN)
    among_S = TASK.seen_Q.view(TASK.subjects, -1).double()
    assert torch.corrcoef(among_S.T).fill_diagonal_(0).abs().max() < 0.35  # 90 subjects


def test_each_question_is_asked_as_often_as_it_should_be():
    rows, found = 6, torch.zeros(TASK.questions, dtype=torch.int64)
    number = {tuple(words): i for i, words in enumerate(TASK.asked_Q3.tolist())}
    whole = len(TASK.order_E) // (rows // 2 * TASK.facts)
    for step in range(whole):
        for row in TASK.training(step, whole, rows).tokens.tolist():
            for at in range(1, len(row), WORDS):
                asked = number[tuple(row[at : at + 3])]
                assert TASK.right_QV[asked, row[at + 3]] > 0
                assert row[at + 4] == EOS
                found[asked] += 1
    assert TASK.steps(rows) in (whole, whole + 1)
    lacking = TASK.seen_Q - found
    assert lacking.min() >= 0
    assert lacking.sum() < 2 * rows // 2 * TASK.facts


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
    mass_N = (seen.chance_NV * (seen.right_NV > 0)).sum(1)
    assert seen.unknown_N.tolist() == [float(i < 2 or mass < 0.5) for i, mass in enumerate(mass_N.tolist())]
    assert {*seen.wrong_N.tolist()} <= {0.0, 1.0}


def test_a_head_of_pairs_knows_what_one_of_single_answers_cannot():
    learning, line, test = (world(seed=seed) for seed in range(3))
    figures = {}
    for name, loss in {"pairs": pair_loss, "alone": knowledge.alone}.items():
        generator = torch.Generator().manual_seed(3)
        labels = [seen.pairs(4, generator) for seen in (learning, line)]
        head = learned(learning, labels[0], loss, 20, 1e-2, 0)
        calibrated(head, line, labels[1], loss)
        figures[name] = judged(doubt(head, test), test, is_chance=True)
    plain = {name: judged(score, test, is_chance=False) for name, score in plain_scores(test).items()}
    assert figures["pairs"]["auroc_known"] > 0.94
    assert figures["pairs"]["ece"] < 0.04
    assert figures["alone"]["ece"] > 0.1, "three of four times another answer is drawn"
    assert max(row["auroc_known"] for row in plain.values()) < 0.9


def test_calibration_mends_a_line():
    learning, line = world(seed=0), world(seed=1)
    labels = line.pairs(4, torch.Generator().manual_seed(1))
    head = learned(learning, learning.pairs(1, torch.Generator().manual_seed(0)), pair_loss, 20, 1e-2, 0)
    calibrated(head, line, labels, pair_loss)
    good = judged(doubt(head, line), line, is_chance=True)
    with torch.no_grad():
        head.out.weight[0] *= 3
        head.out.bias[0] = 3 * head.out.bias[0] + 2
    calibrated(head, line, labels, pair_loss)
    mended = judged(doubt(head, line), line, is_chance=True)
    assert mended["ece"] == pytest.approx(good["ece"], abs=1e-3)
    assert mended["auroc_known"] == pytest.approx(good["auroc_known"], abs=1e-6)


def test_a_score_without_both_kinds_has_no_rank():
    seen = world(100)
    seen.times_N[:] = 0
    figures = judged(seen.wrong_N, seen, is_chance=True)
    assert figures["auroc_known"] is None
    assert figures["ece"] == 0


def test_smoke(capsys):
    main(["--smoke"])
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert found["facts"] == 360
    assert [row["seen"] for row in found["by_seen"]] == [*SEEN]
    assert {"max-probability", "entropy", "margin", "head of pairs", "head of pairs, training"} <= found["table"].keys()
    assert all(any(line.startswith(name) for line in lines) for name in found["table"])
    assert 0 <= found["table"]["head of pairs"]["ece"] <= 1
