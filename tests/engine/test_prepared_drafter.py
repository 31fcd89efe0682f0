"""Tables of the drafter that follow the weights."""

import torch

from lepton.engine.runner import Runner
from tests.generate.models import lively


def test_tables_of_drafts_follow_the_weights():
    """They are made where they are needed, once for the same weights, and changed in place: a graph reads them."""
    model = lively("complete")
    runner = Runner(model, 1, 10)
    assert runner.drafter.get(0) is None
    made = []
    drafter = model.drafter
    own, drafter.prepared = drafter.prepared, lambda *given: made.append(given) or own(*given)
    tables = runner.drafter.get(4)
    for _ in range(2):
        runner.refresh()
        assert runner.drafter.get(4) is tables
    assert len(made) == 1
    with torch.no_grad():
        for change in (drafter.token.weight, model.embed.weight):
            before = tables.read.clone()
            change.mul_(-1.5)
            runner.refresh()
            assert runner.drafter.get(4) is tables
            assert not torch.equal(tables.read, before)
            for found, expected in zip(tables, own(model.embed, model.dtype, model.config.eos_id), strict=True):
                assert torch.equal(found, expected)
    tables.read.zero_()
    loss = sum(each.square().sum() for each in (*drafter.parameters(), model.embed.weight))
    loss.backward()
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()  # it leaves versions as they are
    runner.refresh()
    assert torch.equal(runner.drafter.get(4).read, own(model.embed, model.dtype, model.config.eos_id).read)
    drafter.learn_frequencies(lambda: torch.arange(model.config.vocab_size))
    runner.refresh()
    assert torch.equal(runner.drafter.get(4).ids_Z, drafter.ids)
