"""A conversation with a model: its state is kept between turns, so that a turn costs its new tokens alone."""

import dataclasses
from collections.abc import Generator
from pathlib import Path

from lepton.data.chat import ChatTemplate, Message
from lepton.data.tokenizer import Tokenizer
from lepton.engine.options import GenerationOptions
from lepton.errors import InputError
from lepton.generate.generation import Generation
from lepton.generate.stream import Stream
from lepton.model import Memory, Network, State
from lepton.values import SEEDS


class Conversation:
    """Messages go in, and the tokens of answers come out. Each answer opens thoughts that have read all before it."""

    def __init__(
        self,
        model: Network,
        tokenizer: Tokenizer,
        options: GenerationOptions,
        *,
        system: str | None = None,
        memory: Memory | str | Path | None = None,
        uncertainty: bool = False,
    ) -> None:
        """Begin a conversation; nothing is computed yet.

        Args:
            model: one that was trained on the template (`lepton.data.chat`).
            tokenizer: that of the model.
            options: how to generate. An answer ends where the model ends its message; `stop` must be None.
            system: the message that comes first: how the model should answer.
            memory: what the conversation remembers of earlier ones.
            uncertainty: whether to compute that of each new token.

        Raises:
            InputError: a value that cannot be used.
        """
        if options.stop is not None:
            raise InputError("stop: an answer ends where the model ends its message; leave it out")
        self._model, self._tokenizer, self._uncertainty = model, tokenizer, uncertainty
        self._template = ChatTemplate(tokenizer)
        self._options = dataclasses.replace(options, stop=self._template.end_id)
        self._before = [] if system is None else self._template.message(Message("system", system))
        """Ids that the model has not read yet, and that come before the next message."""
        self._memory, self._turns = memory, 0
        self.state: State | None = None
        """What the model has read; None before the first answer."""
        self.stream: Stream | None = None
        """The stream of the present or last answer."""

    def answer(self, text: str) -> Generator[tuple[int, float], None, None]:
        """Yield the tokens of the answer to a message of the user, with the uncertainty of each (0: not computed).

        The iterator may be left early, which ends the answer there; closing or exhausting it brings the conversation's
        state up to date, and only then the next message may follow. The end of the message is not yielded.
        """
        prompt = [*self._before, *self._template.prompt([Message("user", text)])]
        options = self._options
        if options.seed is not None:  # else every answer would be drawn with the same random numbers
            options = dataclasses.replace(options, seed=(options.seed + self._turns) % (SEEDS[1] + 1))
        memory = self._memory if self.state is None else None
        generation = Generation(
            self._model, prompt, options, state=self.state, memory=memory, uncertainty=self._uncertainty
        )
        self._turns += 1
        self.stream = Stream(generation)
        return self._tokens(self.stream)

    def _tokens(self, stream: Stream) -> Generator[tuple[int, float], None, None]:
        last = self._template.end_id
        try:
            for last in stream:
                if last not in (self._template.end_id, self._tokenizer.eos_id):
                    yield last, stream.uncertainty or 0.0
        finally:
            self.state = stream.state
            self._before = self._template.closing(last, self._tokenizer.eos_id)
            stream.close()
