"""A text that is being generated: what was asked for, the new tokens, where it ended, and its place in the pool."""

from collections import deque
from typing import TYPE_CHECKING, Literal, TypeAlias

from lepton.engine.options import GenerationOptions
from lepton.values import Least, depth_rule

if TYPE_CHECKING:
    from lepton.model import State

Status: TypeAlias = Literal["waiting", "running", "done", "cancelled"]
Reason: TypeAlias = Literal["length", "stop", "end_of_document", "cancelled"]


class Sequence:
    """One prompt and its new tokens. The scheduler gives it a place and tracks its phase; `take` ends it.

    The phase of a token is the number of tokens since a segment opened, modulo the tokens of a segment: a token of
    phase 0 opens one.
    """

    def __init__(
        self,
        prompt: list[int],
        options: GenerationOptions,
        *,
        stops: list[list[int]],
        stream: tuple[int, int],
        uncertainty: bool = False,
        logprobs: int | None = None,
        past: "tuple[State, int] | None" = None,
        past_phase: int = 0,
    ) -> None:
        """Make a sequence that waits.

        Args:
            prompt: token ids, at least one.
            options: how to generate; its `stop` and `seed` are not read, but what was made of them:
            stops: the ids that end the text: first the end-of-document id alone, then the stop sequences.
            stream: two 32-bit words that name its stream of random numbers.
            uncertainty: whether that of each new token is wanted.
            logprobs: how many of the most probable tokens are wanted at each new token, with the log-probabilities of
                all; None: no log-probabilities.
            past: the state that the prompt continues, and its row in it; None: it begins a text.
            past_phase: phase after that state.
        """
        assert prompt, "an empty prompt"
        assert len(stops[0]) == 1, "the end-of-document id comes first"
        self.prompt, self.options, self.stops, self.stream = prompt, options, stops, stream
        self.uncertainty, self.logprobs = uncertainty, logprobs
        self.past, self.past_phase = past, past_phase
        self.opens: list[int] = []
        """Indices of prompt tokens that open a segment, beside the last one."""
        self.keeps_read = False
        """Whether `read` is wanted."""
        self.read: State | None = None
        """The state after the prompt, one row, once the prompt has been read."""
        self.depth = depth_rule(options.depth)
        """Share of tokens allowed past the stem, in 0..1, or the least saving in nats that lets one pass."""
        self.routed = isinstance(self.depth, Least) or self.depth < 1
        """Whether tokens may skip the deep blocks."""
        self.new: list[int] = []
        """The new tokens; what ended the text is kept."""
        self.status: Status = "waiting"
        self.reason: Reason | None = None
        """Why it ended."""
        self.place: int | None = None
        """Its row of the pool, from its prefill until the passes that it is in have been read."""
        self.phase = 0
        """Phase of the next token that a pass reads, as of the newest pass whose outcome is known."""
        self.unread: deque[int] = deque()
        """Tokens of each pass whose outcome is not known yet, the oldest first; 0 for the prefill, which leaves a
        known phase."""
        self._last_ids = {stop[-1] for stop in stops}
        """The tokens that may end the text: only after one of them is it compared with the stop sequences."""

    @property
    def eos_id(self) -> int:
        """The end-of-document id."""
        return self.stops[0][0]

    @property
    def ended(self) -> bool:
        """Whether there are no more new tokens."""
        return self.reason is not None

    @property
    def exhausted(self) -> bool:
        """Whether it has ended, or will by the passes whose outcome is not known yet: each gives a token or more."""
        return self.reason is not None or len(self.new) + len(self.unread) >= self.options.max_new_tokens

    def take(self, ids: list[int]) -> list[int]:
        """Append the new tokens of a pass until the text ends; return those that count.

        None counts once it has ended. The time does not depend on the length of the text.
        """
        room = self.options.max_new_tokens - len(self.new)
        if self._last_ids.isdisjoint(ids) and len(ids) < room and self.reason is None:  # nearly always
            self.new += ids
            return ids
        counted: list[int] = []
        for token in ids[:room]:
            if self.ended:
                break
            counted.append(token)
            self.new.append(token)
            if token == self.eos_id:
                self._end("end_of_document")
            elif any(self.new[-len(stop) :] == stop for stop in self.stops[1:] if stop[-1] == token):
                self._end("stop")
        if len(self.new) == self.options.max_new_tokens and not self.ended:
            self._end("length")
        return counted

    def _end(self, reason: Reason) -> None:
        self.status, self.reason = "done", reason

    def cancel(self) -> None:
        """End it here; no effect if it has ended."""
        if not self.ended:
            self.status, self.reason = "cancelled", "cancelled"
