"""An answer: text without the stop text, held back while it may be one, and the tokens that belong to it."""

import pytest

from lepton.engine.options import GenerationOptions
from lepton.engine.sequence import Sequence
from lepton.serve.answer import Answer
from tests.serve.small import output_of, small_tokenizer

TOKENIZER = small_tokenizer()


def answer(*stops):
    sequence = Sequence([1], GenerationOptions(), stops=[[TOKENIZER.eos_id]], stream=(1, 2))
    return Answer(sequence, TOKENIZER, stops)


def ids_of(text):
    """An id for each byte."""
    table = {TOKENIZER.bytes_of(i): i for i in range(TOKENIZER.size)}
    return [table[bytes([byte])] for byte in text.encode()]


def given(text, *stops, reason="length"):
    """The pieces that a text gives, a byte at a time."""
    found, ids = answer(*stops), ids_of(text)
    pieces = []
    for i, token in enumerate(ids):
        pieces.append(found.take(output_of(found.sequence, [token], reason if i == len(ids) - 1 else None)))
        if found.ended_by is not None:
            break
    return found, pieces


def test_a_text_comes_as_it_is_made():
    found, pieces = given("a Käse!")
    assert [piece.text for piece in pieces] == ["a", " ", "K", "", "ä", "s", "e", "!"]
    assert [piece.ended_by for piece in pieces] == [*[None] * 7, "length"]
    assert found.taken == 8
    offsets = [token.offset for piece in pieces for token in piece.tokens]
    assert offsets == [0, 1, 2, 3, 3, 4, 5, 6]


def test_a_torn_character_at_the_end_becomes_a_question_mark():
    ids = ids_of("ä")[:1]
    found = answer()
    assert found.take(output_of(found.sequence, ids, "length")).text == "\ufffd"


@pytest.mark.parametrize(
    ("text", "stops", "expected", "ended_by"),
    [
        ("one. two. three", ["two"], "one. ", "stop"),
        ("one. two. three", ["three", "two"], "one. ", "stop"),
        ("one. two. three", ["twx", "two. thrx"], "one. two. three", "length"),
        ("aaab", ["aab"], "a", "stop"),
        ("aaab", ["aaaa", "aab"], "a", "stop"),
        ("abc", ["abcd", "bc"], "a", "stop"),
        ("x", ["x"], "", "stop"),
        ("end\n", ["\n\n"], "end\n", "length"),
        ("Käse", ["ä"], "K", "stop"),
    ],
)
def test_it_ends_before_the_first_stop_text(text, stops, expected, ended_by):
    found, pieces = given(text, *stops)
    assert "".join(piece.text for piece in pieces) == expected
    assert (found.ended_by, pieces[-1].ended_by) == (ended_by, ended_by)
    assert [piece.ended_by for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert len([token for piece in pieces for token in piece.tokens]) == len(expected.encode())
    # However the tokens are spread over cycles, the text is the same.
    whole = answer(*stops)
    assert whole.take(output_of(whole.sequence, ids_of(text), "length")).text == expected


def test_what_may_be_a_stop_text_is_held_back():
    _, pieces = given("a STOx", "STOP")
    assert [piece.text for piece in pieces] == ["a", " ", "", "", "", "STOx"]
    assert [len(piece.tokens) for piece in pieces] == [1, 1, 0, 0, 0, 4]


def test_a_token_that_holds_the_beginning_of_a_stop_text_is_given_out():
    token = next(i for i in range(TOKENIZER.size) if len(TOKENIZER.bytes_of(i).decode("utf-8", "replace")) >= 3)
    text = TOKENIZER.bytes_of(token).decode()
    found = answer(text[1:])
    piece = found.take(output_of(found.sequence, [token]))
    assert (piece.text, [each.id for each in piece.tokens], piece.ended_by) == (text[0], [token], "stop")


def test_the_end_of_the_document_has_no_text():
    found = answer()
    piece = found.take(output_of(found.sequence, [*ids_of("x"), TOKENIZER.eos_id], "end_of_document"))
    assert (piece.text, len(piece.tokens), piece.ended_by, found.taken) == ("x", 2, "end_of_document", 2)
