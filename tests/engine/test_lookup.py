"""Drafts by lookup: against a loop over the text, and in the engine."""

import pytest
import torch

from lepton.engine import cycle
from lepton.engine.engine import Engine
from lepton.engine.lookup import NOTHING, REMEMBERED, appended, looked_up, remembered
from lepton.engine.options import GenerationOptions
from lepton.engine.runner import Runner
from lepton.engine.sequence import Sequence
from lepton.ops.choose import stream_words
from tests.engine.repeats import found_by_loop
from tests.generate.models import always_drafting, enlivened
from tests.laws.lab import build

CPU = torch.device("cpu")
OWN = 77
"""What the cell drafts."""
NEVER = 0
EOS = 0


def proposals(text, drafts=4):
    return looked_up(remembered([text], CPU), torch.full((1, drafts), OWN), NEVER)[0].tolist()


def by_loop(text, drafts):
    return found_by_loop(text, drafts, NEVER) or [OWN] * drafts


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ([5, 1, 2, 3, 4, 9, 8, 1, 2, 3, 4], [9, 8, 1, 2]),
        ([1, 2, 3, 4, 6, 1, 2, 3, 4, 7, 8, 9, 6, 1, 2, 3, 4], [7, 8, 9, 6]),  # the latest place counts
        ([1, 2, 1, 2, 1, 2], [1, 2, 1, 2]),  # a circle goes on
        ([3] * 5, [3] * 4),
        ([3] * 4, [OWN] * 4),  # nothing but the newest tokens themselves
        ([1, 2, 3, 9, 1, 2, 3], [OWN] * 4),  # three tokens are too few
        ([3, 3], [OWN] * 4),  # the places before the text are no tokens
        ([7, 1, 2, 3, 4, NEVER, 5, 1, 2, 3, 4], [OWN] * 4),
    ],
)
def test_by_hand(text, expected):
    assert proposals(text) == expected == by_loop(text, 4)


def test_against_a_loop():
    generator = torch.Generator().manual_seed(0)
    texts = [torch.randint(0, 3, (n,), generator=generator).tolist() for n in (1, 4, 9, 40, 300, 1500)]
    for drafts in (1, 2, 4, 7):
        assert [proposals(text, drafts) for text in texts] == [by_loop(text, drafts) for text in texts]
    alone = torch.cat([looked_up(remembered([text], CPU), torch.full((1, 4), OWN), NEVER) for text in texts])
    assert torch.equal(looked_up(remembered(texts, CPU), torch.full((6, 4), OWN), NEVER), alone)


def test_only_the_newest_tokens_are_remembered():
    text = list(range(1, REMEMBERED + 9))
    assert remembered([text], CPU)[0].tolist() == text[8:]
    assert remembered([[4, 5]], CPU)[0].tolist() == [NOTHING] * (REMEMBERED - 2) + [4, 5]
    assert remembered([[]], CPU)[0].tolist() == [NOTHING] * REMEMBERED
    assert proposals([1, 2, 3, 4, *range(10, REMEMBERED + 2), 1, 2, 3, 4]) == [10, 11, 12, 13]
    assert proposals([1, 2, 3, 4, *range(10, REMEMBERED + 3), 1, 2, 3, 4]) == [OWN] * 4


def test_appended():
    before = remembered([[1, 2], [3], [4, 5, 6]], CPU)
    after = appended(before, torch.tensor([[7, 8], [7, 8], [7, 8]]), torch.tensor([2, 1, 0]))
    assert after.dtype == before.dtype
    assert torch.equal(after, remembered([[1, 2, 7, 8], [3, 7], [4, 5, 6]], CPU))


# In the engine, with few ids, so that all texts repeat themselves

TEXTS = [[2], [1, 1, 2, EOS, 1, 1, 2, EOS, 1, 1], [1, 2, 3] * 5, [1, 2] * 600, [2] * REMEMBERED]
SAMPLINGS = [{"temperature": 0}, {"temperature": 1.0, "top_p": 0.9}]


@pytest.fixture(scope="module")
def model():
    model = enlivened(build("complete", vocab_size=4, draft_vocab=3))
    weight_VE = model.embed.weight.data
    weight_VE[EOS] *= 0.1
    weight_VE[3] = -weight_VE[1] - weight_VE[2]  # one of the three has a positive logit, so no text ends early
    return model.eval()


def test_a_place_that_is_used_again_remembers_its_new_text_alone(model):
    """Whatever lay there; and each text is the one without drafts."""
    plain, sequences = [], []
    for row, prompt in enumerate(TEXTS):
        options = SAMPLINGS[row % 2] | {"max_new_tokens": 12 + 9 * row}
        plain.append(model.generate(prompt, use_speculative=False, seed=row, **options)[len(prompt) :])
        stream = stream_words(row, 0)
        sequences.append(Sequence(prompt, GenerationOptions(**options), stops=[[EOS]], stream=stream))
    runner = Runner(model, 2, 2000)
    runner.pool.held.rows.text_BL.random_(generator=torch.Generator().manual_seed(0))
    engine, places = Engine(runner), set()
    for sequence in sequences:
        engine.add(sequence)
    with always_drafting():
        while not engine.idle:
            engine.step()
            for each in sequences:
                if each.status == "running" and each.new:
                    places.add((each, each.place))
                    known = runner.pool.held.rows.text_BL[each.place]
                    assert torch.equal(known, remembered([each.prompt + each.new], CPU)[0])
    assert [each.new for each in sequences] == plain
    assert len(places) > 2, "a place is used again"
    assert sum(engine.stats.accepted) > 30


@pytest.mark.parametrize("sampling", SAMPLINGS)
def test_no_text_depends_on_what_is_proposed(model, monkeypatch, sampling):
    """Also where the proposals are chance, or of another text."""
    options = {"max_new_tokens": 30, "seed": 1, **sampling}
    plain = model.generate(TEXTS[:3], use_speculative=False, **options)
    generator = torch.Generator().manual_seed(0)

    def by_chance(_text_BL, drafts_BY, _never):
        return torch.randint(1, 4, drafts_BY.shape, generator=generator)

    def of_another_text(text_BL, drafts_BY, never):
        return looked_up(text_BL.flip(0), drafts_BY, never)

    for proposing in (by_chance, of_another_text, looked_up):
        monkeypatch.setattr(cycle, "looked_up", proposing)
        with always_drafting():
            assert model.generate(TEXTS[:3], **options) == plain
