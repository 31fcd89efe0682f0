"""Checks of numbers and tensors: what passes comes back as plain numbers, anything else is one line."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from lepton.errors import InputError
from lepton.model.checks import check_device, check_range, integers, real, whole

CPU = torch.device("cpu")


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


def test_a_value_out_of_range_is_named():
    values = torch.tensor([1, 4, 2])
    check_range(values, 1, 4, "id")
    with pytest.raises(InputError, match=r"^id 4: must lie in 1\.\.3"):
        check_range(values, 1, 3, "id")
    with pytest.raises(InputError, match=r"^id 1: must lie in 2\.\.3"):
        check_range(values, 2, 3, "id")


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.uint32, torch.int64])
def test_integers_of_any_width_become_int64(dtype):
    found = integers(torch.tensor([1, 2], dtype=dtype), (2,), CPU, "lengths", "a length for each row")
    assert found.dtype == torch.int64
    assert found.tolist() == [1, 2]


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (torch.tensor([1]), r"torch\.int64 \[1\]"),
        (torch.tensor([1.0, 2.0]), r"torch\.float32 \[2\]"),
        (torch.tensor([True, False]), r"torch\.bool \[2\]"),
        ([1, 2], "list"),
        (None, "NoneType"),
    ],
)
def test_what_holds_no_integers_of_this_shape_is_named(value, kind):
    with pytest.raises(InputError, match=rf"lengths must hold a length, as a tensor of integers \[2\], not {kind}"):
        integers(value, (2,), CPU, "lengths", "a length")


def test_another_device_is_named():
    check_device(torch.zeros(1), CPU, "tokens")
    with pytest.raises(InputError, match=r"tokens: on meta, the model is on cpu; give tokens\.to\('cpu'\)"):
        check_device(torch.zeros(1, device="meta"), CPU, "tokens")
