"""Training of the drafter on the model's own text: drafts land more often, and nothing else of the model changes."""

import pytest
import torch

from lepton.errors import InputError
from lepton.evals.speculation import measure_speculation
from lepton.ops.cross_entropy import IGNORE
from lepton.train.own_text import OwnText, Row, learn, learners, write
from tests.generate.models import lively

SHORT = OwnText(new_tokens=24, rows=16, steps=60)


def prompts(first, count=24):
    generator = torch.Generator().manual_seed(first)
    return torch.randint(1, 97, (count, 6), generator=generator).tolist()


def test_more_drafts_are_kept_on_other_prompts():
    model, told = lively("complete"), []
    before = measure_speculation(model, prompts(1), max_new_tokens=24)
    learn(model, write(model, prompts(0), SHORT), SHORT, lambda *step: told.append(step))
    after = measure_speculation(model, prompts(1), max_new_tokens=24)
    assert after[0.0].tokens_per_step > 1.1 * before[0.0].tokens_per_step
    assert [(step, of) for step, of, _ in told] == [(1, 60), (21, 60), (41, 60), (60, 60)]
    assert told[-1][2] < told[0][2]


def test_nothing_else_changes():
    model = lively("complete")
    model.embed.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    text = model.generate(prompts(2), 20, temperature=1.0, seed=3)
    learn(model, write(model, prompts(0), SHORT), SHORT)
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"drafter.{name}.weight" for name in ("enter", "token", "up", "down", "leave")}
    assert model.generate(prompts(2), 20, temperature=1.0, seed=3) == text
    needed = {name: each.requires_grad for name, each in model.named_parameters()}
    assert needed == {name: name != "embed.weight" for name in needed}
    assert all(each.grad is None for each in model.parameters())
    assert not model.training


def test_texts_are_those_of_each_temperature():
    model = lively("complete")
    rows = write(model, prompts(0, 3), OwnText(new_tokens=9, temperatures=(0.0, 1.0)))
    assert [row.tokens for row in rows[:3]] == model.generate(prompts(0, 3), 9, temperature=0)
    assert [row.tokens for row in rows[3:]] == model.generate(prompts(0, 3), 9, temperature=1.0, top_p=1.0, seed=0)
    assert {row.prompt for row in rows} == {6}


def test_only_what_the_model_wrote_is_learnt():
    """Of a short and a long row: neither the prompt's tokens nor the padding."""
    model, seen = lively("complete"), []
    losses = model.drafter.own_text_losses
    model.drafter.own_text_losses = lambda outcome: seen.append(outcome) or losses(outcome)
    rows = [Row([5, 6, 7, 8, 9], 2), Row([11, 12, 13, 14, 15, 16, 17, 18, 19, 20], 4)]
    learn(model, rows, OwnText(rows=2, steps=1))
    following, position = seen[0].following_BT.tolist(), seen[0].position_BT.tolist()
    found = {tuple(row): places for row, places in zip(following, position, strict=True)}
    none = IGNORE
    assert found == {
        (none, 7, 8, 9, none, none, none, none, none): [0, 1, 2, 3, 4, -1, -1, -1, -1],
        (none, none, none, 15, 16, 17, 18, 19, 20): [0, 1, 2, 3, 4, 5, 6, 7, 8],
    }


def test_every_text_is_learnt_in_every_pass():
    model, seen = lively("complete"), []
    losses = model.drafter.own_text_losses
    model.drafter.own_text_losses = lambda outcome: seen.append(outcome.following_BT[:, -1].tolist()) or losses(outcome)
    learn(model, [Row([1, 2, 3, 4, 5, 6, number], 1) for number in range(20, 30)], OwnText(rows=4, steps=6))
    assert [len(each) for each in seen] == [4, 4, 2, 4, 4, 2]
    first, second = ([number for each in part for number in each] for part in (seen[:3], seen[3:]))
    assert sorted(first) == sorted(second) == list(range(20, 30))
    assert first != second, "each pass has an order of its own"


def test_drafts_learn_the_distribution_of_the_model_and_not_the_tokens():
    """Also where training did not: the loss is a divergence, which is 0 where cell and model agree."""
    model, losses = lively("complete"), []
    assert not model.drafter.distil
    rows = write(model, prompts(0, 4), OwnText(new_tokens=20, temperatures=(0.0,)))
    learn(model, rows, OwnText(rows=4, steps=1), lambda *told: losses.append(told[2]))
    model.drafter.own_text_losses = model.drafter.losses
    learn(model, rows, OwnText(rows=4, steps=1), lambda *told: losses.append(told[2]))
    assert losses[0] < losses[1] - 0.1, "a cross-entropy also has the entropy of the model's own choice"


def test_a_model_without_drafts_is_refused():
    model = lively("no drafts")
    with pytest.raises(InputError, match="built without drafts"):
        learners(model)


def test_weights_that_diverged_are_refused():
    model = lively("complete")
    with torch.no_grad():
        model.drafter.leave.weight.fill_(float("nan"))
    with pytest.raises(InputError, match="the loss of step 0 is nan"):
        learn(model, [Row([1, 2, 3, 4, 5, 6, 7, 8], 1)] * 4, OwnText(rows=4, steps=1))
    assert all(each.requires_grad for each in model.parameters())
