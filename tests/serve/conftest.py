"""Servers that tests share. Where the extra `serve` is missing, what needs one is skipped."""

import pytest

from lepton.serve.limits import Limits
from tests.serve.small import small_model, small_tokenizer


@pytest.fixture(scope="session")
def model():
    return small_model()


@pytest.fixture(scope="session")
def tokenizer():
    return small_tokenizer()


@pytest.fixture(scope="module")
def server(model, tokenizer):
    from tests.serve.http import Running

    limits = Limits(max_body=20_000, max_prompt=200, max_tokens=300, max_choices=6, max_request=900, max_think=4)
    with Running(model, tokenizer, limits=limits, places=4) as running:
        yield running
