"""A sequence: which new tokens count, and why it ended."""

import random
import subprocess
import sys
from pathlib import Path

import pytest

from lepton.engine.options import GenerationOptions
from lepton.engine.sequence import Sequence

EOS = 0
ROOT = Path(__file__).parents[2]


def sequence_of(most, stops=(), **fields):
    options = GenerationOptions(max_new_tokens=most, **fields)
    return Sequence([5], options, stops=[[EOS], *stops], stream=(1, 2))


def expected(ids, most, stops):
    """The definition: look at the whole text after each token."""
    new = []
    for token in ids if most else []:
        new.append(token)
        if token == EOS:
            return new, "end_of_document"
        if any(new[-len(stop) :] == list(stop) for stop in stops):
            return new, "stop"
        if len(new) == most:
            return new, "length"
    return new, None if most else "length"


def test_any_cut_into_passes_takes_what_the_definition_takes():
    stream, reasons = random.Random(0), set()
    for _ in range(3000):
        low = stream.choice((0, 1))
        stops = [[stream.randint(low, 3) for _ in range(stream.randint(1, 4))] for _ in range(stream.randint(0, 3))]
        most, left = stream.randint(0, 20), [stream.randint(low, 4) for _ in range(16)]
        new, reason = expected(left, most, stops)
        sequence, counted = sequence_of(most, stops), []
        while left:
            count = stream.randint(0, 5)
            counted += sequence.take(left[:count])
            left = left[count:]
        assert (counted, sequence.new, sequence.reason) == (new, new, reason)
        assert sequence.ended == (reason is not None)
        assert sequence.status == ("done" if reason else "waiting")
        reasons.add(reason)
    assert reasons == {"end_of_document", "stop", "length", None}


@pytest.mark.parametrize(
    ("ids", "reason"),
    [([3, EOS], "end_of_document"), ([3, 4], "stop"), ([3, 5], "length")],
)
def test_the_last_token_allowed_may_end_the_text_by_itself(ids, reason):
    sequence = sequence_of(2, [[3, 4], [7, EOS]])
    assert sequence.take(ids) == ids
    assert sequence.reason == reason


def test_a_stop_sequence_does_not_reach_into_the_prompt():
    sequence = sequence_of(9, [[5, 6]])
    assert sequence.take([6, 5, 6, 7]) == [6, 5, 6]


def test_no_token_is_wanted():
    sequence = sequence_of(0)
    assert not sequence.ended, "its prompt is still to be read"
    assert sequence.exhausted
    assert sequence.take([3]) == []
    assert (sequence.new, sequence.reason) == ([], "length")


def test_what_was_cancelled_takes_no_more():
    sequence = sequence_of(9)
    sequence.take([3])
    sequence.cancel()
    assert sequence.take([4, 5]) == []
    assert (sequence.new, sequence.status, sequence.reason) == ([3], "cancelled", "cancelled")


def test_what_has_ended_cannot_be_cancelled():
    sequence = sequence_of(1)
    sequence.take([3])
    sequence.cancel()
    assert (sequence.status, sequence.reason) == ("done", "length")


def test_passes_that_are_not_read_give_a_token_each():
    sequence = sequence_of(3)
    sequence.take([8])
    assert not sequence.exhausted
    sequence.unread.append(5)
    assert not sequence.exhausted
    sequence.unread.append(1)
    assert sequence.exhausted


@pytest.mark.parametrize(("depth", "share"), [(None, 1.0), (1, 1.0), (0.25, 0.25)])
def test_no_depth_is_all_of_it(depth, share):
    assert sequence_of(1, depth=depth).depth == share


@pytest.mark.parametrize("name", ["options", "sequence", "scheduler", "speculation"])
def test_it_does_without_pytorch(name):
    code = f"import sys, lepton.engine.{name}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
