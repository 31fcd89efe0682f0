"""The engine's thread: each answer is what `generate` gives with its seed, whoever joins, leaves or fails beside it."""

import random
import threading

import pytest

from lepton.engine.runner import Runner
from lepton.serve.worker import Worker
from tests.serve.small import WORDS, Collected, answer_of, small_tokenizer

KINDS = [
    {"temperature": 0},
    {"temperature": 1.2, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 7},
    {"temperature": 1.0, "think": 0},
    {"temperature": 1.0, "think": 3, "depth": 0.5},
    {"temperature": 1.5, "use_speculative": False},
]
TOKENIZER = small_tokenizer()


def expected(model, prompt, row=0, **options):
    ids = TOKENIZER.encode(prompt) or [model.config.eos_id]
    rows = model.generate([ids] * (row + 1), **options)
    return TOKENIZER.decode(rows[row][len(ids) :])


def asked(number):
    return WORDS[number % len(WORDS)], KINDS[number % len(KINDS)] | {"seed": number, "max_new_tokens": 5 + number % 20}


@pytest.mark.parametrize("ahead", [0, 2])
def test_every_answer_is_what_generate_gives(model, ahead):
    """With more answers than places, which join while others run; also where the host is behind, as on a GPU."""
    with Collected(model, places=4, ahead=ahead) as collected:
        answers = {}
        for number in range(24):
            prompt, options = asked(number)
            answers[number] = answer_of(model, TOKENIZER, prompt, **options)
            collected.worker.submit([answers[number]])
            if number % 7 == 6:
                collected.wait(answers[number - 6])
        collected.wait(*answers.values())
    for number, answer in answers.items():
        prompt, options = asked(number)
        assert collected.text(answer) == expected(model, prompt, **options)
    assert (collected.worker.running, collected.worker.waiting, collected.worker.failures) == (0, 0, 0)


def test_rows_of_one_seed_differ_as_those_of_generate(model):
    options = {"seed": 3, "max_new_tokens": 12, "temperature": 1.0}
    answers = [answer_of(model, TOKENIZER, "fox", row=row, **options) for row in range(3)]
    with Collected(model, places=2) as collected:
        collected.worker.submit(answers)
        collected.wait(*answers)
    texts = [collected.text(each) for each in answers]
    assert texts == [expected(model, "fox", row=row, **options) for row in range(3)]
    assert len(set(texts)) == 3


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_cancelled_answer_frees_its_place(model, ahead):
    """The only place: what waits behind goes on, and is what it would have been."""
    long = answer_of(model, TOKENIZER, "x", seed=1, temperature=0, max_new_tokens=10_000_000)
    waiting = answer_of(model, TOKENIZER, "x", seed=2, max_new_tokens=8)
    never = answer_of(model, TOKENIZER, "x", seed=3, max_new_tokens=8)
    with Collected(model, places=1, ahead=ahead) as collected:
        collected.worker.submit([long, never, waiting])
        collected.wait_for(lambda: len(collected.pieces.get(long, [])) > 2)
        assert (collected.worker.running, collected.worker.waiting) == (1, 2)
        collected.worker.cancel([long, never])
        collected.wait(long, waiting)
        collected.worker.cancel([waiting])  # too late: it has ended
        assert collected.pieces[long][-1].ended_by == "cancelled"
        assert [each.ended_by for each in collected.pieces[never]] == ["cancelled"]
        assert collected.text(waiting) == expected(model, "x", seed=2, max_new_tokens=8)
    assert [each.ended_by for each in collected.pieces[waiting]].count("length") == 1
    assert collected.pieces[waiting][-1].ended_by == "length"


@pytest.mark.parametrize("ahead", [0, 2])
def test_a_stop_text_frees_the_place(model, ahead):
    text = expected(model, "x", seed=1, max_new_tokens=40)
    stop = text[8:11]
    answer = answer_of(model, TOKENIZER, "x", seed=1, max_new_tokens=10_000_000, stops=[stop])
    with Collected(model, places=1, ahead=ahead) as collected:
        collected.worker.submit([answer])
        collected.wait(answer)
        after = answer_of(model, TOKENIZER, "x", seed=1, max_new_tokens=3)
        collected.worker.submit([after])
        collected.wait(after)
    assert collected.text(answer) == text[: text.index(stop)]


def test_an_error_of_the_engine_ends_those_in_it_and_no_other(model, monkeypatch):
    launch, calls = Runner.launch, []

    def failing(self, work):
        calls.append(work)
        if len(calls) == 3:
            raise RuntimeError("the device is on fire\nand more")
        return launch(self, work)

    monkeypatch.setattr(Runner, "launch", failing)
    answers = [answer_of(model, TOKENIZER, "fox", seed=i, max_new_tokens=20) for i in range(3)]
    with Collected(model, places=1) as collected:
        collected.worker.submit(answers)
        collected.wait(*answers)
    last = collected.pieces[answers[0]][-1]
    assert (last.ended_by, last.error) == ("error", "the device is on fire")
    for i in (1, 2):
        assert collected.text(answers[i]) == expected(model, "fox", seed=i, max_new_tokens=20)
    assert collected.worker.failures == 1


def test_where_no_engine_can_be_made_what_waits_is_told(model, monkeypatch):
    def failing(self):
        raise MemoryError("no memory for the pool")

    monkeypatch.setattr(Runner, "refresh", failing)
    answer = answer_of(model, TOKENIZER, "fox", seed=1)
    with Collected(model, places=2) as collected:
        collected.worker.submit([answer])
        collected.wait(answer)
        assert collected.pieces[answer][-1].error == "no memory for the pool"
        assert collected.worker.is_alive


def test_closing_cancels_what_runs_and_waits(model):
    answers = [answer_of(model, TOKENIZER, "x", seed=i, temperature=0, max_new_tokens=10_000_000) for i in range(3)]
    with Collected(model, places=1) as collected:
        collected.worker.submit(answers)
        collected.wait_for(lambda: answers[0] in collected.pieces)
    assert all(collected.pieces[each][-1].ended_by == "cancelled" for each in answers)
    assert not collected.worker.is_alive
    Worker(model, print).close()  # one that never started


def test_prompts_join_in_groups_where_all_places_are_taken(model, monkeypatch):
    """Each of 32 places is freed in a cycle of its own; two prompts or more are read at once."""
    prefill, groups = Runner.prefill, []

    def counting(self, work):
        groups.append(len(work.sequences))
        return prefill(self, work)

    monkeypatch.setattr(Runner, "prefill", counting)
    options = {"temperature": 0, "use_speculative": False}
    answers = [answer_of(model, TOKENIZER, "x", seed=1, max_new_tokens=3 + i % 32, **options) for i in range(80)]
    with Collected(model, places=32) as collected:
        collected.worker.submit(answers)
        collected.wait(*answers)
    assert groups[0] == 32
    assert sum(groups) == 80
    assert len(groups) <= 1 + 48 // 2
    longest = answers[31].sequence.new
    assert all(each.sequence.new == longest[: each.taken] for each in answers)


def test_what_runs_goes_on_while_prompts_keep_joining(model):
    """A prompt joins at every moment; the first answer must still come to its end."""
    first = answer_of(model, TOKENIZER, "fox", seed=1, max_new_tokens=30)
    stop, generator = threading.Event(), random.Random(1)
    with Collected(model, places=64) as collected:

        def flood():
            while not stop.is_set():
                collected.worker.submit(
                    [answer_of(model, TOKENIZER, "x", seed=generator.randrange(99), max_new_tokens=1)]
                )
                stop.wait(0.002)

        thread = threading.Thread(target=flood)
        collected.worker.submit([first])
        thread.start()
        try:
            collected.wait(first)
        finally:
            stop.set()
            thread.join()
    assert collected.text(first) == expected(model, "fox", seed=1, max_new_tokens=30)
