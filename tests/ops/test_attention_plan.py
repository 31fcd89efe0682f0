"""What attends to what, against a slow reference: in blocks, in ranges, and for chosen queries."""

import pytest
import torch

from lepton.ops.attention_kernel import ATTENTION, Ranges, runs
from lepton.ops.attention_plan import CausalWindow
from lepton.ops.query_blocks import BLOCK
from tests.ops.devices import force


def documents(rows, length, chance=0.05):
    """The document of each token [B, T], and each token's position in it."""
    starts = torch.rand(rows, length) < chance
    starts[:, 0] = False
    index = torch.arange(length).expand(rows, -1)
    first = torch.where(starts, index, 0).cummax(1).values
    return starts.long().cumsum(1), index - first


def slot_runs(rows, length, slots):
    """A mask [B, T, C] of slots that are seen for a while, and some that never are."""
    index = torch.arange(length)[None, :, None]
    first = torch.randint(length, (rows, 1, slots))
    sees = (index >= first) & (index < first + torch.randint(length, (rows, 1, slots)))
    sees[:, :, ::5] = False
    return sees


def naive_visible(documents, past, window):
    """Which of all tokens [T, J] each token behind the first `past` sees, one pair after the other."""
    near = [[window is None or t - s < window for s in range(t + 1)] for t in range(past, len(documents))]
    same = [[documents[s] == documents[t] for s in range(t + 1)] for t in range(past, len(documents))]
    sees = torch.zeros(len(documents) - past, len(documents), dtype=torch.bool)
    for row, (a, b) in enumerate(zip(near, same, strict=True)):
        sees[row, : len(a)] = torch.tensor(a) & torch.tensor(b)
    return sees


def example(length, window, slots, rows=2, past=0):
    """A window over several documents, the mask that it stands for, and slots behind it."""
    document, position = documents(rows, past + length)
    mask = torch.stack([naive_visible(row.tolist(), past, window) for row in document])
    sees = slot_runs(rows, length, slots)
    return position[:, past:], sees if slots else None, torch.cat([mask, sees], 2)


def lay_out(position, window, past=0, routed=False):
    return CausalWindow.of(position, past=past, window=window, dtype=torch.float64, head_dim=16, routed=routed)


def seen(plan, length, entries):
    """The mask that the biases of a plan's blocks stand for."""
    rows, slots = plan.blocks[0].bias_BQJ.shape[0], entries - plan.blocks[-1].entries.stop
    mask = torch.zeros(rows, length, entries, dtype=torch.bool)
    for block in plan.blocks:
        of_block = block.bias_BQJ == 0
        tokens = block.entries.stop - block.entries.start
        mask[:, block.queries, block.entries] = of_block[:, :, :tokens]
        mask[:, block.queries, entries - slots :] = of_block[:, :, tokens:]
    return mask


@pytest.mark.parametrize("slots", [0, 7])
@pytest.mark.parametrize("window", [None, 1, 24])
@pytest.mark.parametrize(("length", "past"), [(1, 0), (1, 23), (40, 0), (40, 23), (2 * BLOCK + 30, 0)])
def test_blocks_show_what_the_reference_shows(length, past, window, slots):
    position, sees, mask = example(length, window, slots, past=past)
    near = lay_out(position, window, past)
    assert torch.equal(seen(near.plan(sees), length, mask.shape[2]), mask)
    queries = torch.randint(length, (2, 5))
    for row in range(2):
        assert torch.equal(near.mask_of(queries)[row], mask[row, queries[row], : past + length])


@pytest.mark.parametrize("slots", [0, 1, 40])
@pytest.mark.parametrize("window", [None, 1, 24, 300])
@pytest.mark.parametrize("length", [1, 8, 100])
def test_ranges_show_what_the_reference_shows(length, window, slots, monkeypatch):
    asked = force(monkeypatch, ATTENTION)
    position, sees, mask = example(length, window, slots)
    ranges = lay_out(position, window).plan(sees).ranges
    assert asked == [(torch.device("cpu"), torch.float64, 16)]
    index_T1 = torch.arange(length)[:, None]
    by_entry = (index_T1 >= ranges.first_BJ[:, None]) & (index_T1 < ranges.last_BJ[:, None])
    assert torch.equal(by_entry, mask)
    by_query = (torch.arange(length) >= ranges.start_BT[:, :, None]) & (torch.arange(length) <= index_T1)
    assert torch.equal(by_query, mask[:, :, :length])
    assert (ranges.first_BJ <= ranges.last_BJ).all()


def test_runs_of_what_is_never_seen_are_empty():
    mask = torch.tensor([[False, True, False], [False, True, True], [False, False, True]])[None]
    first, last = runs(mask)
    assert first.tolist() == [[3, 0, 1]]
    assert last.tolist() == [[3, 2, 3]]


def test_a_past_and_a_route_are_left_to_blocks(monkeypatch):
    force(monkeypatch, ATTENTION)
    position, _, _ = example(8, 4, 0)
    assert lay_out(position, 4).plan().ranges is not None
    assert lay_out(position, 4, past=3).plan().ranges is None
    assert lay_out(position, 4, routed=True).plan().ranges is None


def test_rows_can_be_picked_in_either_form(monkeypatch):
    position, _, mask = example(8, 4, 3, rows=3)
    rows = torch.tensor([2, 0])
    blocks = lay_out(position, 4).plan_of_mask(mask).of_rows(rows)
    assert torch.equal(blocks.blocks[0].bias_BQJ == 0, mask[rows])
    force(monkeypatch, ATTENTION)
    ranges = lay_out(position, 4).plan_of_mask(mask).of_rows(rows).ranges
    expected = Ranges.of_mask(mask[rows])
    assert all(torch.equal(getattr(ranges, name), getattr(expected, name)) for name in ("first_BJ", "last_BJ"))


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_what_is_taken_is_put_back(share):
    length = 2 * BLOCK + 30
    position, _, _ = example(length, 24, 0)
    chosen = torch.rand(2, length) < share
    chosen[:, :BLOCK] = False
    plan = lay_out(position, 24, routed=True).plan(chosen_BT=chosen)
    x = torch.randn(2, length, 3)
    assert torch.equal(plan.put(x, plan.take(x)), x)
    doubled = torch.where(chosen[..., None], 2 * x, x)
    assert torch.equal(plan.put(x, 2 * plan.take(x)), doubled)
    assert len(plan.blocks) == (2 if share else 0)  # a block without chosen queries costs nothing
