"""Abstention: which tokens are marked, that nothing else changes, and what cannot be promised."""

import math

import pytest
import torch

from lepton import checkpoint
from lepton.api import Lepton
from lepton.errors import InputError
from lepton.generate.abstention import TextAndAbstentions, TokensAndAbstentions, pieces_of
from lepton.model.promise import Promise
from tests.cli.tiny import save_tiny
from tests.generate.models import BATCH, PROMPT, lively
from tests.laws.lab import build

OPTIONS = {"temperature": 1.5, "seed": 2}
LINE = (6.0, -19.0)
"""Calibrated so that the chances, all near 1 in a model that has learned nothing, spread over 0..1."""


def promised(threshold, risk=0.1, model=None):
    model = model or lively("complete")
    made = Promise(risk=risk, confidence=0.99, threshold=threshold, windows=1000, tokens=64000, data="some text")
    model.uncertainty.promises = (*model.uncertainty.promises, made)
    model.uncertainty.calibration.copy_(torch.tensor(LINE))
    return model


def logit(chance):
    return (math.log(chance / (1 - chance)) - LINE[1]) / LINE[0]


@pytest.mark.parametrize("speculative", [False, True])
def test_tokens_above_the_threshold_are_marked_and_none_changes(speculative):
    model, options = promised(logit(0.5)), OPTIONS | {"use_speculative": speculative}
    plain, doubts = model.generate_with_uncertainty(PROMPT, 40, **options)
    found = model.generate(PROMPT, 40, abstain_at=0.1, **options)
    assert isinstance(found, TokensAndAbstentions)
    assert found.tokens == plain == model.generate(PROMPT, 40, **options)
    assert found.uncertainties == pytest.approx(doubts, abs=1e-9)
    assert found.abstained == [doubt > 0.5 for doubt in doubts]
    assert 0 < sum(found.abstained) < 40


def test_rows_have_marks_of_their_own():
    model = promised(logit(0.5))
    found = model.generate(BATCH, 12, abstain_at=0.1, **OPTIONS)
    assert found.tokens == model.generate(BATCH, 12, **OPTIONS)
    assert found.abstained == [[doubt > 0.5 for doubt in row] for row in found.uncertainties]


def test_a_threshold_is_kept_itself(monkeypatch):
    """Equal logits give equal chances, computed as the head computes them."""
    for dtype in (torch.float32, torch.float64):
        model = lively("complete", dtype)
        head, own, seen = model.uncertainty, model.uncertainty.logit, []
        monkeypatch.setattr(head, "logit", lambda *given, own=own, seen=seen: seen.append(own(*given)) or seen[-1])
        head.calibration.copy_(torch.tensor([0.7, -0.3]))
        _, doubts = model.generate_with_uncertainty(PROMPT, 1, temperature=0)
        raw = seen[0].item()
        promised(raw, model=model).uncertainty.calibration.copy_(torch.tensor([0.7, -0.3]))
        first = model.generate(PROMPT, 1, temperature=0, abstain_at=0.1)
        assert first.uncertainties == doubts
        assert first.abstained == [False]


def test_without_a_threshold_everything_is_abstained_from():
    found = promised(None).generate(PROMPT, 20, abstain_at=0.1, **OPTIONS)
    assert found.abstained == [True] * (len(found.tokens) - len(PROMPT))


def test_each_risk_has_its_threshold():
    model = promised(logit(0.2), 0.1)
    promised(logit(0.6), 0.3, model)
    few, many = (model.generate(PROMPT, 40, abstain_at=risk, **OPTIONS).abstained for risk in (0.3, 0.1))
    assert 0 < sum(few) < sum(many)
    assert not any(a and not b for a, b in zip(few, many, strict=True))


def test_a_stream_says_it_of_each_token():
    model = promised(logit(0.5))
    expected = model.generate(PROMPT, 20, abstain_at=0.1, **OPTIONS)
    stream = model.generate_stream(PROMPT, 20, abstain_at=0.1, **OPTIONS)
    assert stream.promise == model.uncertainty.promises[0]
    assert [(token, stream.abstained) for token in stream] == list(
        zip(expected.tokens[len(PROMPT) :], expected.abstained, strict=True)
    )
    plain = model.generate_stream(PROMPT, 3, **OPTIONS)
    assert [plain.abstained for _ in plain] == [None] * 3
    assert plain.promise is None


def test_what_was_not_calibrated_is_refused_with_the_command_that_does_it():
    with pytest.raises(InputError, match=r"abstain_at=0.2 was not calibrated.*none.*calibrate .*--risk 0.2, then load"):
        lively("complete").generate(PROMPT, 3, abstain_at=0.2)
    with pytest.raises(InputError, match=r"risks that were: 0.1\).*--risk 0.2"):
        promised(0.0).generate(PROMPT, 3, abstain_at=0.2)
    for risk in (0, 1, "0.1", math.nan, True):
        with pytest.raises(InputError, match=r"abstain_at=.*must lie between 0 and 1"):
            promised(0.0).generate(PROMPT, 3, abstain_at=risk)
    with pytest.raises(InputError, match="no uncertainty head"):
        build("no uncertainty").generate(PROMPT, 3, abstain_at=0.1)


@pytest.mark.parametrize("options", [{"depth": 0.5}, {"think": 1}])
def test_another_computation_was_not_calibrated(options):
    with pytest.raises(InputError, match="leave depth, max_cost and think out"):
        promised(0.0).generate(PROMPT, 3, abstain_at=0.1, **options)
    assert promised(0.0).generate(PROMPT, 3, abstain_at=0.1, depth=1).abstained


def test_a_falling_line_is_refused():
    model = promised(0.0)
    model.uncertainty.calibration.copy_(torch.tensor([-1.0, 0.0]))
    with pytest.raises(InputError, match="fit it again"):
        model.generate(PROMPT, 3, abstain_at=0.1)


def test_other_weights_have_no_promises():
    model = promised(0.0)
    model.load_state_dict(lively("complete").state_dict())
    assert model.uncertainty.promises == ()


@pytest.mark.parametrize("name", ["final.pt", "model.safetensors"])
def test_a_checkpoint_carries_it_and_a_text_is_marked_in_pieces(tmp_path, name):
    made = Promise(risk=0.1, confidence=0.99, threshold=-0.5, windows=3, tokens=30, data="some text")
    _, tokenizer = save_tiny(tmp_path / name, promises=[made.to_dict()])
    model = Lepton.from_checkpoint(tmp_path / name)
    assert model.uncertainty.promises == (made,)
    median = model.generate_with_uncertainty(tokenizer.encode("Käse"), 30, seed=1).uncertainties
    threshold = torch.logit(torch.tensor(median).median()).item()
    model.uncertainty.promises = (Promise(**made.to_dict() | {"threshold": threshold}),)
    found = model.generate("Käse", 30, seed=1, abstain_at=0.1)
    assert isinstance(found, TextAndAbstentions)
    assert found.text == model.generate("Käse", 30, seed=1) == "Käse" + "".join(text for text, _ in found.pieces)
    assert {doubtful for _, doubtful in found.pieces} == {True, False}


@pytest.mark.parametrize(
    "changes", [{"risk": 2.0}, {"risk": "0.1"}, {"threshold": "low"}, {"windows": 1.5}, {"more": 1}, {"data": None}]
)
def test_a_promise_in_a_file_is_checked(tmp_path, changes):
    made = Promise(risk=0.1, confidence=0.99, threshold=-0.5, windows=3, tokens=30)
    path = tmp_path / "final.pt"
    save_tiny(path, promises=[made.to_dict() | changes])
    with pytest.raises(InputError, match=r"final.pt: .*(promise|risk=2.0)"):
        Lepton.from_checkpoint(path)
    save_tiny(path, promises="none")
    with pytest.raises(InputError, match="'promises' is of type str"):
        checkpoint.load(path)


def test_pieces_hold_whole_characters():
    class Bytes:
        def __init__(self):
            self.held = b""

        def push(self, token):
            self.held += bytes([token])
            try:
                text, self.held = self.held.decode(), b""
            except UnicodeDecodeError:
                return ""
            return text

        def flush(self):
            return "?" if self.held else ""

    tokens = [*"aé".encode(), 0xC3]
    assert pieces_of(Bytes(), tokens, [False, True, False, True]) == [("a", False), ("é", True), ("?", True)]
    assert pieces_of(Bytes(), tokens[:3], [True, False, False]) == [("a", True), ("é", False)]
