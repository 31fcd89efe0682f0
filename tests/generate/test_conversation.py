"""A conversation draws from what the model says of the whole of it, and reads each token about once."""

import pytest
import torch

from lepton.data.chat import ChatTemplate, Message
from lepton.data.tokenizer import Tokenizer
from lepton.engine.options import GenerationOptions
from lepton.errors import InputError
from lepton.generate.conversation import Conversation
from tests.cli.tiny import small_bpe, tiny_model

QUESTIONS = ["The quick fox?", "Ein Käse, süß", "over the lazy dog"]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_json(small_bpe().to_str())


@pytest.fixture(scope="module")
def model():
    return tiny_model().eval()


class Transcript:
    """What a model is to have read, with the tokens that open segments and those that it drew."""

    def __init__(self, tokenizer):
        self.template, self.eos = ChatTemplate(tokenizer), tokenizer.eos_id
        self.ids, self.opens, self.drawn = [], [], []

    def read(self, ids):
        self.ids += ids
        self.opens += [False] * len(ids)

    def turn(self, question, answer):
        self.read(self.template.prompt([Message("user", question)]))
        self.opens[-1] = True
        self.drawn.append((len(self.ids), answer))
        self.read([*answer, *self.template._after])

    def assert_same(self, model, state):
        """One pass over all draws the same tokens, and what follows `state` is predicted as after that pass."""
        with torch.no_grad():
            logits = model(torch.tensor([self.ids]), opens=torch.tensor([self.opens])).logits[0]
        for start, answer in self.drawn:
            assert logits[start - 1 : start - 1 + len(answer)].argmax(-1).tolist() == answer
        read, probe = int(state.position_B), torch.arange(100, 120)[None]
        assert read == self.drawn[-1][0] + len(self.drawn[-1][1]) - 1
        with torch.no_grad():
            whole = model(torch.tensor([self.ids[:read]]), opens=torch.tensor([self.opens[:read]])).state
            torch.testing.assert_close(model(probe, state).logits, model(probe, whole).logits, rtol=1e-4, atol=1e-4)


def greedy(**changes):
    return GenerationOptions(**({"temperature": 0.0, "max_new_tokens": 9} | changes))


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_answers_are_those_of_one_pass_over_the_whole_conversation(model, tokenizer, system):
    talk, transcript = Conversation(model, tokenizer, greedy(), system=system), Transcript(tokenizer)
    if system:
        transcript.read(transcript.template.message(Message("system", system)))
    for question in QUESTIONS:
        answer = [token for token, _ in talk.answer(question)]
        assert len(answer) == 9
        transcript.turn(question, answer)
    transcript.assert_same(model, talk.state)


@pytest.mark.parametrize("taken", [0, 1, 4])
def test_an_answer_that_is_left_early_is_as_long_as_what_was_taken(model, tokenizer, taken):
    talk, transcript = Conversation(model, tokenizer, greedy(max_new_tokens=30)), Transcript(tokenizer)
    for question in QUESTIONS:
        stream = talk.answer(question)
        answer = [next(stream)[0] for _ in range(taken + 1)]
        stream.close()
        transcript.turn(question, answer)
    transcript.assert_same(model, talk.state)


def test_the_end_of_a_message_is_read_but_not_yielded(model, tokenizer):
    """Nearly uniform draws: END comes after some hundred tokens."""
    template, lengths = ChatTemplate(tokenizer), []
    talk = Conversation(model, tokenizer, GenerationOptions(temperature=1000.0, top_p=1.0, max_new_tokens=1500, seed=1))
    position = 0
    for question in QUESTIONS:
        answer = [token for token, _ in talk.answer(question)]
        assert template.end_id not in answer
        assert tokenizer.eos_id not in answer
        lengths.append(len(answer))
        position += len(template.prompt([Message("user", question)])) + len(answer)
        assert talk.state.position_B.tolist() == [position]
        position += len(template._after)
    assert max(lengths) < 1499
    assert len(set(lengths)) == 3, "each answer has random numbers of its own"


def test_a_turn_costs_its_new_tokens_alone(model, tokenizer, monkeypatch):
    talk, read = Conversation(model, tokenizer, greedy(use_speculative=False)), []
    trunk = model.trunk
    monkeypatch.setattr(model, "trunk", lambda tokens, *a, **k: read.append(tokens.numel()) or trunk(tokens, *a, **k))
    costs = []
    for _ in range(4):
        read.clear()
        list(talk.answer(QUESTIONS[0]))
        costs.append(sum(read))
    assert costs[1] == costs[2] == costs[3]
    prompt = len(ChatTemplate(tokenizer).prompt([Message("user", QUESTIONS[0])]))
    assert costs[3] <= 2 * (prompt + 9 + 3)


def test_memory_of_another_conversation(model, tokenizer):
    first = Conversation(model, tokenizer, greedy())
    list(first.answer(QUESTIONS[0]))
    remembering, fresh = (
        Conversation(model, tokenizer, greedy(), memory=memory) for memory in (first.state.memory, None)
    )
    matrices = []
    for talk in (remembering, fresh):
        list(talk.answer(QUESTIONS[1]))
        matrices.append(talk.state.part("memory").matrix_BNHU)
    assert not torch.allclose(*matrices)


def test_uncertainty_comes_with_each_token(model, tokenizer):
    answer = list(Conversation(model, tokenizer, greedy(), uncertainty=True).answer("fox"))
    assert all(0 < uncertainty < 1 for _, uncertainty in answer)


def test_stop_is_refused(model, tokenizer):
    with pytest.raises(InputError, match="stop: an answer ends where the model ends its message"):
        Conversation(model, tokenizer, greedy(stop=[3]))
