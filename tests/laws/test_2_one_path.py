"""Law 2: one function. Full forward, any chunking, single tokens, verify and rollback agree, in outputs and state."""

import itertools
import random

import pytest
import torch

from lepton.engine.pool import Held, Pool
from lepton.model.ideas import working_memory
from lepton.model.ideas.idea import Call, Rounds
from lepton.model.output import commit
from lepton.ops.few_writes import FEW
from tests.laws.lab import EOS, LENGTH, VARIANTS, assert_outputs, assert_states, build, cut, half_depth, text, views

ROWS = slice(None)


def plans(seed: int, length: int) -> list[list[int]]:
    """Where to cut: everywhere, at random, around the window's edges, prefill and then single tokens and the rest."""
    draw = random.Random(seed)
    return [
        list(range(1, length + 1)),
        [*sorted(draw.sample(range(1, length), 6)), length],
        [7, 8, 9, 16, 17, 40, length],
        [length // 2, *range(length // 2 + 1, length // 2 + 13), length],
        [1, length],
    ]


def texts() -> dict[str, torch.Tensor]:
    constant = torch.full((2, LENGTH), 5)
    constant[1, 50] = EOS
    return {
        "random": text(3),
        "one document": text(4, documents=False),
        "constant": constant,
        "periodic": torch.tensor([[7, 8, 9, 10, 8]]).repeat(2, LENGTH // 5),
        "document ends only": torch.full((2, LENGTH), EOS),
    }


def check_chunkings(variant: str, kind: str, **options) -> None:
    model, tokens = build(variant), texts()[kind]
    opens = torch.rand(2, LENGTH, generator=torch.Generator().manual_seed(1)) < 0.06
    full = model(tokens, opens=opens, **options)
    for plan in plans(len(kind), LENGTH):
        state, first = model.new_state(2), 0
        for last in plan:
            out = model(tokens[:, first:last], state, opens=opens[:, first:last], **options)
            assert_outputs(cut(views(full), ROWS, slice(first, last)), views(out), f"{kind} {first}:{last} of {plan}")
            state, first = out.state, last
        assert_states(full.state, state, plan)


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_any_chunking_equals_the_full_forward(variant):
    check_chunkings(variant, "random")


@pytest.mark.parametrize("variant", ["complete", "odd edges", "dense"])
@pytest.mark.parametrize("kind", texts())
@torch.no_grad()
def test_any_chunking_of_any_kind_of_text(variant, kind):
    check_chunkings(variant, kind, **half_depth(variant))


@pytest.mark.parametrize("rounds", [0, 4])
@torch.no_grad()
def test_any_chunking_at_any_number_of_rounds(rounds):
    check_chunkings("complete", "random", think=rounds)


@torch.no_grad()
def test_the_rounds_of_thinking_matter():
    model, tokens = build("complete"), text(1)
    logits = [model(tokens, think=rounds).logits for rounds in (0, 1, 2, 4)]
    assert all((a - b).abs().max() > 1e-3 for a, b in itertools.pairwise(logits))


@torch.no_grad()
def test_long_chunks_are_banded_without_a_seam():
    """Chunks of more than two bands take the linear-cost path; chunks of 50 do not."""
    model, tokens = build("complete"), text(5, rows=1, length=1100)
    full, state = model(tokens, depth=0.5), None
    for first in range(0, 1100, 50):
        out = model(tokens[:, first : first + 50], state, depth=0.5)
        assert_outputs(cut(views(full), ROWS, slice(first, first + 50)), views(out), first)
        state = out.state
    assert_states(full.state, state, "bands")


@pytest.mark.parametrize("seed", range(2))
@torch.no_grad()
def test_fp32_agrees_within_its_tolerance(seed):
    model, tokens = build("complete", seed, dtype=torch.float32), text(6)
    full, state = model(tokens), None
    for t in range(LENGTH):
        out = model(tokens[:, t : t + 1], state)
        assert_outputs(cut(views(full), ROWS, slice(t, t + 1)), views(out), t)
        state = out.state


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_rollback_restores_the_state_that_never_saw_the_drafts(variant):
    """commit(n) of a chunk whose rest is junk equals reading only its first n tokens, row by row."""
    model, tokens = build(variant), text(7, rows=3)
    before = model(tokens[:, :37]).state
    read = [before]  # after each number of tokens, one by one
    for t in range(37, 42):
        read.append(model(tokens[:, t : t + 1], read[-1]).state)
    for length in (5, 20):
        for counts in ([0, 1, 2], [3, 0, 5], [5, 4, 1], [4, 4, 4]):
            junk = text(sum(counts), rows=3, length=length)
            opens = torch.rand(3, length, generator=torch.Generator().manual_seed(sum(counts))) < 0.3
            for row, count in enumerate(counts):
                junk[row, :count] = tokens[row, 37 : 37 + count]
                opens[row, :count] = False
            rolled = model(junk, before, opens=opens).commit(torch.tensor(counts))
            for row, count in enumerate(counts):
                one = torch.tensor([row])
                assert_states(read[count].rows(one), rolled.rows(one), f"row {row} of {counts}")


@pytest.mark.parametrize("variant", VARIANTS)
@torch.no_grad()
def test_padding_and_idle_rows_are_the_same_function(variant):
    model, tokens = build(variant), text(8, rows=4)
    lengths = torch.tensor([LENGTH, 1, 33, 48])
    out = model(tokens, lengths=lengths)
    for row, length in enumerate(lengths.tolist()):
        alone = model(tokens[row : row + 1, :length])
        assert_outputs(views(alone), cut(views(out), slice(row, row + 1), slice(length)), f"row {row}")
        assert_states(alone.state, out.state.rows(torch.tensor([row])), f"row {row}")
    idle = model(tokens[:, :1], out.state, lengths=torch.tensor([1, 0, 1, 0])).state
    still = torch.tensor([1, 3])
    assert_states(out.state.rows(still), idle.rows(still), "idle rows")


def decoded(model, tokens: torch.Tensor, prompt: int, drafts: int) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Hidden states of what follows a prompt, some tokens a cycle, after which come drafts that are rejected; and the
    working memory after it.
    """
    config, place_B, found = model.config, torch.arange(len(tokens)), []
    pool = Pool(model, len(tokens), LENGTH + 1 if config.remembered is None else config.remembered + 1 + drafts)
    rows = pool.take(place_B, read_slots=False, whole=False).rows
    pool.load(place_B, Held(model(tokens[:, :prompt]).state, rows))
    junk, first = text(11, rows=len(tokens), documents=False), prompt
    while first < 40:
        count = min(1 + first % (1 + drafts), config.segment - first % config.segment)
        chunk = torch.cat([tokens[:, first : first + count], junk[:, : 1 + drafts - count]], 1)
        held = pool.take(place_B, read_slots=False, whole=False)
        out = model.decode(chunk, held.state, Call(1.0, Rounds(torch.full_like(place_B, 2), 2)), opening=True)
        found.append(out.hidden[:, :count])
        pool.put(place_B, held, Held(commit(out.chunk, torch.full_like(place_B, count)), held.rows))
        first += count
    memory = pool.held.state.part("memory")
    return torch.cat(found, 1), None if memory is None else memory.matrix_BNHU


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("drafts", [0, 3, FEW - 1])
@torch.no_grad()
def test_decoding_equals_the_full_forward(variant, drafts, monkeypatch):
    """Also where the memory takes a few tokens for a chunk like any other."""
    model, tokens = build(variant), text(10, rows=3, documents=False)
    for few in (FEW, 0):
        monkeypatch.setattr(working_memory, "FEW", few)
        hidden, memory = decoded(model, tokens, 13, drafts)
        full = model(tokens[:, : 13 + hidden.shape[1]], think=2 if model.idea("thoughts") else None)
        assert_outputs({"hidden": full.hidden[:, 13:]}, {"hidden": hidden}, (drafts, few))
        if memory is not None:
            assert_outputs({"m": full.state.part("memory").matrix_BNHU}, {"m": memory}, (drafts, few))
