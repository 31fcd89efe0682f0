"""The cell that drafts: which tokens it proposes, and what it is taught."""

import pytest
import torch
from torch.nn.functional import cross_entropy

from lepton.errors import InputError
from lepton.model.ideas.drafter import FADE
from lepton.ops.cross_entropy import IGNORE, soft_cap
from lepton.ops.heads import norm
from tests.laws.lab import VOCAB, assert_close, build


@pytest.fixture
def model():
    return build("complete")


def test_the_most_frequent_tokens_are_proposed_ties_by_id(model):
    counts = torch.zeros(VOCAB, dtype=torch.int64)
    counts[[50, 7, 90]] = torch.tensor([3, 9, 3])
    model.drafter.learn_frequencies(lambda: counts)
    assert model.drafter.ids.tolist() == [7, 50, 90, *[i for i in range(VOCAB) if i not in (7, 50, 90)][:37]]


def test_ids_that_the_vocabulary_lacks_are_refused(model):
    weights = dict(model.state_dict())
    weights["drafter.ids"] = weights["drafter.ids"] + VOCAB - 1
    with pytest.raises(InputError, match=r"'drafter\.ids' holds ids outside 0\.\.vocab_size-1=96"):
        build("complete", seed=1).load_state_dict(weights)


def test_the_loss_fades_over_the_drafts_and_skips_what_cannot_be_proposed(model):
    """Against the cell run by hand at single positions."""
    drafter = model.drafter
    drafter.learn_frequencies(lambda: torch.arange(VOCAB))  # the last 40 ids
    hidden = torch.randn(6, model.config.width, dtype=torch.float64)
    following = torch.randint(1, VOCAB, (6, drafter.count + 1))
    following[2, 3:] = following[4, 1:] = IGNORE
    rows, ids = drafter.rows(model.embed), drafter.ids.tolist()
    total, weights = 0.0, 0.0
    for i in range(drafter.count):
        nats = []
        for m in range(6):
            state = drafter.begin(hidden[m])
            for token in following[m, : i + 1].clamp(min=0):
                state = drafter.step(state, model.embed(token))
            wanted = int(following[m, i + 1])
            if wanted in ids:
                logits = soft_cap(drafter.leave(state) @ rows.T, drafter.cap)
                nats.append(cross_entropy(logits, torch.tensor(ids.index(wanted))))
        total, weights = total + FADE**i * torch.stack(nats).mean(), weights + FADE**i
    torch.testing.assert_close(drafter.loss(hidden, following[:, :-1], following[:, 1:], model.embed), total / weights)


def test_the_prepared_cell_is_the_cell(model):
    """State and logits, draft by draft, after tokens that can be proposed and a newest one that need not be."""
    drafter = model.drafter
    drafter.ids.copy_(torch.randperm(VOCAB)[: len(drafter.ids)])
    hidden = torch.randn(6, model.config.width, dtype=torch.float64)
    newest = torch.arange(VOCAB - 6, VOCAB)
    rows = drafter.rows(model.embed)
    prepared = drafter.prepared(model.embed, torch.float64, -1)
    assert torch.equal(prepared.ids_Z, drafter.ids)
    with torch.no_grad():
        expected = drafter.step(drafter.begin(hidden), model.embed(newest))
        found = prepared.begin(hidden, model.embed(newest))
        for _ in range(4):
            assert_close(norm(found), expected, "state")
            assert_close(prepared.logits(found), drafter.leave(expected) @ rows.T, "logits")
            column = torch.randint(0, len(rows), (6,))
            expected = drafter.step(expected, rows[column])
            found = prepared.step(found, column)


@pytest.mark.parametrize("place", [0, 17, -1])
def test_an_id_that_is_never_proposed_has_another_in_its_place(model, place):
    """All of its column is that of the other token."""
    drafter = model.drafter
    never = int(drafter.ids[place])
    whole, without = (drafter.prepared(model.embed, torch.float64, each) for each in (-1, never))
    assert never not in without.ids_Z
    for name in ("ids_Z", "read", "propose_ZW"):
        expected = getattr(whole, name).clone()
        expected[place] = expected[0 if place == -1 else -1]
        assert torch.equal(getattr(without, name), expected)


def test_neither_trunk_nor_embedding_pays_for_drafts(model):
    hidden = torch.randn(6, model.config.width, dtype=torch.float64, requires_grad=True)
    tokens = torch.randint(1, 40, (6, 5))
    model.drafter.loss(hidden, tokens[:, :-1], tokens[:, 1:], model.embed).backward()
    assert hidden.grad is None
    assert model.embed.weight.grad is None
    assert model.drafter.leave.weight.grad.any()
