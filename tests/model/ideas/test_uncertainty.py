"""What a prediction looks like, against the obvious way to find it; and the loss that teaches the head."""

import pytest
import torch
import torch.nn.functional as F

from lepton.model.ideas.idea import OUTCOME_STRIDE
from lepton.model.ideas.idea import picks as picked
from lepton.model.ideas.uncertainty import LOG_ODDS, prediction_features
from tests.laws.lab import build, text


def reference(logits):
    p = logits.softmax(-1)
    first, second = logits.log_softmax(-1).topk(2, -1).values.unbind(-1)
    odds = torch.logit(-torch.expm1(first).clamp(max=-1e-30))
    return torch.stack([odds.clamp(-LOG_ODDS, LOG_ODDS), torch.special.entr(p).sum(-1), first - second], -1)


def slow_loss(uncertainty, hidden, logits, signals, target):
    valid = target >= 0
    wrong = (logits.argmax(-1) != target).to(logits.dtype)[valid]
    return F.binary_cross_entropy_with_logits(uncertainty.logit(hidden, logits, signals)[valid], wrong)


@pytest.mark.parametrize("scale", [1e-4, 0.1, 1, 5, 1e4])
@pytest.mark.parametrize("shape", [(97,), (5, 97), (2, 0, 97), (2, 3, 5003)])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-9)])
def test_a_prediction_looks_as_it_should(dtype, tolerance, shape, scale):
    logits = (scale * torch.randn(shape)).to(dtype).requires_grad_()
    shown, likely = prediction_features(logits)
    assert shown.dtype == dtype
    assert not shown.requires_grad
    torch.testing.assert_close(shown.double(), reference(logits.double()).detach(), rtol=tolerance, atol=tolerance)
    assert torch.equal(likely, logits.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_predictions_at_the_edges(dtype):
    logits = torch.zeros(5, 97, dtype=dtype)
    logits[1:3] = torch.tensor([[1e4], [-1e4]])
    logits[3, [7, 40]] = 3.0
    logits[4] = -1e4
    logits[4, 7] = 1e4
    shown, likely = prediction_features(logits)
    torch.testing.assert_close(shown, reference(logits), rtol=1e-5, atol=1e-5)
    assert not shown[:4, 2].any(), "two equal ones lead by nothing"
    assert shown[4].tolist() == [-LOG_ODDS, 0, 2e4]
    assert likely[3:].tolist() == [7, 7]


def test_doubt_of_a_sure_prediction_keeps_its_digits():
    """One minus a probability near 1 would have lost them in fp32."""
    logits = torch.tensor([[14.0, 0.0, 0.3]])
    shown, _ = prediction_features(logits)
    torch.testing.assert_close(shown.double(), reference(logits.double()), rtol=1e-6, atol=1e-6)


def given(rows=12):
    model = build("complete")
    assert model.uncertainty is not None
    raw = 20 * torch.randn(rows, model.config.padded_vocab_size, dtype=model.dtype)
    target = raw[:, : model.config.vocab_size].argmax(-1)
    target[::3] = 5
    target[1::4] = -100
    hidden, signals = torch.randn(rows, model.config.width).to(raw), torch.randn(rows, 3).to(raw)
    return model, hidden, raw, signals, target


def test_the_loss_is_that_of_the_capped_logits_of_real_tokens():
    model, hidden, raw, signals, target = given()
    config, parameters = model.config, list(model.uncertainty.parameters())
    logits = config.logit_cap * torch.tanh(raw[:, : config.vocab_size] / config.logit_cap)
    expected = slow_loss(model.uncertainty, hidden, logits, signals, target)
    raw[:, config.vocab_size :] = 1e4
    hidden, raw = hidden.requires_grad_(), raw.requires_grad_()
    got = model.uncertainty.loss(hidden, raw, signals, target)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)
    grads = [torch.autograd.grad(loss, parameters) for loss in (got, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=1e-10)
    got = model.uncertainty.loss(hidden, raw, signals, target)
    assert torch.autograd.grad(got, (hidden, raw), allow_unused=True) == (None, None)


def test_nothing_to_predict_is_no_loss():
    model, hidden, raw, signals, target = given()
    assert model.uncertainty.loss(hidden, raw, signals, torch.full_like(target, -100)).item() == 0
    assert model.uncertainty.loss(hidden[:0], raw[:0], signals[:0], target[:0]).item() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_is_capped_in_fp32(dtype):
    model, *inputs, target = given()
    model.float()
    hidden, raw, signals = (each.to(dtype) for each in inputs)
    loss = model.uncertainty.loss(hidden, raw, signals.float(), target)
    assert loss.dtype == torch.float32
    expected = model.uncertainty.loss(hidden.float(), raw.float(), signals.float(), target)
    torch.testing.assert_close(loss, expected, rtol=1e-2, atol=0)


@pytest.mark.parametrize("variant", ["complete", "factorised, own keys"])
def test_training_looks_at_what_the_model_predicts(variant):
    """The loss has no logits, and makes the same of the products before them."""
    model, tokens = build(variant), text(1, rows=3)
    out, following = model.trunk(tokens[:, :-1]), tokens[:, 1:]
    picks = picked(following, OUTCOME_STRIDE)
    hidden = out.hidden.flatten(0, 1)[picks]
    signals = out.signals.flatten(0, 1)[picks]
    expected = slow_loss(model.uncertainty, hidden, model.head(hidden), signals, following.flatten()[picks])
    torch.testing.assert_close(model.loss(tokens).parts["uncertainty"], expected.detach(), rtol=0, atol=1e-10)


def test_a_graph_of_the_whole_loss():
    model, *inputs = given()
    parameters = list(model.uncertainty.parameters())
    compiled = torch.compile(model.uncertainty.loss, fullgraph=True, dynamic=False, backend="aot_eager")
    both = []
    for function in (model.uncertainty.loss, compiled):
        loss = function(*inputs)
        both.append((loss.detach(), *torch.autograd.grad(loss, parameters)))
    torch.testing.assert_close(*both)


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_compiled_it_is_the_same(dtype):
    model, *inputs, target = given(rows=300)
    model.float().cuda()
    hidden, raw, signals = (each.to("cuda", dtype) for each in inputs)
    parameters = list(model.uncertainty.parameters())
    both = []
    for function in (model.uncertainty.loss, torch.compile(model.uncertainty.loss, fullgraph=True, dynamic=False)):
        loss = function(hidden, raw, signals.float(), target.cuda())
        both.append((loss.detach(), *torch.autograd.grad(loss, parameters)))
    tolerance = 1e-4 if dtype == torch.float32 else 1e-2  # compiled, a product's sum may be rounded later
    for one, other in zip(*both, strict=True):
        assert (one - other).norm() <= tolerance * other.norm()
