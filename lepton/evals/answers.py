"""Texts that end where a given text appears: what benchmarks that read an answer ask."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lepton.data.tokenizer import StreamDecoder, Tokenizer
from lepton.engine.engine import Engine
from lepton.engine.options import GenerationOptions
from lepton.engine.runners import Lease
from lepton.engine.sequence import Sequence as Running
from lepton.model import Network
from lepton.ops.choose import stream_words


@dataclass(frozen=True)
class Question:
    """A prompt, how to continue it, and what ends the answer."""

    prompt: Sequence[int]
    """Token ids, at least one."""
    options: GenerationOptions
    """A `seed` of None is 0, so that answers can be repeated; `stop` is not read."""
    until: Sequence[str] = ()
    """Texts that end the answer, wherever tokens begin and end in them. They are no part of it."""


class _Answer:
    """An answer that is being written."""

    def __init__(self, question: Question, decoder: StreamDecoder, longest: int) -> None:
        self.until, self._decoder, self._longest = [each for each in question.until if each], decoder, longest
        self.text, self.ended = "", False

    def add(self, tokens: Sequence[int]) -> None:
        """Append tokens, unless the text has ended before them."""
        for token in tokens:
            if self.ended:
                return
            self._append(self._decoder.push(token))

    def finish(self) -> str:
        """Return the whole text, with what a torn character is replaced by."""
        if not self.ended:
            self._append(self._decoder.flush())
        return self.text

    def _append(self, more: str) -> None:
        start = max(0, len(self.text) - self._longest)  # before it there is none
        self.text += more
        places = [place for each in self.until if (place := self.text.find(each, start)) >= 0]
        if places:
            self.text, self.ended = self.text[: min(places)], True


def answers(
    model: Network,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    batch_size: int = 8,
    *,
    done: Callable[[int], object] = lambda count: None,
) -> list[str]:
    """Return the text that the model gives to each question, at most up to the first of the texts that end it.

    An answer also ends with its document and after `max_new_tokens`. Its place is then free for the next question.

    Args:
        model: in eval mode.
        tokenizer: that of the model.
        questions: what is asked.
        batch_size: answers that are written at once.
        done: called when answers have ended, with their number.
    """
    if not questions:
        return []
    found = [_Answer(each, tokenizer.stream_decoder(), max(map(len, each.until), default=0)) for each in questions]
    sequences = [_sequence(each, model.config.eos_id) for each in questions]
    place_of = {id(sequence): place for place, sequence in enumerate(sequences)}
    longest = max(len(each.prompt) + each.options.max_new_tokens for each in questions)
    with Lease(model, min(len(questions), batch_size), longest) as lease:
        engine = Engine(lease.runner)
        for sequence in sequences:
            if sequence.options.max_new_tokens:
                engine.add(sequence)
        try:
            while not engine.idle:
                for output in engine.step():
                    answer = found[place_of[id(output.sequence)]]
                    answer.add(output.tokens)
                    if answer.ended:
                        engine.cancel(output.sequence)
                    if output.sequence.ended:
                        done(1)
        finally:
            engine.close()
    return [each.finish() for each in found]


def _sequence(question: Question, eos_id: int) -> Running:
    seed = question.options.seed or 0
    return Running([*question.prompt], question.options, stops=[[eos_id]], stream=stream_words(seed, 0))
