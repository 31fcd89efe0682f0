"""How long waiting threads spin; `test_train.py` and `test_eval.py` have the commands that ask for it."""

import os

import pytest

from lepton.cli.threads import SPINS, share_the_cores


@pytest.mark.parametrize(
    ("own", "then"),
    [({}, SPINS), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, None)],
)
def test_what_the_user_has_set_stays(monkeypatch, own, then):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("os.environ", {**os.environ, **own})
    share_the_cores()
    assert os.environ.get("GOMP_SPINCOUNT") == then
