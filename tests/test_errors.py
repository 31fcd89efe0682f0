import pytest

from lepton.errors import LONGEST, InputError, naming, nearest, reason, shown


def test_a_message_is_one_line_whatever_it_quotes():
    deep = []
    for _ in range(10**5):
        deep = [deep]
    assert str(InputError("a\nb\r\nc")) == "a b c"
    for value in (deep, 10**5000, "x\ny" * 1000, [1] * 1000, object()):
        assert "\n" not in shown(value)
        assert len(shown(value)) <= 60
    assert shown(3.5) == "3.5"
    assert reason(IndexError()) == "IndexError"
    assert reason(OSError("one\ntwo")) == "one"


def test_a_long_message_keeps_its_beginning_and_its_end():
    message = str(InputError("no such file: " + "x" * 5000 + "; give another --out"))
    assert len(message) <= LONGEST
    assert message.startswith("no such file: xxx")
    assert message.endswith("xxx; give another --out")
    assert str(InputError("y" * LONGEST)) == "y" * LONGEST


def test_names_that_are_no_text_have_no_nearest_one():
    assert nearest(5, ["a", "b"]) == "; choose from a, b"


def test_a_message_begins_with_its_place():
    with pytest.raises(InputError, match=r"^x\.pt: torn$"), naming("x.pt"):
        raise InputError("torn")
