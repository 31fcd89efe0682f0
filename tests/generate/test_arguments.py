"""What callers pass: prompts of every form, options, and what cannot be used."""

import numpy as np
import pytest
import torch

from lepton.errors import InputError
from tests.generate.models import BATCH, PROMPT, lively
from tests.generate.test_generation import embedded_shapes
from tests.laws.lab import VOCAB

GREEDY = {"temperature": 0}


@pytest.fixture(scope="module")
def model():
    return lively("complete")


@pytest.mark.parametrize(
    "form",
    [
        list,
        tuple,
        torch.tensor,
        np.array,
        lambda p: torch.tensor([p]),
        lambda p: torch.tensor(p, dtype=torch.int32),
        lambda p: torch.tensor(p, dtype=torch.uint16),
        lambda p: np.array([p], dtype=np.uint16),
        lambda p: [torch.tensor(token) for token in p],
        lambda p: [np.int64(token) for token in p],
    ],
)
def test_one_prompt_in_every_form_gives_a_flat_list(model, form):
    result = model.generate(form(PROMPT), 5, seed=1)
    assert result == model.generate(PROMPT, 5, seed=1)
    assert type(result) is list
    assert all(type(token) is int for token in result)
    assert result[: len(PROMPT)] == PROMPT


def test_several_prompts_give_a_list_of_lists(model):
    both = model.generate(torch.tensor([PROMPT, PROMPT]), 4, temperature=0)
    assert both == model.generate([PROMPT, PROMPT], 4, temperature=0)
    assert both == [model.generate(PROMPT, 4, temperature=0)] * 2
    assert model.generate([PROMPT], 4, temperature=0) == both[:1]


@pytest.mark.parametrize("row", [torch.tensor, np.array, tuple, lambda p: torch.tensor(p, dtype=torch.uint8)])
def test_a_list_of_rows_is_several_prompts_whatever_the_rows_are(model, row):
    """A list of tensors of one token each was one prompt."""
    for rows in ([[5], [9]], BATCH, [[5]]):
        assert model.generate([row(prompt) for prompt in rows], 3, **GREEDY) == model.generate(rows, 3, **GREEDY)


@pytest.mark.parametrize(
    ("prompt", "named"),
    [
        ([], "the prompt is empty"),
        (torch.tensor([], dtype=torch.long), "the prompt is empty"),
        ([[1, 2], []], "prompt 1 is empty"),
        ([1, VOCAB, 2], f"id {VOCAB}: the vocabulary has ids 0 to {VOCAB - 1}"),
        ([[1], [2, -1]], "prompt 1 holds id -1"),
        (torch.tensor([1.0, 2.0]), "1.0, which is not an integer"),
        ([1, 2.5], "2.5, which is not an integer"),
        ([1, "a"], "'a', which is not an integer"),
        ([1, [2, 3]], "mixes ids and lists"),
        ([[1, [2]], [3]], "not an integer"),
        (torch.zeros(1, 2, 3, dtype=torch.long), r"shape \(1, 2, 3\)"),
        (torch.tensor(3), r"shape \(\)"),
        ("hello", "encode it with the tokenizer"),
        (None, "NoneType"),
        (7, "int"),
        (b"hello", "encode it with the tokenizer"),
        ({1: 2}, "dict"),
        ([True, False], "True, which is not an integer"),
        (torch.tensor([True]), "True, which is not an integer"),
        ([1, None], "None, which is not an integer"),
        ([torch.tensor([1]), 2], "mixes ids and lists"),
        ([torch.tensor([[1]])], r"shape \(1, 1\)"),
        ([torch.tensor([1.5])], "1.5, which is not an integer"),
        (torch.zeros(0, 3, dtype=torch.long), "the prompt is empty"),
        (torch.zeros(2, 3, device="meta", dtype=torch.long), "holds no ids"),
        (range(1 << 40), "at most 16,777,216"),
        ([10**5000], "a number of 16,610 bits"),
        ([[1]] * 70_000, "at most 65,536"),
    ],
)
def test_prompts_that_are_none(model, prompt, named):
    for entry in (model.generate, model.generate_stream, model.generate_with_uncertainty):
        with pytest.raises(InputError, match=named):
            entry(prompt)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"temperature": -1}, "temperature=-1"),
        ({"top_p": 0}, "top_p=0"),
        ({"top_p": 1.01}, "top_p=1.01"),
        ({"top_k": 0}, "top_k=0"),
        ({"top_k": 2.5}, "top_k=2.5"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"max_new_tokens": 5.5}, "max_new_tokens=5.5"),
        ({"stop": VOCAB}, f"id {VOCAB}"),
        ({"stop": [[]]}, "stop sequence is empty"),
        ({"stop": "end"}, "'end', which is not an integer"),
        ({"stop": 1.0}, "1.0, which is not an integer"),
        ({"stop": True}, "True, which is not an integer"),
        ({"stop": [[1, [2]]]}, "not an integer"),
        ({"stop": [[None]]}, "not an integer"),
        ({"stop": {"a": 1}}, "not an integer"),
        ({"stop": np.zeros((1, 1, 1), dtype=int)}, "shape"),
        ({"stop": [[1] * 2000]}, "of 2,000 tokens: at most 1,024"),
        ({"stop": [1, -3]}, "id -3"),
        ({"depth": 1.5}, "depth=1.5"),
        ({"depth": float("nan")}, "depth=nan"),
        ({"depth": "half"}, "depth='half'"),
        ({"depth": True}, "depth=True"),
        ({"depth": torch.tensor(0.5)}, "depth=tensor"),
        ({"think": -1}, "think=-1"),
        ({"think": True}, "think=True"),
        ({"think": 10**6}, "think=1000000: must be a whole number, in 0..256 rounds"),
        ({"think": 2.0}, "think=2.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": None}, "temperature=None"),
        ({"temperature": "hot"}, "temperature='hot'"),
        ({"temperature": True}, "temperature=True"),
        ({"temperature": 10**400}, "temperature="),
        ({"top_p": None}, "top_p=None"),
        ({"top_p": float("nan")}, "top_p=nan"),
        ({"top_k": True}, "top_k=True"),
        ({"max_new_tokens": True}, "max_new_tokens=True"),
        ({"max_new_tokens": "5"}, "max_new_tokens='5'"),
        ({"use_speculative": "no"}, "use_speculative='no'"),
        ({"seed": 1 << 64}, "seed=18446744073709551616: must be a whole number"),
        ({"seed": -(1 << 63) - 1}, "seed=-9223372036854775809"),
        ({"seed": 1.0}, "seed=1.0"),
        ({"seed": True}, "seed=True"),
        ({"seed": "1"}, "seed='1'"),
        ({"seed": torch.tensor(1)}, "seed=tensor"),
    ],
)
def test_options_that_cannot_be_used(model, options, named):
    """Each is said at the call, in one line, before anything is computed."""
    for entry in (model.generate, model.generate_stream):
        with embedded_shapes(model) as shapes, pytest.raises(InputError, match=named) as found:
            entry(PROMPT, **options)
        assert "\n" not in str(found.value)
        assert shapes == []


@pytest.mark.parametrize(
    "options",
    [
        {"top_k": 10**30},
        {"top_k": np.int64(3)},
        {"temperature": np.float32(0.5)},
        {"temperature": 1e-320},
        {"think": np.int64(1)},
    ],
)
def test_unusual_numbers_that_can_be_used(model, options):
    assert len(model.generate(PROMPT, 3, seed=0, **options)) == len(PROMPT) + 3


def test_asking_for_a_great_many_tokens_takes_no_memory_in_advance(model):
    stream = model.generate_stream(PROMPT, 10**12, seed=1)
    assert [next(stream) for _ in range(5)] == model.generate(PROMPT, 5, seed=1)[-5:]
