"""Numbers from callers: what passes comes back as a plain number, anything else is one line."""

import math
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
import pytest
import torch

from lepton.errors import InputError
from lepton.values import SEEDS, from_record, real, whole


@pytest.mark.parametrize("value", [3, np.int64(3), np.uint8(3)])
def test_whole_numbers_pass(value):
    found = whole("n", value, 3, 5)
    assert (found, type(found)) == (3, int)
    assert whole("n", 10**30, 0) == 10**30


@pytest.mark.parametrize("value", [2, 6, 3.0, True, None, "3", math.nan, torch.tensor(3)])
def test_others_do_not(value):
    with pytest.raises(InputError, match=r"n=.*: must be a whole number, in 3\.\.5 rounds") as caught:
        whole("n", value, 3, 5, " rounds")
    assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match=r"at least 7$"):
        whole("n", value, 7)


def test_real_numbers_are_floats_and_anything_else_lies_in_no_range():
    for value in (1, 1.0, np.float32(1), Fraction(1)):
        assert real(value) == 1.0
        assert type(real(value)) is float
    for value in (True, None, "1", 10**400, torch.tensor(1.0), 1j):
        assert math.isnan(real(value))


def test_seeds_are_any_of_64_bits():
    assert [whole("seed", value, *SEEDS) for value in SEEDS] == [-(1 << 63), (1 << 64) - 1]
    for value in (SEEDS[0] - 1, SEEDS[1] + 1):
        with pytest.raises(InputError, match="seed="):
            whole("seed", value, *SEEDS)


@dataclass(frozen=True)
class Found:
    risk: float
    most: float | None
    tokens: int


def test_a_record_is_the_dataclass_that_it_was():
    values = {"risk": 0.5, "most": None, "tokens": 3}
    assert from_record(Found, values, "records", "record") == Found(0.5, None, 3)
    assert from_record(Found, {**values, "most": 1.5}, "records", "record").most == 1.5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": 1}, r"'records' holds .*: must have the fields most, risk, tokens"),
        ({"tokens": 3.0}, r"'records' has tokens=3\.0, which no record has"),
        ({"tokens": True}, "'records' has tokens=True"),
        ({"risk": None}, "'records' has risk=None"),
        ({"most": float("nan")}, "'records' has most=nan"),
        ({"risk": float("inf")}, "'records' has risk=inf"),
    ],
)
def test_what_is_no_record_is_named(change, message):
    with pytest.raises(InputError, match=message):
        from_record(Found, {"risk": 0.5, "most": None, "tokens": 3, **change}, "records", "record")
