"""A small model whose greedy text varies, with a tokenizer that fits it, and answers to give to a worker."""

import threading

import torch

from lepton.data.tokenizer import Tokenizer
from lepton.engine.engine import SequenceOutput
from lepton.engine.options import GenerationOptions
from lepton.engine.sequence import Sequence
from lepton.model.budget import Budget
from lepton.model.promise import Promise
from lepton.ops.choose import stream_words
from lepton.serve.answer import Answer
from lepton.serve.worker import Worker
from tests.cli.tiny import small_bpe
from tests.generate.models import enlivened
from tests.laws.lab import build

WORDS = ["The quick brown fox", "Käse", "東京, too", " jumps over the lazy dog." * 4, "x"]


def small_tokenizer(size=300):
    return Tokenizer.from_json(small_bpe(size).to_str())


def small_model():
    """In fp64, so that neighbours in a batch change no token."""
    return enlivened(build("complete", vocab_size=300)).eval()


def calibrated_model():
    """One that may abstain from about half of its tokens, or from all, and skip blocks at a cost."""
    model = small_model()
    of = {"confidence": 0.9, "windows": 100, "tokens": 1000}
    unsure = model.generate_with_uncertainty([5, 6, 7], 40, seed=1).uncertainties
    chance = torch.tensor(sorted(unsure)[20], dtype=model.dtype)
    slope, shift = model.idea("uncertainty").calibration.tolist()
    half = float((chance.logit() - shift) / slope)
    model.idea("uncertainty").promises = (
        Promise(risk=0.2, threshold=half, **of),
        Promise(risk=0.01, threshold=None, **of),
    )
    model.idea("router").budgets = (Budget(max_cost=0.05, least=0.0, share=0.5, cost=0.04, error=0.01, tokens=1000),)
    return model


def answer_of(model, tokenizer, prompt, row=0, stops=(), uncertainty=False, logprobs=None, **options):
    """The answer for row `row` of what `generate` makes of these options."""
    found = GenerationOptions(**options)
    ids = tokenizer.encode(prompt) or [model.config.eos_id]
    eos, stream = [[model.config.eos_id]], stream_words(found.seed, row)
    wanted = {"uncertainty": uncertainty, "logprobs": logprobs}
    return Answer(Sequence(ids, found, stops=eos, stream=stream, **wanted), tokenizer, stops)


class Collected:
    """A worker of which all pieces are kept; `wait` waits until each of some answers has its end."""

    def __init__(self, model, **arguments):
        self.pieces, self._changed = {}, threading.Condition()
        self.worker = Worker(model, self.deliver, **arguments)

    def deliver(self, added):
        with self._changed:
            for answer, piece in added:
                self.pieces.setdefault(answer, []).append(piece)
            self._changed.notify_all()

    def __enter__(self):
        self.worker.start()
        return self

    def __exit__(self, *error):
        self.worker.close()

    def wait_for(self, condition):
        with self._changed:
            assert self._changed.wait_for(condition, timeout=60)

    def wait(self, *answers):
        self.wait_for(lambda: all(map(self.ended, answers)))

    def ended(self, answer):
        return any(piece.ended_by is not None for piece in self.pieces.get(answer, []))

    def text(self, answer):
        return "".join(piece.text for piece in self.pieces[answer])


def output_of(sequence, ids, reason=None):
    """What a cycle gives: some ids, and perhaps the end."""
    sequence.reason = reason
    return SequenceOutput(sequence, ids, [], [], [], drafted=0, accepted=0)
