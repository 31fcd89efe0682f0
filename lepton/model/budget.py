"""How much depth routing may cost, and the threshold of the router that keeps to it."""

from dataclasses import asdict, dataclass
from typing import Any, Self

from lepton.values import from_record, positive_nats


@dataclass(frozen=True, kw_only=True)
class Budget:
    """Nats a token that may be lost on average, and the threshold that does; `lepton.evals.budgets` finds it."""

    max_cost: float
    """The mean loss of the text that was calibrated on rose by at most this, in nats a token."""
    least: float
    """Tokens go through the deep blocks whose predicted saving is above this, in nats."""
    share: float
    """Share of the tokens of that text that did."""
    cost: float
    """By how much its mean loss rose."""
    error: float
    """Standard error of this, with windows as the unit."""
    tokens: int
    """Positions of that text."""
    data: str = ""
    """What the text was."""

    def __post_init__(self) -> None:
        positive_nats(self.max_cost)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values, as a checkpoint holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Return the budget that `to_dict` described.

        Raises:
            InputError: something is missing, unknown, or of another type.
        """
        return from_record(cls, values, "budgets", "budget")
