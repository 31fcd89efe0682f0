"""Likelihoods of continuations are those of plain passes and of generation, whatever the batch."""

import pytest
import torch

from lepton.data.shards import Batch
from lepton.errors import InputError
from lepton.evals import continuations
from lepton.evals.continuations import likelihoods
from lepton.evals.heldout import evaluate
from tests.cli.tiny import save_tiny
from tests.generate.models import BATCH, PROMPT, lively


def by_hand(model, context, text, **options):
    """One plain pass over both, in which the last token of the context opens a segment."""
    tokens = torch.tensor([[*context, *text]])
    opens = (torch.arange(tokens.shape[1]) == len(context) - 1)[None] & (len(context) > 1)
    with torch.no_grad():
        logs = model(tokens, opens=opens, **options).logits[0].double().log_softmax(-1)
    places = range(len(context) - 1, len(context) + len(text) - 1)
    greedy = all(logs[place].argmax() == token for place, token in zip(places, text, strict=True))
    return sum(logs[place, token].item() for place, token in zip(places, text, strict=True)), greedy


@pytest.fixture(scope="module")
def pairs():
    """Some contexts with several continuations, of any length."""
    generator = torch.Generator().manual_seed(0)
    lengths = [1, 5, 30, 2, 0, 70]
    texts = [torch.randint(1, 97, (length,), generator=generator).tolist() for length in lengths]
    return [(context, text) for context in [*BATCH, [0]] for text in texts]


@pytest.mark.parametrize(
    ("variant", "options"),
    [("complete", {}), ("complete", {"depth": 0.4}), ("complete", {"think": 0}), ("dense", {})],
    ids=str,
)
def test_they_are_those_of_a_plain_pass(variant, options, pairs):
    model = lively(variant)
    for batch_size in (1, 7):
        found = likelihoods(model, pairs, batch_size, **options)
        for (context, text), each in zip(pairs, found, strict=True):
            logprob, greedy = by_hand(model, context, text, **options)
            assert each.logprob == pytest.approx(logprob, abs=1e-9)
            assert each.greedy is greedy


def test_they_are_those_of_generation():
    """Also past the length of a chunk; greedy text is greedy, and is not once a token is another one."""
    model = lively("complete")
    rows, logprobs = model.generate_with_logprobs(BATCH, 40, temperature=0)
    texts = [row[len(prompt) :] for row, prompt in zip(rows, BATCH, strict=True)]
    found = likelihoods(model, list(zip(BATCH, texts, strict=True)))
    for each, known in zip(found, logprobs, strict=True):
        assert each.greedy
        assert each.logprob == pytest.approx(sum(token.chosen for token in known), abs=1e-4)
    changed = [[*text[:-1], (text[-1] + 1) % 97] for text in texts]
    assert not any(each.greedy for each in likelihoods(model, list(zip(BATCH, changed, strict=True))))


def test_a_text_from_its_beginning_is_what_eval_measures(tmp_path, monkeypatch):
    monkeypatch.setattr(continuations, "CHUNK", 16)
    model, tokenizer = save_tiny(tmp_path / "x.pt")
    model = model.double()
    ids = tokenizer.encode("The quick brown fox jumps over the lazy dog. Ein Käse. " * 4)
    row = torch.tensor([[tokenizer.eos_id, *ids]])
    own = evaluate(model, [Batch(row, torch.tensor([row.shape[1]]))], tokenizer)
    (found,) = likelihoods(model, [([tokenizer.eos_id], ids)])
    assert found.logprob == pytest.approx(-own.nats, rel=1e-9)


def test_each_context_is_read_once():
    model, read = lively("complete"), []
    handle = model.embed.register_forward_hook(lambda _, given, __: read.append(given[0].numel()))
    likelihoods(model, [(PROMPT, [token]) for token in range(20)], 4)
    handle.remove()
    assert read == [len(PROMPT)]


def test_progress_and_mistakes():
    model, counts = lively("complete"), []
    likelihoods(model, [(PROMPT, [5]), ([3], [4, 5]), ([3], [])], 2, done=counts.append)
    assert sum(counts) == 3
    assert likelihoods(model, []) == []
    with pytest.raises(InputError, match="context 1 is empty"):
        likelihoods(model, [(PROMPT, [5]), ([], [5])])
