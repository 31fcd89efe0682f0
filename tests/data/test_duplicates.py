"""Equal documents are left out, however they are cut into pieces, and no others."""

import random

import pytest

from lepton.data import duplicates
from lepton.data.duplicates import Distinct
from lepton.data.sources import Piece


def cut(text: str, seed: int) -> list[Piece]:
    chance = random.Random(seed)
    parts, rest = [], text
    while len(rest) > 1 and chance.random() < 0.7:
        end = chance.randrange(1, len(rest))
        parts.append(Piece(rest[:end], last=False))
        rest = rest[end:]
    return [*parts, Piece(rest, last=True)]


def joined(pieces: list[Piece]) -> list[str]:
    texts, begun = [], ""
    for piece in pieces:
        begun += piece.text
        if piece.last:
            texts.append(begun)
            begun = ""
    assert not begun
    return texts


def test_the_first_of_equal_documents_is_kept() -> None:
    texts = ["one", "two", "one", "onetwo", "two ", "two", "", "", "\ud800", "\ud801"]
    distinct = Distinct()
    pieces = [piece for i, text in enumerate(texts) for piece in cut(text, i)]
    assert joined(list(distinct.pieces(pieces))) == ["one", "two", "onetwo", "two ", "", "\ud800", "\ud801"]
    assert distinct.dropped == 3


def test_what_is_too_long_to_wait_is_kept_and_what_follows_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(duplicates, "HELD", 50)
    texts = ["a" * 60, "a" * 60, "b" * 50, "b" * 50, "c"]
    distinct = Distinct()
    pieces = [piece for i, text in enumerate(texts) for piece in cut(text, i)]
    assert joined(list(distinct.pieces(pieces))) == ["a" * 60, "a" * 60, "b" * 50, "c"]
    assert distinct.dropped == 1
