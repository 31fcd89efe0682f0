"""The engine: sequences join and leave between cycles, each is as it would be alone, and nothing is left behind."""

import random

import pytest
import torch

from lepton.engine.engine import Engine, NotFiniteError
from lepton.engine.options import GenerationOptions
from lepton.engine.runner import Runner
from lepton.engine.sequence import Sequence
from lepton.engine.speculation import Speculation
from lepton.ops.choose import stream_words
from tests.generate.models import BATCH, PROMPT, always_drafting, lively

KINDS = [
    {"temperature": 0},
    {"temperature": 1.2, "top_p": 0.9},
    {"temperature": 0.8, "top_k": 7},
    {"temperature": 1.0, "top_p": 0.8, "top_k": 20, "think": 0},
    {"temperature": 0, "think": 3, "depth": 0.5},
    {"temperature": 1.5, "use_speculative": False},
]
"""Options that sequences of one engine have at the same time."""


def sequence_of(model, number, most=30, **more):
    generator = random.Random(number)
    prompt = [generator.randrange(1, model.config.vocab_size) for _ in range(generator.choice([1, 3, 9, 30]))]
    options = GenerationOptions(max_new_tokens=most, **KINDS[number % len(KINDS)] | more)
    return Sequence(prompt, options, stops=[[model.config.eos_id]], stream=stream_words(number, 0))


def finish(engine):
    while not engine.idle:
        engine.step()


def alone(model, number, **more):
    sequence = sequence_of(model, number, **more)
    engine = Engine(Runner(model, 1, 100))
    engine.add(sequence)
    finish(engine)
    return sequence.new


@pytest.fixture(scope="module")
def model():
    return lively("complete")


@pytest.mark.parametrize(("variant", "ahead"), [("complete", 0), ("complete", 2), ("dense", 1)])
def test_a_sequence_is_what_it_is_alone(variant, ahead):
    """Of any length and options, in any place of the pool, whoever joins, ends or is cancelled beside it."""
    model, generator = lively(variant), random.Random(ahead)
    sequences = [sequence_of(model, number) for number in range(12)]
    if variant == "dense":
        sequences = [each for each in sequences if each.options.think is None]
    engine, waiting, cancelled = Engine(Runner(model, 4, 100), ahead=ahead), list(sequences), []
    with always_drafting():
        while waiting or not engine.idle:
            for _ in range(generator.randrange(3)):
                if waiting:
                    engine.add(waiting.pop(0))
            engine.step()
            running = [each for each in sequences if each.status == "running"]
            if len(cancelled) < 3 and running and generator.random() < 0.2:
                cancelled.append(generator.choice(running))
                engine.cancel(cancelled[-1])
    for number, sequence in enumerate(sequences):
        expected = alone(model, number) if variant == "complete" else alone(model, sequence_number(model, sequence))
        if sequence in cancelled:
            assert sequence.new == expected[: len(sequence.new)]
        else:
            assert sequence.new == expected
            assert sequence.reason in ("length", "end_of_document")


def sequence_number(model, sequence):
    return next(n for n in range(12) if stream_words(n, 0) == sequence.stream)


def test_outputs_are_the_new_tokens_in_order(model):
    sequences = [sequence_of(model, number) for number in range(3)]
    sequences[0].uncertainty, sequences[1].logprobs = True, 2
    engine, found = Engine(Runner(model, 3, 100)), {each: [] for each in sequences}
    for sequence in sequences:
        engine.add(sequence)
    while not engine.idle:
        for output in engine.step():
            assert output.tokens
            found[output.sequence] += output.tokens
    assert list(found.values()) == [each.new for each in sequences]
    assert engine.stats.new_tokens == sum(map(len, found.values()))


def test_outputs_say_what_was_drafted_and_how_deep_it_went(model):
    """Depth 1 goes through all blocks and depth 0 through the stem; the first tokens of a cycle are its drafts."""
    sequences = [sequence_of(model, 0, depth=depth) for depth in (1, 0)]
    for sequence in sequences:
        sequence.logprobs = 0
    engine, found = Engine(Runner(model, 2, 100)), {each: [] for each in sequences}
    for sequence in sequences:
        engine.add(sequence)
    with always_drafting():
        while not engine.idle:
            for output in engine.step():
                assert len(output.depths) == len(output.tokens)
                assert output.accepted <= min(output.drafted, len(output.tokens))
                found[output.sequence].append(output)
    depths = [{depth for output in found[each] for depth in output.depths} for each in sequences]
    assert depths == [{model.config.layers}, {model.config.stem_layers}]
    outputs = [each for each in found[sequences[0]] if each.drafted]
    assert len(outputs) > 1
    assert all(each.accepted == len(each.tokens) - 1 for each in outputs[:-1])  # the last one may be cut


def test_a_cancelled_sequence_frees_its_place(model):
    engine = Engine(Runner(model, 1, 100))
    first, second = sequence_of(model, 0, most=10_000), sequence_of(model, 1)
    engine.add(first)
    engine.add(second)
    for _ in range(5):
        engine.step()
    assert (first.status, second.status) == ("running", "waiting")
    engine.cancel(first)
    finish(engine)
    assert (first.reason, second.new) == ("cancelled", alone(model, 1))


def test_closing_ends_everything(model):
    engine = Engine(Runner(model, 2, 100), ahead=1)
    sequences = [sequence_of(model, number, most=1000) for number in range(4)]
    for sequence in sequences:
        engine.add(sequence)
    engine.step()
    engine.close()
    assert engine.idle
    assert {each.reason for each in sequences} == {"cancelled"}


def test_a_diverged_model_is_named():
    model = lively("complete")
    with torch.no_grad():
        model.blocks[0].mlp.down.weight.fill_(float("nan"))
    engine = Engine(Runner(model, 1, 100))
    engine.add(sequence_of(model, 0))
    with pytest.raises(NotFiniteError, match="not finite"):
        finish(engine)


def test_speculation_that_does_not_pay_stops(model):
    """The drafts of a model that was never trained are all wrong, and each makes a pass a quarter longer."""

    class Timed(Speculation):
        def record(self, bucket, drafts, seconds, tokens, rows):
            assert seconds > 0
            super().record(bucket, drafts, 1 + drafts / 4, tokens, rows)

    speculation = Timed((0, model.drafter.count))
    engine = Engine(Runner(model, 1, 2000), speculation=speculation)
    engine.add(Sequence(PROMPT, GenerationOptions(max_new_tokens=600, temperature=0), stops=[[0]], stream=(0, 0)))
    for _ in range(300):
        engine.step()
    assert 0 < engine.stats.drafted[0] < engine.stats.steps / 10
    assert speculation.figures()["tokens"][model.drafter.count] < 2


# On a GPU


@pytest.fixture(scope="module")
def on_gpu():
    return lively("complete", torch.float32).cuda()


@pytest.mark.gpu
def test_many_rows_on_a_gpu_are_what_they_are_alone(on_gpu):
    """In fp32, with CUDA graphs: 200 sequences, 64 at once, that join and leave, against each alone and on a CPU."""
    on_cpu = lively("complete", torch.float32)
    sequences = [sequence_of(on_gpu, number) for number in range(200)]
    engine = Engine(Runner(on_gpu, 64, 100))
    with always_drafting():
        for sequence in sequences:
            engine.add(sequence)
        finish(engine)
        for number in range(0, 200, 9):
            assert sequences[number].new == alone(on_gpu, number)
    for number in range(0, 200, 5):
        assert sequences[number].new == alone(on_cpu, number)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.gpu
def test_cycles_do_not_wait_for_the_device_and_keep_no_memory(on_gpu):
    engine = Engine(Runner(on_gpu, 4, 100))
    for row, prompt in enumerate(BATCH):
        options = GenerationOptions(max_new_tokens=100_000, temperature=1.0, depth=row / 3)
        engine.add(Sequence(prompt, options, stops=[[-1]], stream=stream_words(5, row)))
    with always_drafting():
        for _ in range(20):
            engine.step()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error")
        try:
            for _ in range(200):
                engine.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        for _ in range(10_000):
            engine.step()
    torch.cuda.synchronize()
    assert torch.cuda.memory_allocated() == before
    engine.close()
