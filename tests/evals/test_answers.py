"""Answers are the texts of `generate`, cut where they end."""

import pytest

from lepton.engine.options import GenerationOptions
from lepton.evals.answers import Question, answers
from tests.cli.tiny import save_tiny

PROMPTS = ["The quick", "Ein", "fox jumps over the lazy dog. " * 3, "東京"]
GREEDY = GenerationOptions(temperature=0, max_new_tokens=40)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("answers") / "x.pt")


def whole(model, tokenizer, prompt, **options):
    """The new text, without the end of its document."""
    ids = tokenizer.encode(prompt)
    return tokenizer.decode(model.generate(ids, 40, **options)[len(ids) :])


def ask(saved, prompts, until=(), options=GREEDY, **others):
    model, tokenizer = saved
    questions = [Question(tokenizer.encode(prompt), options, until) for prompt in prompts]
    return answers(model, tokenizer, questions, **others)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_they_are_those_of_generate(saved, batch_size):
    assert ask(saved, PROMPTS, batch_size=batch_size) == [whole(*saved, prompt, temperature=0) for prompt in PROMPTS]


def test_they_end_before_the_first_of_the_texts_that_end_them(saved):
    for prompt in PROMPTS:
        text = whole(*saved, prompt, temperature=0)
        for start in range(0, len(text) - 3, 9):
            ends = [text[start : start + 3], "never", ""]
            assert ask(saved, [prompt], ends) == [text[: text.index(ends[0])]]
    assert ask(saved, PROMPTS[:1], ["never"]) == [whole(*saved, PROMPTS[0], temperature=0)]


def test_an_answer_that_has_ended_is_not_written_on(saved):
    model, _ = saved
    passes = []
    handle = model.embed.register_forward_hook(lambda *_: passes.append(1))
    full = ask(saved, PROMPTS[:1])[0]
    needed = len(passes)
    ask(saved, PROMPTS[:1], [full[2:4]])
    handle.remove()
    assert len(passes) - needed < needed / 2


def test_sampling_is_repeatable_and_each_has_its_own_options(saved):
    model, tokenizer = saved
    options = [
        GenerationOptions(temperature=1.0, top_p=1.0, max_new_tokens=40),
        GenerationOptions(temperature=1.0, top_p=1.0, max_new_tokens=40, seed=7),
        GenerationOptions(temperature=0, max_new_tokens=5),
        GenerationOptions(max_new_tokens=0),
    ]
    questions = [Question(tokenizer.encode("Ein"), each) for each in options]
    first, second, short, nothing = found = answers(model, tokenizer, questions)
    assert found == answers(model, tokenizer, questions, 1)
    assert first == whole(model, tokenizer, "Ein", temperature=1.0, top_p=1.0, seed=0)
    assert second == whole(model, tokenizer, "Ein", temperature=1.0, top_p=1.0, seed=7)
    assert whole(model, tokenizer, "Ein", temperature=0).startswith(short)
    assert nothing == ""


def test_progress(saved):
    counts = []
    ask(saved, PROMPTS, done=counts.append)
    assert sum(counts) == len(PROMPTS)
    assert answers(*saved, []) == []
