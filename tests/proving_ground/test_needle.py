"""Needles: every answer by a search of the row's text for its key."""

import re

import numpy as np
import pytest
import torch

from benchmarks.proving_ground.needle import KINDS, STEP, Needle, main
from benchmarks.proving_ground.runner import dense, hidden_at
from benchmarks.proving_ground.sentences import NEW, QUESTION, TEMPLATES, language
from benchmarks.proving_ground.task import rules
from lepton.api import Lepton
from lepton.config import LeptonConfig
from lepton.data.tokenizer import load_tokenizer
from lepton.errors import InputError
from tests.proving_ground.smoke import smoke

OLD = TEMPLATES[:-NEW]
READER = load_tokenizer()
AN_OLD_ONE = "|".join(
    re.escape(each.format(key="@", value="#")).replace("@", r" \w+ \w+").replace(r"\#", r" \d{4}") for each in OLD
)


@pytest.fixture(scope="module")
def prose_dir(tmp_path_factory):
    """Prose of one word, another one in the test."""
    folder = tmp_path_factory.mktemp("prose")
    for split, word in (("", " thing"), ("val", " stuff")):
        (folder / split).mkdir(exist_ok=True)
        (token,) = READER.encode(word)
        np.save(folder / split / "shard_00000.npy", np.full((8, 2048), token, dtype=np.uint16))
    return str(folder)


def asked_and_found(row):
    """Return the template, the answer to each question and the numbers that the row's text gives for its key."""
    text = READER.decode(row)
    (before, between), found = map(re.escape, QUESTION), []
    body = text[: text.index(QUESTION[0])]
    for key, answer in re.findall(rf"{before}( \w+ \w+){between} (\d{{4}})", text):
        given = [
            (template, match[1])
            for template in TEMPLATES
            for match in re.finditer(re.escape(template.format(key=key, value="@")).replace("@", r" (\d{4})"), body)
        ]
        found.append((answer, given))
    return found


def check(questions, asked, templates):
    """Every key that is asked for is stated once, in one of the templates, the same one for all of a row."""
    used = set()
    for row in questions.tokens.tolist():
        found = asked_and_found(row)
        assert len(found) == asked
        for answer, given in found:
            assert [number for _, number in given] == [answer]
        forms = {template for _, given in found for template, _ in given}
        assert len(forms) == 1
        used |= forms
    assert used <= set(templates)
    return used


def test_training_by_hand(prose_dir):
    task = Needle(filler_dir=prose_dir, taught=3)
    assert len(check(task.training(9, 10, 30), 3, OLD)) > 10


def test_the_test_by_hand(prose_dir):
    task = Needle(length=512, tested=1024, taught=2, filler_dir=prose_dir)
    assert [task.part(index) for index in range(8)] == [f"{kind} {size}" for size in (512, 1024) for kind in KINDS]
    for index, (size, kind) in enumerate(task.parts):
        questions = task.held_out(index, 8)
        assert questions.tokens.shape == (8, size + 1)
        assert task.longer(index) == (size > 512)
        check(questions, KINDS[kind], OLD if kind == "known" else TEMPLATES[-NEW:])
        assert questions.level.unique().tolist() == [0, 1 + (size > 512) + STEP * [*KINDS].index(kind)]
        text = READER.decode(questions.tokens[0].tolist())
        assert (text.count("stuff") > 300) == (kind != "noise")
        assert "thing thing" not in text


def test_what_is_scored_are_the_numbers():
    task = Needle(taught=2)
    questions = task.held_out(1, 4)
    assert torch.equal(questions.level > 0, questions.targets)
    for row, targets in zip(questions.tokens, questions.targets, strict=True):
        scored = row[1:][targets].view(-1, task.whole).tolist()
        assert [READER.decode(each) for each in scored] == [f" {answer}" for answer, _ in asked_and_found(row.tolist())]


def test_rows_are_written_as_the_tokenizer_writes_their_text():
    tokenizer, said = READER, language("")
    keys, values = said.words_W[:2], said.values_N2[7]
    for template, form_S in zip(TEMPLATES, said.sentences_FS, strict=True):
        row = said.written(form_S[None, None], keys[None, None], values[None, None], form_S[None, None])[0, 0]
        text = template.format(key=tokenizer.decode(keys.tolist()), value=tokenizer.decode(values.tolist()))
        assert row[row != said.filler].tolist() == tokenizer.encode(text)
    assert len({*TEMPLATES}) == 50


def test_training_begins_with_sentences_near_the_question():
    task = Needle(taught=2, distractors=0)
    for step, everywhere in ((0, False), (99, True)):
        rows = task.training(step, 100, 16).tokens[:, :950].tolist()
        assert any(re.search(AN_OLD_ONE, READER.decode(row)) is not None for row in rows) == everywhere


def test_shortcuts():
    """The latest number is right once in as many times as there are sentences."""
    task = Needle(length=512, tested=512, taught=1)
    found = rules(task, [task.held_out(0, 400)])
    assert found["the latest number"].share == pytest.approx(0.2, abs=0.06)
    assert found["most frequent answer"].share < 0.02


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tested": 3000}, "tested=3000"),
        ({"tokenizer": "t.json"}, "tokenizer=t.json"),
        ({"length": 256, "tested": 256}, "length=256: give at least"),
    ],
)
def test_what_cannot_be_drawn_is_named(fields, message):
    with pytest.raises(InputError, match=message):
        Needle(**fields)


@pytest.mark.parametrize("changes", [{}, {"ideas": ()}, dense()])
def test_a_stream_gives_the_hidden_vectors_of_one_pass(changes, monkeypatch):
    monkeypatch.setattr("benchmarks.proving_ground.runner.CHUNK", 32)
    torch.manual_seed(0)
    config = LeptonConfig(width=32, layers=4, heads=2, kv_heads=2, head_dim=16, ffn=64, vocab_size=20, window=16)
    model = Lepton(config.replace(**changes)).eval()
    for parameter in model.parameters():  # zero weights would hide what is read of tokens before
        parameter.data += 0.3 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    tokens, chosen = torch.randint(1, 20, (3, 100)), torch.rand(3, 100) < 0.2
    streamed = hidden_at(model, tokens, chosen)
    with torch.no_grad():
        torch.testing.assert_close(streamed, model.trunk(tokens).hidden[chosen], rtol=1e-4, atol=1e-4)
        apart = torch.cat([model.trunk(part).hidden for part in tokens.split(32, 1)], 1)[chosen]
        assert (streamed - apart).abs().max() > 0.1, "chunks that know of none before"


def test_smoke(capsys):
    found = smoke(main, capsys, "--models", "dense", "complete", "--rates", "1")
    dense, complete = found["rows_of_table"][-2:]
    assert set(dense["right_at_level"]) == {str(1 + STEP * kind) for kind in (0, 2, 3)}
    assert set(complete["right_at_level"]) == {str(i + STEP * kind) for kind in (0, 2, 3) for i in (1, 2)}
    assert complete["asked_at_level"][str(1 + STEP * 2)] == 4 * complete["asked_at_level"]["1"]
