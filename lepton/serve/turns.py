"""Turns of conversations: when an answer has ended, the model reads it, and the next turn goes on from there."""

from collections.abc import Iterable

import torch

from lepton.engine.prefill import read_on
from lepton.model import Network, State
from lepton.serve.answer import Answer, Piece
from lepton.values import Least


def placed(answer: Answer, device: torch.device) -> None:
    """Bring what an answer continues from to the model's device."""
    if answer.sequence.past is not None:
        state, row = answer.sequence.past
        answer.sequence.past = state.to(device), row


def ending(pieces: Iterable[tuple[Answer, Piece]]) -> list[Answer]:
    """Return the answers whose states are kept, and which end with one of these pieces."""
    return [answer for answer, piece in pieces if answer.closing is not None and piece.ended_by is not None]


def read_answers(model: Network, answers: Iterable[Answer]) -> None:
    """Set the states of answers that have ended, those of one depth and number of rounds in one pass.

    They are read as texts, as they come back in a request with the whole conversation: the tokens that were drawn may
    be others of the same text, and what follows a stop text was not said.
    """

    alike: dict[tuple[float | Least, int | None], list[Answer]] = {}
    for answer in answers:
        alike.setdefault((answer.sequence.depth, answer.sequence.options.think), []).append(answer)
    for (depth, think), own in alike.items():
        texts, states = [], []
        for answer in own:
            assert answer.closing is not None
            assert answer.sequence.read is not None, "its prompt has not been read"
            texts.append(answer.closing(answer.text))
            states.append(answer.sequence.read)
        read = read_on(model, texts, State.join(states), depth=depth, think=think)
        for row, answer in enumerate(own):
            answer.state = read.rows(torch.tensor([row], device=model.device)).to("cpu")
