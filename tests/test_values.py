"""Numbers from callers."""

import math

import numpy as np
import pytest

from lepton.errors import InputError
from lepton.values import SEEDS, real, whole


def test_whole_numbers_of_any_kind_become_ints():
    assert [whole("n", value, 0, 9) for value in (0, 9, np.int64(3))] == [0, 9, 3]
    assert type(whole("n", np.uint8(3), 0)) is int
    assert whole("seed", -(1 << 63), *SEEDS) == -(1 << 63)


@pytest.mark.parametrize("value", [-1, 10, 3.0, True, None, "3", math.nan])
def test_what_is_no_whole_number_in_the_range_is_named(value):
    with pytest.raises(InputError, match=r"^n=.*: must be a whole number, in 0\.\.9 rows; fix it$"):
        whole("n", value, 0, 9, " rows; fix it")


def test_real_numbers_and_what_lies_in_no_range():
    assert [real(value) for value in (1, 0.5, np.float32(2))] == [1.0, 0.5, 2.0]
    assert all(math.isnan(real(value)) for value in (True, None, "1", 10**400, math.nan))
