"""One text being generated for a request: its tokens become pieces of text, up to a stop text."""

from collections import deque
from collections.abc import Callable
from collections.abc import Sequence as Items
from dataclasses import dataclass, field, replace
from typing import Literal, TypeAlias

from lepton.data.tokenizer import Tokenizer
from lepton.engine.engine import SequenceOutput
from lepton.engine.runner import TokenLogprobs
from lepton.engine.sequence import Sequence
from lepton.model import State
from lepton.serve.scoring import PromptScores, Scoring

EndedBy: TypeAlias = Literal["length", "stop", "end_of_document", "cancelled", "error"]


@dataclass(frozen=True)
class Token:
    """A new token with what the engine knows of it."""

    id: int
    offset: int
    """Where its text begins, in characters: in the new text, or for a token of the prompt in that one."""
    drafted: bool = False
    """Whether it was a draft that turned out right."""
    uncertainty: float | None = None
    logprobs: TokenLogprobs | None = None
    depth: int | None = None
    """Blocks that were passed where it was chosen."""
    of_prompt: bool = False
    end: int = 0
    """Where its text ends; for a part of a character, which comes with a later token, one character on."""


@dataclass(frozen=True)
class Piece:
    """What one cycle adds to an answer, or its end."""

    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    """Those whose text is complete with this piece, and of a stop text none."""
    ended_by: EndedBy | None = None
    error: str | None = None
    """What went wrong, if it was ended by an error."""


class Answer:
    """A sequence of the engine and the text that its tokens make. Only the thread of the engine changes it."""

    def __init__(
        self,
        sequence: Sequence,
        tokenizer: Tokenizer,
        stops: Items[str] = (),
        scoring: Scoring | None = None,
        closing: Callable[[str], list[int]] | None = None,
    ) -> None:
        """Make an answer that waits.

        Args:
            sequence: what the engine generates.
            tokenizer: gives the text of its tokens.
            stops: texts that end it. The first that appears is left out, with all that follows.
            scoring: where the scores of its prompt come from; None: they are not wanted.
            closing: gives the ids of its text and of its message's end, which a conversation goes on from; None: it is
                of no conversation that is kept.
        """
        self.sequence, self.stops, self.scoring, self.closing = sequence, tuple(stops), scoring, closing
        sequence.keeps_read = closing is not None
        self.state: State | None = None
        """What the model has read when the answer has ended, its message's end included; one row, on the CPU."""
        self.text = ""
        """What was given out so far, where it is kept."""
        self.taken = 0
        """New tokens so far, those of a stop text included."""
        self.drafted, self.accepted = 0, 0
        """Tokens that were drafted for it, and those of them that were right."""
        self.ended_by: EndedBy | None = None
        self._tokenizer, self._decoder = tokenizer, tokenizer.stream_decoder()
        self._held, self._released = "", 0
        """Text that may be the beginning of a stop text, and characters that were given out before it."""
        self._waiting: deque[Token] = deque()
        """Tokens that were not given out."""

    @property
    def prompt(self) -> list[int]:
        """The ids of the prompt."""
        return self.sequence.prompt

    def read_prompt(self, scores: PromptScores) -> Piece:
        """Return the tokens of the prompt; an answer without new tokens ends with them."""
        decoder, offset, tokens = self._tokenizer.stream_decoder(), 0, []
        for i, token in enumerate(self.prompt):
            unsure = scores.uncertainties[i - 1] if i and scores.uncertainties else None
            logprobs, depth = (scores.logprobs[i - 1], scores.depths[i - 1]) if i else (None, None)
            tokens.append(Token(token, offset, False, unsure, logprobs, depth, of_prompt=True))
            offset += len(decoder.push(token))
        if self.sequence.options.max_new_tokens == 0:
            self.ended_by = "length"
        return Piece(tokens=tokens, ended_by=self.ended_by)

    def take(self, output: SequenceOutput) -> Piece:
        """Return what new tokens add: no text while they may turn out to be a stop text."""
        text: list[str] = []
        self.drafted += output.drafted
        self.accepted += output.accepted
        for i, token in enumerate(output.tokens):
            self.taken += 1
            start = self._released + len(self._held)
            self._held += self._decoder.push(token)
            end = self._released + len(self._held)
            if end == start and self._tokenizer.bytes_of(token):
                end += 1  # a part of a character, which comes with a later token
            self._waiting.append(_token(output, i, start, end))
            cut = self._stop()
            if cut is not None:
                return self._cut(text, cut)
            text.append(self._release(len(self._held) - self._doubtful()))
        reason = self.sequence.reason
        if reason is None:
            return Piece("".join(text), self._complete())
        self._held += self._decoder.flush()
        cut = self._stop()
        if cut is not None:
            return self._cut(text, cut)
        text.append(self._release(len(self._held)))
        self.ended_by = reason
        tokens = [*self._waiting]
        self._waiting.clear()
        return Piece("".join(text), tokens, reason)

    def end(self, ended_by: EndedBy, error: str | None = None) -> Piece:
        """End it as it is; what is held back is lost."""
        self.ended_by = ended_by
        return Piece(ended_by=ended_by, error=error)

    def _stop(self) -> int | None:
        """Return where the first stop text begins in what is held back."""
        found = [place for stop in self.stops if (place := self._held.find(stop)) >= 0]
        return min(found, default=None)

    def _doubtful(self) -> int:
        """Return how many of the last characters may be the beginning of a stop text."""
        longest = max((len(stop) for stop in self.stops), default=1) - 1
        for count in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-count:]) for stop in self.stops):
                return count
        return 0

    def _release(self, count: int) -> str:
        text, self._held = self._held[:count], self._held[count:]
        self._released += len(text)
        if self.closing is not None:
            self.text += text
        return text

    def _complete(self) -> list[Token]:
        """Return the tokens whose text has been given out."""
        found = []
        while self._waiting and self._waiting[0].end <= self._released:
            found.append(self._waiting.popleft())
        return found

    def _cut(self, text: list[str], cut: int) -> Piece:
        """End the answer before a stop text; a token that begins before it is given out."""
        text.append(self._release(cut))
        end = self._released
        tokens = [replace(token, end=min(token.end, end)) for token in self._waiting if token.offset < end]
        self._waiting.clear()
        self.ended_by = "stop"
        return Piece("".join(text), tokens, "stop")


def _token(output: SequenceOutput, i: int, offset: int, end: int) -> Token:
    """Return token `i` of an output with what is known of it."""
    return Token(
        output.tokens[i],
        offset,
        i < output.accepted,
        output.uncertainties[i] if output.uncertainties else None,
        output.logprobs[i] if output.logprobs else None,
        output.depths[i] if output.depths else None,
        end=end,
    )
