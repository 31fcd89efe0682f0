"""Which tokens crystallise, and what a person can do with a memory: list, clear, save, carry over."""

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lepton.errors import InputError
from lepton.model.ideas.crystals import EMPTY, best_of_groups
from tests.laws.lab import EOS, IDEAS, assert_close, assert_states, build, text

ROOT = Path(__file__).parents[3]


def slow_store(model, tokens: torch.Tensor) -> list[list[int]]:
    """Positions in the store after each token, found one token at a time from the scores alone."""
    config = model.config
    run = model.trunk(tokens)
    scores = torch.log(torch.sigmoid(score_of(model, tokens)))[0]
    keys = [round(1024 * score.item()) for score in scores]
    kept, open_, history = [], [], []
    for t, position in enumerate(run.flow.timeline.position_BT[0].tolist()):
        if position == 0:
            kept, open_ = [], []
        if position % config.segment == 0:
            best = sorted(open_, reverse=True)[: config.idea("crystals").per_segment]
            kept = sorted(kept + best, reverse=True)[: config.idea("crystals").slots]
            open_ = []
        open_.append((keys[t], position))
        history.append(sorted(position for _, position in kept))
    return history


def score_of(model, tokens: torch.Tensor) -> torch.Tensor:
    """Raw crystal scores [B, T]."""
    seen = []
    hook = model.crystals.register_forward_hook(lambda _module, inputs, _output: seen.append(inputs[1]))
    model.trunk(tokens)
    hook.remove()
    return model.crystals.score(seen[0])[..., 0]


@pytest.mark.parametrize("variant", ["complete", "odd edges"])
@torch.no_grad()
def test_the_store_holds_the_best_of_all_closed_segments(variant):
    model, tokens = build(variant), text(3, rows=1)
    expected, out = slow_store(model, tokens), model(tokens)
    for t in range(tokens.shape[1]):
        if tokens[0, t] != EOS:
            state = out.commit(torch.tensor([t + 1]))
            assert [crystal.position for crystal in state.memory] == expected[t], t


def test_best_of_groups_against_sorting():
    torch.manual_seed(1)
    priority, group = torch.randint(0, 50, (3, 40)) * 64 + torch.arange(40), torch.randint(0, 5, (3, 40)).sort(1).values
    priority[:, ::7] = torch.iinfo(torch.int64).min
    index, filled = best_of_groups(priority, group, 6, 3)
    for row in range(3):
        for g in range(6):
            members = [e for e in range(40) if group[row, e] == g and priority[row, e] >= 0]
            best = sorted(sorted(members, key=lambda e: -priority[row, e].item())[:3])
            places = slice(3 * g, 3 * g + 3)
            assert index[row, places][filled[row, places]].tolist() == best


@torch.no_grad()
def test_a_crystal_shows_the_tokens_it_came_from():
    model, tokens = build("complete"), text(4, rows=2, documents=False)
    crystals = list(model(tokens).state.memory)
    assert {crystal.row for crystal in crystals} == {0, 1}
    for row, position, score, ids in crystals:
        assert 0 < score < 1
        assert ids == tokens[row, max(0, position - 15) : position + 1].tolist()


@torch.no_grad()
def test_clearing_forgets():
    model, tokens = build("complete"), text(5, documents=False)
    state, other = model(tokens).state, model(tokens).state
    state.memory.clear()
    assert list(state.memory) == []
    assert not state.part("memory").matrix_BNHU.any()
    assert list(other.memory) != []
    difference = model(tokens[:, :5], state).logits - model(tokens[:, :5], other).logits
    assert difference.abs().max() > 1e-6


@torch.no_grad()
def test_a_stream_goes_on_from_a_file(tmp_path):
    model, tokens = build("complete"), text(6)
    out = model(tokens[:, :60])
    out.state.save(tmp_path / "state.safetensors")
    loaded = model.load_state(tmp_path / "state.safetensors")
    assert_states(out.state, loaded, "loaded")
    expected, got = (model(tokens[:, 60:], state) for state in (out.state, loaded))
    assert torch.equal(expected.logits, got.logits)


@pytest.mark.parametrize("variant", ["complete", "dense"])
def test_a_stream_that_has_read_nothing_is_saved(variant, tmp_path):
    model = build(variant)
    model.new_state(2).save(tmp_path / "state.safetensors")
    assert_states(model.new_state(2), model.load_state(tmp_path / "state.safetensors"), "loaded")


@pytest.mark.parametrize("changes", [{"layers": 3}, {"kv_heads": 4}, {"head_dim": 4}])
def test_a_dense_stream_of_another_shape_is_named(changes, tmp_path):
    model = build("dense")
    with torch.no_grad():
        build("dense", **changes)(text(1)).state.save(tmp_path / "state.safetensors")
        with pytest.raises(InputError, match="this model needs"):
            model.load_state(tmp_path / "state.safetensors")
        model(text(1)).state.save(tmp_path / "state.safetensors")
        assert model.load_state(tmp_path / "state.safetensors").deep.keys_BLRKH.shape[2] > 0


def test_a_stream_goes_on_in_another_process(tmp_path):
    code = """
import sys, torch
from tests.laws.lab import build, text
torch.set_num_threads(1)
model, tokens = build("complete"), text(6)
with torch.no_grad():
    state = model.load_state(sys.argv[1] + "/state.safetensors")
    torch.save(model(tokens[:, 60:], state).logits, sys.argv[1] + "/logits.pt")
"""
    model, tokens = build("complete"), text(6)
    with torch.no_grad():
        model(tokens[:, :60]).state.save(tmp_path / "state.safetensors")
        subprocess.run([sys.executable, "-c", code, str(tmp_path)], cwd=ROOT, check=True)
        assert_close(model(tokens).logits[:, 60:], torch.load(tmp_path / "logits.pt"), "the other process")


@torch.no_grad()
def test_one_crystal_is_taken_out():
    """It is gone for all tokens after it, and nothing else changes."""
    model, tokens = build("complete"), text(1, rows=2)
    with torch.no_grad():
        state = model(tokens).state
    before = list(state.memory)
    gone = before[1]
    state = dataclasses.replace(state, memory=state.memory.without(gone.row, gone.position))
    assert list(state.memory) == [each for each in before if each != gone]
    kept = state.part("crystals").kept
    present = kept.position_BC > EMPTY
    assert (present.long().diff(dim=1) <= 0).all(), "empty entries come last"
    assert not kept.states_BCD[~present].any()
    with torch.no_grad():
        later = list(model(text(2, rows=2, documents=False), state).state.memory)
    assert (gone.row, gone.position) not in [(each.row, each.position) for each in later]


def test_a_crystal_that_is_not_there_cannot_be_taken_out():
    with torch.no_grad():
        memory = build("complete")(text(1, rows=2)).state.memory
    for row, position in ((0, 10_000), (2, next(iter(memory)).position)):
        with pytest.raises(InputError, match=f"no crystal of row {row} has position {position}"):
            memory.without(row, position)


def test_only_the_memory_goes_into_a_new_conversation(tmp_path):
    model, tokens = build("complete"), text(7, rows=2, documents=False)
    state = model(tokens).state
    state.memory.save(tmp_path / "memory.safetensors")
    fresh = model.new_state(2, memory=tmp_path / "memory.safetensors")
    assert fresh.position_B.tolist() == [0, 0]
    assert_close(state.part("memory").matrix_BNHU, fresh.part("memory").matrix_BNHU, "working memory")
    carried = list(fresh.memory)
    assert all(crystal.position <= -IDEAS["window"] for crystal in carried)
    assert {tuple(c.tokens) for c in carried} & {tuple(c.tokens) for c in state.memory}
    question = text(8, rows=2, length=20, documents=False)
    remembering, blank = model(question, fresh), model(question)
    assert (remembering.logits[:, 0] - blank.logits[:, 0]).abs().max() > 1e-6, "it remembers from the first token"
    state, parts = fresh, []
    for t in range(20):
        out = model(question[:, t : t + 1], state)
        state = out.state
        parts.append(out.logits)
    assert_close(remembering.logits, torch.cat(parts, 1), "one path")
    idle = model(question[:, :1], fresh, lengths=torch.tensor([0, 0])).state
    assert_states(fresh, idle, "a row that takes no token keeps what it carries")


@torch.no_grad()
def test_files_that_do_not_fit_are_named(tmp_path):
    model = build("complete")
    path = tmp_path / "state.safetensors"
    with pytest.raises(InputError, match="no such file"):
        model.load_state(path)
    path.write_bytes(b"not a file")
    with pytest.raises(InputError, match="not a whole safetensors file"):
        model.load_state(path)
    build("odd edges")(text(1)).state.save(path)
    with pytest.raises(InputError, match="this model needs"):
        model.load_state(path)
    build("no crystals")(text(1)).state.save(path)
    with pytest.raises(InputError, match="does not agree"):
        model.load_state(path)
    build("complete")(text(1, rows=3)).state.memory.save(path)
    with pytest.raises(InputError, match="3 rows"):
        model.new_state(2, memory=path)
