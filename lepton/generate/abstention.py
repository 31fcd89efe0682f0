"""Abstention: which new tokens a model does not vouch for, at a risk that was calibrated."""

import math
from typing import Any, NamedTuple, Protocol

import torch

from lepton.engine.options import GenerationOptions
from lepton.errors import InputError
from lepton.generate.prompts import Tokens, Uncertainties
from lepton.model import Network
from lepton.model.promise import Promise, checked_risk

Abstentions = list[bool] | list[list[bool]]
"""For each new token: whether the model abstains from it."""


class TokensAndAbstentions(NamedTuple):
    """Result of `Lepton.generate` with `abstain_at`, for a prompt of token ids."""

    tokens: Tokens
    """What `generate` returns without it: the same tokens, none left out."""
    abstained: Abstentions
    uncertainties: Uncertainties


class TextAndAbstentions(NamedTuple):
    """Result of `Lepton.generate` with `abstain_at`, for a text."""

    text: str
    """What `generate` returns without it: the same text, nothing left out."""
    pieces: list[tuple[str, bool]]
    """The new text in pieces of complete characters, and whether the model abstains from a token of the piece."""


class Decoder(Protocol):
    """Such as `Tokenizer.stream_decoder()`."""

    def push(self, token: int) -> str:
        """Return the text that a token completes."""

    def flush(self) -> str:
        """Return what is held back."""


def pieces_of(decoder: Decoder, tokens: list[int], abstained: list[bool]) -> list[tuple[str, bool]]:
    """Return the text of `tokens` in pieces, and whether one of the tokens of a piece is abstained from."""
    pieces, doubtful = [], False
    for token, unsure in zip(tokens, abstained, strict=True):
        text, doubtful = decoder.push(token), doubtful or unsure
        if text:
            pieces.append((text, doubtful))
            doubtful = False
    rest = decoder.flush()
    return [*pieces, (rest, doubtful)] if rest else pieces


def promise_of(model: Network, risk: Any, options: GenerationOptions) -> Promise:
    """Return the promise that the model's checkpoint holds for `risk`.

    Raises:
        InputError: none was calibrated for this risk, or `options` ask for another computation than it was calibrated
            with; or the model has no uncertainty head.
    """
    share = checked_risk(risk, "abstain_at")
    head = model.idea("uncertainty")
    if head is None:
        raise InputError(
            f"abstain_at={risk}: this model has no uncertainty head to abstain by; use one whose config has "
            "uncertainty=True"
        )
    other = {
        "think": options.think,
        "max_cost": options.max_cost,
        "depth": None if options.depth == 1 else options.depth,
    }
    if named := [f"{name}={value}" for name, value in other.items() if value is not None]:
        raise InputError(
            f"abstain_at={risk} with {named[0]}: it was calibrated at full depth with the model's own rounds of "
            "thinking; leave depth, max_cost and think out"
        )
    found = next((each for each in head.promises if each.risk == share), None)
    if found is None:
        known = ", ".join(f"{each.risk:g}" for each in sorted(head.promises, key=lambda each: each.risk)) or "none"
        raise InputError(
            f"abstain_at={risk} was not calibrated for this model (risks that were: {known}): run python -m lepton "
            f"calibrate --checkpoint FILE --risk {share:g}, then load that file"
        )
    return found


def largest_kept(model: Network, promise: Promise) -> float:
    """Return the largest uncertainty that is kept, in 0..1; below all of them if everything is abstained from.

    Raises:
        InputError: the line of the uncertainty falls, so its chances are in no order that was calibrated.
    """
    if promise.threshold is None:
        return -math.inf
    head = model.idea("uncertainty")
    if head.calibration[0] <= 0:
        raise InputError(
            "the model's uncertainty falls where its head is less sure, so nothing can be abstained from: fit it again "
            "with python -m lepton calibrate"
        )
    # As the head computes it, so that equal logits give equal chances.
    dtype = torch.promote_types(model.dtype, torch.float32)
    return float(head.chance(torch.tensor(promise.threshold, dtype=dtype, device=head.calibration.device)))
