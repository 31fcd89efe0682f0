"""What generation did: figures about speculation and depth."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Stats:
    """Counts that grow while tokens are generated.

    A step is one verification of one row: its newest token and its drafts pass the model together. Without
    speculation every step gives one token. Each row's first token comes from its prompt and belongs to no step.
    """

    forward_calls: int = 0
    """Passes through the model, each for all running rows: chunks of the prompt, then verifications."""
    new_tokens: int = 0
    """Tokens handed out, over all rows."""
    steps: int = 0
    step_tokens: int = 0
    """Of the new tokens, those that came from steps."""
    drafted: list[int] = field(default_factory=list)
    """Steps that had a first draft, a second one, and so on."""
    accepted: list[int] = field(default_factory=list)
    """Steps in which the first, second, ... draft was accepted."""
    positions: int = 0
    """Tokens computed: prompts, new tokens but the last, rejected drafts."""
    blocks: int = 0
    """Blocks that these went through."""

    @property
    def tokens_per_step(self) -> float:
        """Mean tokens that a step gave; 1 without speculation, 0 if there was no step."""
        return self.step_tokens / self.steps if self.steps else 0.0

    @property
    def acceptance(self) -> list[float]:
        """Share of the first, second, ... drafts that were accepted; one can be only if all before it are."""
        return [accepted / drafted for accepted, drafted in zip(self.accepted, self.drafted, strict=True)]

    @property
    def mean_depth(self) -> float:
        """Mean blocks that a computed token went through, 0 if there was none."""
        return self.blocks / self.positions if self.positions else 0.0

    def add_steps(self, steps: Iterable[tuple[int, int, int]]) -> None:
        """Count steps, each of so many new tokens, of so many drafts of which the first ones were accepted.

        Those without a new token, of a text that had ended before, do not count.
        """
        for (tokens, drafted, accepted), times in Counter(steps).items():
            if not tokens:
                continue
            self.steps += times
            self.step_tokens += times * tokens
            missing = drafted - len(self.drafted)
            self.drafted += [0] * missing
            self.accepted += [0] * missing
            for i in range(drafted):
                self.drafted[i] += times
                self.accepted[i] += times * (i < accepted)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures that people compare, rounded."""
        return {
            "new_tokens": self.new_tokens,
            "forward_calls": self.forward_calls,
            "tokens_per_step": round(self.tokens_per_step, 3),
            "acceptance": [round(share, 3) for share in self.acceptance],
            "mean_depth": round(self.mean_depth, 3),
        }
