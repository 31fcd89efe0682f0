"""One prompt's tokens as they come, with the state that they lead to."""

from collections import deque
from collections.abc import Iterator
from itertools import zip_longest

from lepton.engine.stats import Stats
from lepton.errors import InputError
from lepton.generate.generation import Generation
from lepton.model import State
from lepton.model.promise import Promise


class Stream(Iterator[int]):
    """An iterator over the new tokens of one prompt. It may be left early, at any token."""

    def __init__(self, generation: Generation) -> None:
        if not generation.flat:
            rows = len(generation.prompts)
            raise InputError(f"generate_stream follows one prompt, not a list of {rows}; use generate for a batch")
        self._generation, self._steps = generation, iter(generation)
        self._waiting: deque[tuple[int, float | None, bool | None]] = deque()
        self._unused = 0
        self.uncertainty: float | None = None
        """How unsure the model was where it predicted the last token taken; None unless it was asked for."""
        self.abstained: bool | None = None
        """Whether the model abstains from the last token taken; None without `abstain_at`."""

    def __next__(self) -> int:
        if not self._waiting:
            (output,) = next(self._steps)
            self._waiting.extend(zip_longest(output.tokens, output.uncertainties, output.abstained))
        token, self.uncertainty, self.abstained = self._waiting.popleft()
        self._unused = len(self._waiting)
        return token

    def close(self) -> None:
        """End the stream; `state` stays that of the tokens taken."""
        self._waiting.clear()
        self._steps = iter(())

    @property
    def state(self) -> State:
        """The state after the prompt and all tokens taken but the last, which no pass has read; see `Generation`.

        `model.generate([last_token, *more], state=stream.state)` continues from there.
        """
        return self._generation.state_without([self._unused])

    @property
    def promise(self) -> Promise | None:
        """What is promised of the tokens that the model does not abstain from; None without `abstain_at`."""
        return self._generation.promise

    @property
    def largest_kept(self) -> float | None:
        """Tokens of a larger uncertainty are abstained from; None without `abstain_at`."""
        return self._generation.largest_kept

    @property
    def stats(self) -> Stats:
        """Figures of the steps computed so far."""
        return self._generation.stats
