"""What generation did: figures about speculation and depth."""

from dataclasses import dataclass, field
from typing import Any


@dataclass
class Stats:
    """Counts that grow while tokens are generated.

    A cycle is one verification of one row: its newest token and its drafts pass the model together. Without
    speculation every cycle gives one token. Each row's first token comes from its prompt and belongs to no cycle.
    """

    forward_calls: int = 0
    """Passes through the model, each for all running rows: chunks of the prompt, then verifications."""
    new_tokens: int = 0
    """Tokens handed out, over all rows."""
    cycles: int = 0
    cycle_tokens: int = 0
    """Of the new tokens, those that came from cycles."""
    drafted: list[int] = field(default_factory=list)
    """Cycles that had a first draft, a second one, and so on."""
    accepted: list[int] = field(default_factory=list)
    """Cycles in which it stood."""
    positions: int = 0
    """Tokens computed: prompts, new tokens but the last, rejected drafts."""
    blocks: int = 0
    """Blocks that these went through."""

    @property
    def tokens_a_cycle(self) -> float:
        """Mean tokens that a cycle gave; 1 without speculation, 0 if there was no cycle."""
        return self.cycle_tokens / self.cycles if self.cycles else 0.0

    @property
    def acceptance(self) -> list[float]:
        """Share of the first, second, ... drafts that stood. One stands only if those before it do."""
        return [accepted / drafted for accepted, drafted in zip(self.accepted, self.drafted, strict=True)]

    @property
    def mean_depth(self) -> float:
        """Mean blocks that a computed token went through, 0 if there was none."""
        return self.blocks / self.positions if self.positions else 0.0

    def add_cycle(self, tokens: int, *, drafted: int, accepted: int) -> None:
        """Count a cycle that gave `tokens`, with `drafted` drafts of which the first `accepted` stood."""
        self.cycles += 1
        self.cycle_tokens += tokens
        missing = drafted - len(self.drafted)
        self.drafted += [0] * missing
        self.accepted += [0] * missing
        for i in range(drafted):
            self.drafted[i] += 1
            self.accepted[i] += i < accepted

    def to_dict(self) -> dict[str, Any]:
        """Return the figures that people compare, rounded."""
        return {
            "new_tokens": self.new_tokens,
            "forward_calls": self.forward_calls,
            "tokens_a_cycle": round(self.tokens_a_cycle, 3),
            "acceptance": [round(share, 3) for share in self.acceptance],
            "mean_depth": round(self.mean_depth, 3),
        }
