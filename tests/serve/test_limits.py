"""Limits, and the form of a refusal."""

import dataclasses

import pytest

from lepton.errors import InputError
from lepton.serve.limits import Limits, Refusal


@pytest.mark.parametrize("name", [field.name for field in dataclasses.fields(Limits)])
def test_a_limit_is_a_whole_number(name):
    assert getattr(Limits(**{name: 1}), name) == 1
    for value in (-1, 1.5, "1", None, True):
        with pytest.raises(InputError, match=f"{name}="):
            Limits(**{name: value})
    if name == "max_think":
        assert Limits(max_think=0).max_think == 0
    else:
        with pytest.raises(InputError, match=name):
            Limits(**{name: 0})


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (404, "invalid_request_error"),
        (429, "rate_limit_error"),
        (500, "server_error"),
        (503, "server_error"),
    ],
)
def test_a_refusal_has_openais_form(status, kind):
    refusal = Refusal("no", param="n", code="c", status=status)
    assert refusal.to_dict() == {"error": {"message": "no", "type": kind, "param": "n", "code": "c"}}
