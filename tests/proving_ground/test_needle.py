"""Needles: every answer by a search of the row for its key."""

import pytest
import torch

from benchmarks.proving_ground.needle import FORM, QUESTION, WORDS, Needle, main
from benchmarks.proving_ground.runner import hidden_at
from benchmarks.proving_ground.task import rules
from lepton.api import Lepton
from lepton.config import LeptonConfig
from tests.proving_ground.smoke import smoke


@pytest.mark.parametrize("test", [False, True])
@pytest.mark.parametrize("asked", [1, 4])
def test_answers_by_hand(asked, test):
    task = Needle(asked=asked, length=512, tested=2048)
    drawn = [task.held_out(index, 6) for index in range(3)] if test else [task.training(9, 10, 6)]
    for index, questions in enumerate(drawn):
        for row, level in zip(questions.tokens.tolist(), questions.level.tolist(), strict=True):
            body = len(row) - QUESTION * asked
            assert len(row) == 1 + (512 << index)
            forms = set()
            for at in range(body, len(row), QUESTION):
                mark, *key, reading = row[at : at + 4]
                assert (mark, reading) == (task.word + WORDS, task.word + WORDS + 1)
                found = [
                    i
                    for i in range(FORM[0], body - 6)
                    if row[i : i + 2] == key and row[i + 2] >= task.word and row[i - 1] >= task.word
                ]
                (place,) = found
                assert row[at + 4 : at + 6] == row[place + 2 + FORM[1] :][:2]
                assert level[at + 3 : at + 5] == [1 + index] * 2
                forms.add((*row[place - FORM[0] : place], *row[place + 2 : place + 4]))
            assert len(forms) == 1
            words = [i for i in range(body) if row[i] >= task.word]
            assert len(words) == (asked + task.distractors) * sum(FORM)
            assert sum(each > 0 for each in level) == 2 * asked


def test_training_begins_with_sentences_near_the_question():
    task = Needle(length=512, tested=512)
    rows = task.training(0, 100_000, 8).tokens[:, : 513 - QUESTION - 5 * 10]
    assert bool((rows < task.word).all())


def test_shortcuts():
    """The latest value is right once in as many times as there are sentences."""
    task = Needle(length=256, tested=256)
    found = rules(task, [task.held_out(index, 400) for index in range(2)])
    assert found["the latest value"].share == pytest.approx(0.2, abs=0.05)
    assert found["most frequent answer"].share < 0.02


@pytest.mark.parametrize("ideas", [{}, {"ideas": ()}])
def test_a_stream_gives_the_hidden_vectors_of_one_pass(ideas, monkeypatch):
    monkeypatch.setattr("benchmarks.proving_ground.runner.CHUNK", 32)
    torch.manual_seed(0)
    config = LeptonConfig(width=32, layers=4, heads=2, kv_heads=2, head_dim=16, ffn=64, vocab_size=20, window=16)
    model = Lepton(config.replace(**ideas)).eval()
    tokens, chosen = torch.randint(1, 20, (3, 100)), torch.rand(3, 100) < 0.2
    streamed = hidden_at(model, tokens, chosen)
    with torch.no_grad():
        torch.testing.assert_close(streamed, model.trunk(tokens).hidden[chosen], rtol=1e-4, atol=1e-4)


def test_smoke(capsys):
    found = smoke(main, capsys, "--models", "window_only", "complete", "--rates", "1", "--asked", "4")
    assert set(found["rows_of_table"][-1]["right_at_level"]) == {"1", "2"}
