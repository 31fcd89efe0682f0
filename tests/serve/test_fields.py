"""Fields of a request: checked, named where wrong, and never accepted unread."""

import pytest

from lepton.serve.fields import FINITE, Fields, clean, parse_body
from lepton.serve.limits import Refusal


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[1]",
        b'"text"',
        b"null",
        b"1",
        b'{"a": NaN}',
        b'{"a": -Infinity}',
        b'{"a": \xff}',
        b"[" * 100_000,
        b'{"a": ' * 100_000,
        b'{"a": ' + b"9" * 5000 + b"}",
    ],
)
def test_what_is_no_object_of_json_is_refused(body):
    with pytest.raises(Refusal, match="body") as refused:
        parse_body(body)
    assert refused.value.status == 400
    assert len(str(refused.value)) < 300


def test_a_body_is_read():
    assert parse_body('{"a": [1, 2.5, "ä", null]}'.encode()) == {"a": [1, 2.5, "ä", None]}


def test_null_is_as_good_as_nothing():
    fields = Fields({"a": None, "b": None, "c": None, "d": None})
    assert (fields.whole("a", 3, 0, 9), fields.real("b", None, 0, 1), fields.flag("c", True)) == (3, None, True)
    fields.finish()


def test_values_are_read():
    fields = Fields({"a": 3, "b": 4.0, "c": 1, "d": True, "e": "x\ud800"})
    assert (fields.whole("a", None, 0, 3), fields.whole("b", None, 4, 4)) == (3, 4)
    assert (fields.real("c", None, 0, FINITE), fields.flag("d"), fields.text("e")) == (1.0, True, "x?")
    fields.finish()


@pytest.mark.parametrize("value", [-1, 10, 1.5, "1", True, [], {}, 10**400, float(10**300)])
def test_no_whole_number_in_the_range(value):
    with pytest.raises(Refusal, match=r"^in\.a=.*must be a whole number in 0\.\.9") as refused:
        Fields({"a": value}, "in.").whole("a", 1, 0, 9)
    assert refused.value.param == "in.a"


@pytest.mark.parametrize("value", [-0.1, 1.1, "1", True, [], 10**400])
def test_no_number_in_the_range(value):
    with pytest.raises(Refusal, match=r"must be a number in 0\.\.1"):
        Fields({"a": value}).real("a", 1.0, 0, 1)


@pytest.mark.parametrize("value", [0, 1, "true", []])
def test_no_flag(value):
    with pytest.raises(Refusal, match="must be true or false"):
        Fields({"a": value}).flag("a")


@pytest.mark.parametrize("value", [0, ["x"], {}])
def test_no_text(value):
    with pytest.raises(Refusal, match="must be a string"):
        Fields({"a": value}).text("a")
    with pytest.raises(Refusal, match="a=missing"):
        Fields({}).text("a")


def test_what_nobody_has_read_is_refused_with_the_nearest_name():
    fields = Fields({"temprature": 1})
    fields.take("temperature")
    with pytest.raises(Refusal, match="unknown field 'temprature'; did you mean 'temperature'") as refused:
        fields.finish()
    assert (refused.value.code, refused.value.param) == ("unknown_parameter", "temprature")


def test_what_cannot_be_honoured_may_only_ask_for_nothing():
    neutral = {"penalty": (0, 0.0), "store": (False,)}
    for body in ({"penalty": 0}, {"penalty": 0.0}, {"store": False}, {"penalty": None}, {}):
        fields = Fields(body)
        fields.allow(neutral)
        fields.finish()
    for body in ({"penalty": 0.5}, {"penalty": False}, {"store": 0}, {"store": True}, {"penalty": [0]}):
        with pytest.raises(Refusal, match="does not support it"):
            Fields(body).allow(neutral)


def test_lone_surrogates_become_question_marks():
    assert clean("a\udc80b") == "a?b"
    assert clean("ä東\U0001f600") == "ä東\U0001f600"
