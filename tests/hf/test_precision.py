import pytest
import torch

from lepton.errors import InputError
from tests.hf.small import pair, text


def test_autocast_is_the_precision_of_lepton():
    tokens, losses, gradients = text(40, rows=2), [], []
    for autocast in (True, False):
        _, wrapped = pair()
        wrapped.train()
        if autocast:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                loss = wrapped(tokens, labels=tokens).loss
            assert wrapped.network.compute_dtype is None
        else:
            wrapped.network.compute_dtype = torch.bfloat16
            loss = wrapped(tokens, labels=tokens).loss
        loss.backward()
        losses.append(loss)
        gradients.append([value.grad for value in wrapped.parameters()])
    assert torch.equal(*losses)
    assert all(torch.equal(*both) for both in zip(*gradients, strict=True))


def test_generation_under_autocast_has_a_state_of_its_dtype():
    _, wrapped = pair()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        cache = wrapped(text(10)).cache
        assert cache.state.stem.keys_BLRKH.dtype == torch.bfloat16
        wrapped(text(1), cache=cache)
    with pytest.raises(InputError, match="they must agree"):
        wrapped(text(1), cache=cache)


def test_half_precision_without_range_is_refused():
    _, wrapped = pair()
    with torch.autocast("cpu", dtype=torch.float16), pytest.raises(InputError, match="use bf16=True"):
        wrapped(text(10))
    assert wrapped.network.compute_dtype is None
