"""Prompts and stop sequences in every form become lists of ids; `test_arguments.py` has those that are refused."""

import numpy as np
import pytest
import torch

from lepton.errors import InputError
from lepton.generate.prompts import MAX_STOP, read_prompts, read_stops

ONE = [
    [3, 4],
    (3, 4),
    torch.tensor([3, 4]),
    torch.tensor([[3, 4]]),
    np.array([3, 4], dtype=np.uint16),
    [torch.tensor(3), np.int64(4)],
]
SEVERAL = [
    [[3, 4], [5]],
    ([3, 4], (5,)),
    [torch.tensor([3, 4]), torch.tensor([5])],
    [np.array([3, 4]), [5]],
]


@pytest.mark.parametrize("prompt", ONE)
def test_one_prompt(prompt):
    found, single = read_prompts(prompt, 10)
    assert (found, single) == ([[3, 4]], True)
    assert {type(token) for token in found[0]} == {int}


@pytest.mark.parametrize("prompts", SEVERAL)
def test_several_prompts(prompts):
    assert read_prompts(prompts, 10) == ([[3, 4], [5]], False)


def test_a_list_of_one_list_is_several_prompts():
    assert read_prompts([[3, 4]], 10) == ([[3, 4]], False)


def test_the_callers_lists_are_not_kept():
    prompt = [3, 4]
    read_prompts(prompt, 10)[0][0].append(5)
    assert prompt == [3, 4]


@pytest.mark.parametrize(
    ("stop", "sequences"),
    [
        (None, []),
        (3, [[3]]),
        (np.int64(3), [[3]]),
        ([3, 4], [[3], [4]]),
        ([[3, 4], [5]], [[3, 4], [5]]),
        ([3, [4, 5]], [[3], [4, 5]]),
        (torch.tensor([3, 4]), [[3], [4]]),
        ([torch.tensor([3, 4])], [[3, 4]]),
        ([], []),
    ],
)
def test_stops(stop, sequences):
    assert read_stops(stop, 10) == sequences


@pytest.mark.parametrize("stop", [[[]], 10, [-1], "x", [[1] * (MAX_STOP + 1)]])
def test_stops_that_are_none(stop):
    with pytest.raises(InputError) as caught:
        read_stops(stop, 10)
    assert "\n" not in str(caught.value)
