"""Checks of tensors of integers: what passes comes back as int64, anything else is one line."""

import pytest
import torch

from lepton.errors import InputError
from lepton.model.checks import check_device, check_range, integers

CPU = torch.device("cpu")


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
