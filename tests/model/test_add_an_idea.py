"""The idea that docs/add_an_idea.md shows is built, runs and learns as written there."""

import re
from pathlib import Path

import torch

from lepton import Lepton
from lepton import config as configuration
from lepton.model.size_config import size_config
from tests.laws import lab
from tests.laws.lab import build, text


def test_the_idea_of_the_guide_works(monkeypatch):
    guide = (Path(__file__).parents[2] / "docs" / "add_an_idea.md").read_text(encoding="utf-8")
    names: dict = {"__name__": __name__}
    exec(re.search(r"```python\n(.*?)```", guide, re.DOTALL)[1], names)
    monkeypatch.setitem(configuration.IDEAS, "sketch", names["SketchConfig"])
    monkeypatch.setitem(lab.IDEAS, "sketch", True)
    model = build("complete")
    model.loss(text(0)).loss.backward()
    assert model.sketch.up.weight.grad.any()
    with torch.no_grad():
        logits = model(text(0)).logits
        with model.without("sketch"):
            assert not torch.equal(model(text(0)).logits, logits)
    with torch.device("meta"):
        assert Lepton(size_config("nano", **{"sketch.width": 32})).sketch.up.out_features == 32
        assert Lepton(size_config("nano", sketch=None)).sketch is None


def test_every_idea_is_in_the_complete_model_of_the_laws():
    """Otherwise they would pass without it: add a line to `IDEAS` in tests/laws/lab.py."""
    assert {*build("complete").ideas} == {*configuration.IDEAS}
