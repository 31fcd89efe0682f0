"""`LeptonLM`: lm-evaluation-harness gets LEPTON's own figures."""

import pytest
import torch

pytest.importorskip("lm_eval", reason="lm_eval is not installed (extra harness)")

from lm_eval.api.instance import Instance

from lepton.data.shards import Batch
from lepton.errors import InputError
from lepton.evals.harness import LeptonLM
from lepton.evals.heldout import evaluate
from tests.cli.tiny import save_tiny

TEXT = "The quick brown fox jumps over the lazy dog. Ein süßer Käse, and 東京 too."


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("harness") / "x.pt")


def requests(kind, *arguments):
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


def logprob(model, tokenizer, context, text):
    """By one plain pass, in which the last token of a context opens a segment, as in generation."""
    before = tokenizer.encode(context) or [tokenizer.eos_id]
    ids = tokenizer.encode(context + text)
    tokens = torch.tensor([ids if context else [*before, *ids]])
    opens = (torch.arange(tokens.shape[1]) == len(before) - 1)[None] & (len(before) > 1)
    with torch.no_grad():
        logs = model(tokens, opens=opens).logits[0].log_softmax(-1)
    places = range(len(before) - 1, tokens.shape[1] - 1)
    return sum(logs[place, tokens[0, place + 1]].item() for place in places)


def test_likelihoods_of_continuations(saved):
    model, tokenizer = saved
    pairs = [("The quick brown fox", " jumps over"), ("The quick brown fox", " Käse"), ("", "Ein"), ("dog.", " The")]
    found = LeptonLM(model, tokenizer).loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (context, text), (value, greedy) in zip(pairs, found, strict=True):
        assert value == pytest.approx(logprob(model, tokenizer, context, text), rel=1e-6)
        assert isinstance(greedy, bool)


def test_the_text_of_greedy_decoding_is_greedy(saved):
    model, tokenizer = saved
    text = model.generate_with_stats(tokenizer.encode("Ein"), 4, temperature=0).tokens
    pairs = [([*tokenizer.encode("Ein")], text[len(tokenizer.encode("Ein")) :])]
    found = LeptonLM(model, tokenizer)._loglikelihood_tokens([(None, *pair) for pair in pairs], disable_tqdm=True)
    assert found[0][1] is True


def test_rolling_likelihoods_are_what_eval_measures(saved):
    """Whole texts, however long: nothing is cut into windows."""
    model, tokenizer = saved
    texts = [TEXT, TEXT * 30, "fox", ""]
    found = LeptonLM(model, tokenizer, 3).loglikelihood_rolling(
        requests("loglikelihood_rolling", *((text,) for text in texts)), disable_tqdm=True
    )
    for text, value in zip(texts, found, strict=True):
        row = torch.tensor([[tokenizer.eos_id, *tokenizer.encode(text)]])
        if text:
            own = evaluate(model, [Batch(row, torch.tensor([row.shape[1]]))], tokenizer)
            assert value == pytest.approx(-own.nats, rel=1e-6)
    assert found[-1] == 0


def test_answers_end_before_their_texts(saved):
    model, tokenizer = saved
    ids = tokenizer.encode("The quick")
    whole = tokenizer.decode(model.generate(ids, 30, temperature=0)[len(ids) :])
    end = whole[3:6]
    asked = requests(
        "generate_until",
        ("The quick", {"until": [end], "max_gen_toks": 30}),
        ("The quick", {"until": end, "max_gen_toks": 30, "do_sample": False, "temperature": 0.7}),
        ("The quick", {"until": [], "max_gen_toks": 30}),
        ("", {"until": ["\n\n"], "max_gen_toks": 3, "do_sample": True, "temperature": 1.0, "top_p": 0.9, "seed": 3}),
    )
    first, second, third, fourth = LeptonLM(model, tokenizer).generate_until(asked, disable_tqdm=True)
    assert first == second == whole[: whole.index(end)]
    assert third == whole
    drawn = model.generate([0], 3, temperature=1.0, top_p=0.9, seed=3)[1:]
    assert fourth == tokenizer.decode(drawn).split("\n\n")[0]


def test_options_of_the_model_are_handed_on(saved):
    model, tokenizer = saved
    asked = requests("loglikelihood", ("The quick brown", " fox"))
    usual, shallow, calm = (
        LeptonLM(model, tokenizer, **options).loglikelihood(asked, disable_tqdm=True)[0][0]
        for options in ({}, {"depth": 0.2}, {"think": 0})
    )
    assert len({usual, shallow, calm}) == 3
    answer = requests("generate_until", ("The quick", {"max_gen_toks": 20}))
    ids = tokenizer.encode("The quick")
    own = tokenizer.decode(model.generate(ids, 20, temperature=0, think=0, depth=0.2)[len(ids) :])
    assert LeptonLM(model, tokenizer, think=0, depth=0.2).generate_until(answer, disable_tqdm=True) == [own]


def test_what_it_does_not_have_is_said(saved):
    lm = LeptonLM(*saved)
    with pytest.raises(InputError, match=r"the task sets repetition_penalty=1\.2 .* leave it out"):
        lm.generate_until(requests("generate_until", ("a", {"repetition_penalty": 1.2})), disable_tqdm=True)
    with pytest.raises(InputError, match="no chat template"):
        lm.apply_chat_template([{"role": "user", "content": "Hello"}])
    assert lm.tokenizer_name == f"lepton-{saved[1].hash[:16]}"
