import contextlib

import pytest

from lepton.train import phases as module
from lepton.train.phases import Phases


@pytest.fixture
def clock(monkeypatch):
    """A list whose only number is the present time."""
    now = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: now[0])
    return now


def test_each_second_belongs_to_one_phase(clock):
    phases = Phases(since=98.0)
    clock[0] += 1
    with phases("steps"):
        clock[0] += 10
        with phases("compile"):
            clock[0] += 5
        clock[0] += 20
    clock[0] += 0.25
    assert phases.in_words() == "38 s: steps 30, compile 5, start 3"
    assert phases.seconds == {"start": 3.25, "steps": 30, "compile": 5}


def test_a_phase_that_fails_has_ended(clock):
    phases = Phases()
    with contextlib.suppress(ValueError), phases("data"):
        clock[0] += 2
        raise ValueError
    clock[0] += 1
    assert phases.in_words() == "3 s: data 2, start 1"


def test_what_was_before_becomes_one_phase(clock):
    phases = Phases()
    with phases("data"):
        clock[0] += 2000
    clock[0] += 0.4
    assert phases.fold("preparation", "training") == "2,000 s: data 2,000"
    clock[0] += 3
    assert phases.in_words() == "2,003 s: preparation 2,000, training 3"
    assert sum(phases.seconds.values()) == pytest.approx(2003.4)


def test_short_phases_are_not_listed(clock):
    phases = Phases()
    clock[0] += 0.4
    assert phases.in_words() == "0 s"
