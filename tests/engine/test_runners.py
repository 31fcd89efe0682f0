"""Who has which runner."""

import copy
import pickle

import pytest
import torch

from lepton.engine import cycles, runners
from lepton.engine.cycle import cycle
from lepton.engine.runners import Lease
from tests.generate.models import PROMPT, always_drafting, lively


def test_a_runner_serves_one_at_a_time_and_is_used_again():
    model = lively("complete")
    with Lease(model, 2, 10) as first:
        with Lease(model, 2, 10) as second:
            assert second.runner is not first.runner
        with Lease(model, 1, 10) as third:
            assert third.runner is second.runner, "a larger pool does as well"
        with Lease(model, 3, 10) as fourth:
            assert fourth.runner.places >= 3
    with Lease(model, 2, 10) as again:
        assert again.runner in (first.runner, second.runner)


def test_a_runner_of_other_weights_is_not_used_again():
    model = lively("complete")
    text = model.generate(PROMPT, 8, temperature=0)
    with Lease(model, 1, 10) as before:
        pass
    with torch.no_grad():
        model.blocks[0].mlp.down.weight.mul_(3)  # in place: it reads the new values
    with Lease(model, 1, 10) as changed:
        assert changed.runner is before.runner
    assert model.generate(PROMPT, 8, temperature=0) != text
    model.float()
    with Lease(model, 1, 10) as replaced:
        assert replaced.runner is not before.runner
        assert replaced.runner.pool.held.rows.seen_BF.dtype == torch.float32


def test_a_pool_without_a_window_is_long_enough():
    model = lively("dense")
    with Lease(model, 1, 10) as short:
        pass
    with Lease(model, 1, 500) as long:
        assert long.runner is not short.runner
    assert len(model.generate(PROMPT, 300, temperature=0)) > len(PROMPT)


def test_runners_are_not_copied_or_pickled():
    model = lively("complete")
    expected = model.generate(PROMPT, 5, temperature=0)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert other._runners == []
        assert other.generate(PROMPT, 5, temperature=0) == expected


def test_a_runner_is_dropped_after_an_error():
    model = lively("complete")
    with pytest.raises(ValueError, match="stop"), Lease(model, 1, 10) as lease:
        raise ValueError("stop")
    with Lease(model, 1, 10) as other:
        assert other.runner is not lease.runner


def test_few_runners_are_kept_and_none_of_old_weights(monkeypatch):
    model = lively("complete")
    for places in range(1, 9):
        with Lease(model, places, 10):
            pass
    assert len(model._runners) == runners.MOST_KEPT
    assert max(each.places for each in model._runners) == 8
    model.float()
    with Lease(model, 1, 10) as lease:
        assert model._runners == []
    assert model._runners == [lease.runner]
    monkeypatch.setattr(runners, "MOST_BYTES", 1)
    with Lease(model, 2, 10):
        pass
    assert model._runners == [lease.runner], "a large pool is given back"


def test_what_was_compiled_is_kept(monkeypatch):
    """However large its pool is, and however many other runners are made."""
    monkeypatch.setattr(runners, "MOST_BYTES", 0)
    monkeypatch.setattr(cycles, "compiled_cycle", lambda *given: lambda: cycle(*given))
    model = lively("complete")
    model.warm_up(1)
    (warm,) = runners._free(model)
    monkeypatch.setattr(runners, "MOST_BYTES", 1 << 40)
    for rows in range(2, 8):
        model.generate([[5, 6, 7]] * rows, max_new_tokens=2, temperature=0)
    assert warm in runners._free(model)
    assert len(runners._free(model)) == runners.MOST_KEPT
    with Lease(model, 1, 10) as lease:
        assert lease.runner is warm


def test_inference_mode_may_come_and_go():
    model, options = lively("complete"), {"max_new_tokens": 8, "temperature": 0}
    expected = lively("complete").generate(PROMPT, **options)
    with always_drafting():
        for mode in (True, False, True):
            with torch.inference_mode(mode):
                assert model.generate(PROMPT, **options) == expected
