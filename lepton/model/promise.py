"""What a calibration promises of the tokens that a model does not abstain from."""

from dataclasses import asdict, dataclass
from typing import Any, Self

from lepton.errors import InputError, shown
from lepton.values import from_record, real


@dataclass(frozen=True, kw_only=True)
class Promise:
    """A bound on the share of wrong tokens, and the threshold that keeps it; `lepton.evals.conformal` finds them.

    A position is wrong if the model's most likely next token is not that of the text. The model abstains from a
    position whose logit of being wrong is above the threshold.
    """

    risk: float
    """The share of wrong positions among those kept is at most this, in the text that was calibrated on."""
    confidence: float
    """Chance of a calibration that finds such a threshold, over the draw of its windows."""
    threshold: float | None
    """Largest logit of the uncertainty head, before its line, that is kept; None: everything is abstained from."""
    windows: int
    """Windows of text that it was found on."""
    tokens: int
    """Positions in these."""
    data: str = ""
    """What the text was."""

    def __post_init__(self) -> None:
        checked_risk(self.risk)

    def to_dict(self) -> dict[str, Any]:
        """Return it as plain values, as a checkpoint holds it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Any) -> Self:
        """Return the promise that `to_dict` described.

        Raises:
            InputError: something is missing, unknown, or of another type.
        """
        return from_record(cls, values, "promises", "promise")


def checked_risk(risk: Any, name: str = "risk") -> float:
    """Return `risk` as a float.

    Raises:
        InputError: it does not lie between 0 and 1.
    """
    if not 0 < (share := real(risk)) < 1:
        raise InputError(f"{name}={shown(risk)}: must lie between 0 and 1, the share of wrong tokens that is accepted")
    return share
