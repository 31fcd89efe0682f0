"""Fine-tuning on conversations: loss on the answers alone, each of which opens its own thoughts."""

import io
import json

import pytest
import torch

from lepton import checkpoint
from lepton.api import Lepton
from lepton.config import LeptonConfig
from lepton.data.chat import ChatTemplate, Message
from lepton.data.chat_shards import prepare_chat
from lepton.data.shards import Batch, ShardedDataset
from lepton.data.tokenizer import Tokenizer
from lepton.errors import InputError
from lepton.train.batch_plan import plan_batch
from lepton.train.held_out_loss import HeldOutLoss
from lepton.train.micro_step import MicroStep
from lepton.train.sample import beginning, sample_text
from lepton.train.trainer import train
from lepton.train.validation import validation_loss
from tests.cli.tiny import small_bpe
from tests.train.small import SHAPE, metrics_of, small_settings
from tests.train.test_held_out_loss import Recorded
from tests.train.test_micro_step import strictly

ROW_LEN = 97
TALKS = [
    [Message("user", f"What is {name}?"), Message("assistant", f"{answer}.")]
    for name, answer in {
        "the fox": "Quick", "the dog": "Lazy", "a jump": "Brown", "ein Käse": "Süßer", "two": "One and one",
        "over": "The lazy fox", "three": "Two and one", "a cat": "No dog",
    }.items()
]  # fmt: skip
LONG_TALKS = [[*TALKS[i], *TALKS[(i + 1) % 8]] for i in range(8)]


@pytest.fixture(scope="module")
def tokenizer():
    return Tokenizer.from_json(small_bpe().to_str())


@pytest.fixture(scope="module")
def chats(tmp_path_factory, tokenizer):
    """The data of conversations, with their tokenizer beside them."""
    folder = tmp_path_factory.mktemp("chats")
    lines = [json.dumps({"messages": [each._asdict() for each in talk]}) for talk in TALKS + LONG_TALKS]
    (folder / "chats.jsonl").write_text("\n".join(lines))
    prepare_chat([folder / "chats.jsonl"], folder / "data", tokenizer, row_len=ROW_LEN, val_fraction=0.01)
    (folder / "tokenizer.json").write_text(tokenizer.to_json())
    return folder


def opened(chats, split="train", seq_len=ROW_LEN - 1):
    return ShardedDataset(chats / "data", seq_len=seq_len, seed=0, split=split, vocab_size=300)


def alone(model, tokenizer, talk):
    """Nats of the answers of one conversation, summed, and their number: read turn by turn, as in a chat."""
    template = ChatTemplate(tokenizer)
    nats, count, state = 0.0, 0, None
    for i in range(0, len(talk), 2):
        prompt = template.prompt(talk[i : i + 1])
        answer = [*tokenizer.encode(talk[i + 1].content), template.end_id]
        ids = torch.tensor([prompt + answer + template.closing(template.end_id, 0)[1:]])
        opens = torch.zeros_like(ids, dtype=torch.bool)
        opens[0, len(prompt) - 1] = True
        out = model(ids, state, opens=opens)
        log_p = out.logits[0, len(prompt) - 1 :].log_softmax(-1)
        nats -= float(log_p[range(len(answer)), answer].sum())
        count, state = count + len(answer), out.state
    return nats, count


def test_packed_conversations_have_the_loss_of_each_alone_turn_by_turn(chats, tokenizer, model):
    model.double().eval()
    nats = targets = 0.0
    for split in ("train", "val"):
        data = opened(chats, split)
        batch = data.batch(0, batch_size=data.windows)
        loss = model.loss(batch.tokens, lengths=batch.lengths, targets=batch.targets, opens=batch.opens)
        nats, targets = nats + float(loss.parts["ce"]) * batch.counted, targets + batch.counted
        assert (batch.opens.sum(1) > 1).any(), "rows hold several answers"
    with torch.no_grad():
        each = [alone(model, tokenizer, talk) for talk in TALKS + LONG_TALKS]
    assert targets == sum(count for _, count in each)
    assert nats == pytest.approx(sum(nats for nats, _ in each), rel=1e-9)
    closed = model.loss(batch.tokens, lengths=batch.lengths, targets=batch.targets)
    assert float(closed.parts["ce"]) != pytest.approx(float(loss.parts["ce"]), rel=1e-6), "thoughts open at answers"


def test_a_micro_batch_takes_the_openings(chats, model):
    batch = opened(chats).batch(0, batch_size=4)
    model.loss(batch.tokens, lengths=batch.lengths, targets=batch.targets, opens=batch.opens, think=1).loss.backward()
    expected = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad(set_to_none=False)
    _, groups = plan_batch(model, batch.tokens, 0, 0, 0, batch.opens)
    think = torch.ones(4, dtype=torch.int64)
    micro_step = MicroStep(model, compiled=False)
    micro_step.prepare(4, ROW_LEN - 1, answers=True)
    micro_step(batch.tokens, batch.lengths, think, groups, 1.0, batch.targets, batch.opens)
    found = [parameter.grad for parameter in model.parameters()]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_bound_on_segments_has_room_for_the_openings_of_answers(model):
    tokens = torch.ones(2, 65, dtype=torch.int64)
    targets = (torch.arange(64) % 2 == 1).expand(2, 64)
    opens = Batch(tokens, torch.tensor([65, 65]), targets).opens
    assert opens.sum(1).tolist() == [32, 32]
    _, usual = plan_batch(model, tokens, 0, 0, 0)
    _, groups = plan_batch(model, tokens, 0, 0, 0, opens)
    assert groups >= 33 > usual
    model.loss(tokens, targets=targets, opens=opens, groups=groups)


def test_samples_answer_the_first_question(chats, tokenizer, model):
    text = tokenizer.decode(beginning(opened(chats)))
    assert text.startswith("User:\nWhat is ")
    assert text.endswith("?\nAssistant:\n")
    assert text.count("Assistant") == 1
    shown = sample_text(model, opened(chats), tokenizer, prompt=None, max_new_tokens=3, seed=0)
    assert shown.startswith(text)


@pytest.mark.gpu
@pytest.mark.parametrize("compiled", [False, True])
def test_captured_micro_batches_of_conversations_have_the_gradients_of_plain_ones(chats, model, compiled):
    """Of several, so that the graph reads other targets and openings than those it was captured with."""
    model.cuda()
    found = []
    for captured in (False, True):
        micro_step = MicroStep(model, compiled=compiled and captured, captured=captured, say=strictly)
        micro_step.prepare(4, ROW_LEN - 1, answers=True)
        model.zero_grad(set_to_none=False)
        for step in range(3):
            batch = opened(chats).batch(step, batch_size=4)
            _, groups = plan_batch(model, batch.tokens, 0, step, 0, batch.opens)
            think = torch.ones(4, dtype=torch.int64)
            micro_step(batch.tokens, batch.lengths, think, groups, 0.25, batch.targets, batch.opens)
        found.append([parameter.grad.clone() for parameter in model.parameters()])
        loss = HeldOutLoss(model, micro_step.graphs, strictly)
        found[-1] += [loss(*batch).clone() for batch in opened(chats).batches(4)]
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-5)


def test_validation_counts_the_answers_alone(chats, tokenizer, model):
    data = opened(chats)
    plain = HeldOutLoss(model, None, print)
    found, _ = validation_loss(model, data, tokenizer, batch_size=3, limit=None, loss_of=plain)
    nats = sum(
        float(model.loss(b.tokens, lengths=b.lengths, targets=b.targets, opens=b.opens).parts["ce"]) * b.counted
        for b in data.batches(2)
    )
    assert found == pytest.approx(nats / sum(batch.counted for batch in data.batches(2)), rel=1e-5)
    recorded = HeldOutLoss(model, Recorded(), print)
    assert validation_loss(model, data, tokenizer, batch_size=3, limit=None, loss_of=recorded)[0] == pytest.approx(
        found, rel=1e-5
    )


@pytest.fixture(scope="module")
def base(chats, tmp_path_factory):
    """A checkpoint to begin from."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("base") / "final.pt"
    model = Lepton(LeptonConfig.from_dict({**SHAPE, "segment": 16, "window": 32}))
    tokenizer = (chats / "tokenizer.json").read_text()
    payload = {"model": model.state_dict(), "config": model.config.to_dict(), "size": None, "tokenizer": tokenizer}
    checkpoint.save(path, {**payload, "step": 7})
    return path


def tuning(chats, base, out, **changes):
    usual = {"model_size": None, "overrides": {}, "tokenizer": None, "init_from": str(base), "seq_len": ROW_LEN - 1}
    return small_settings(chats / "data", out, **(usual | changes))


def test_toy_conversations_are_answered_word_for_word(chats, base, tokenizer, tmp_path):
    """Also those of two turns, of which the second continues the state of the first."""
    settings = tuning(
        chats, base, tmp_path / "out", max_steps=150, batch_size=8, lr=0.01, eval_every=150, save_every=150
    )
    model = Lepton.from_checkpoint(train(settings, stream=io.StringIO()))
    template, right = ChatTemplate(tokenizer), 0
    losses = [entry["loss"] for entry in metrics_of(tmp_path / "out") if "loss" in entry]
    assert losses[-1] < 0.1 < losses[0]
    trained = {text for text, _ in _documents(chats, tokenizer)}
    for talk in TALKS + LONG_TALKS:
        if _text(talk) not in trained:
            continue
        state, before = None, []
        for i in range(0, len(talk), 2):
            prompt = before + template.prompt(talk[i : i + 1])
            ids, state = model.generate_with_state(prompt, 30, temperature=0.0, stop=template.end_id, state=state)
            right += tokenizer.decode(ids[len(prompt) :]) == talk[i + 1].content
            before = template.closing(ids[-1], tokenizer.eos_id)
    assert right == sum(text.count("Assistant:") for text in trained)


def _text(talk):
    return "".join(f"{message.role.title()}:\n{message.content}\n" for message in talk)


def _documents(chats, tokenizer):
    data = opened(chats)
    for batch in data.batches(1):
        ids = batch.tokens[0, : batch.lengths[0]].tolist()
        while 0 in ids:
            end = ids.index(0)
            yield tokenizer.decode(ids[:end]), end
            ids = ids[end + 1 :]


def test_a_run_begins_with_the_weights_and_a_fresh_schedule(chats, base, tmp_path):
    out = tmp_path / "out"
    path = train(tuning(chats, base, out, max_steps=2, lr=1e-12, muon_lr=1e-12), stream=io.StringIO())
    content, before = checkpoint.load(path), checkpoint.load(base)
    assert content["step"] == 2
    assert content["data"]["chat"] == "lepton-1"
    for name, tensor in before["model"].items():
        if name.startswith(("stem", "blocks", "embed")):
            torch.testing.assert_close(content["model"][name], tensor, rtol=0, atol=1e-6)
    assert metrics_of(out)[0]["step"] == 0


def test_a_step_without_an_answer_changes_nothing_for_the_worse(chats, base, tmp_path):
    """Windows of 3 tokens: most lie within questions."""
    out = tmp_path / "out"
    train(tuning(chats, base, out, seq_len=3, batch_size=1, max_steps=12, log_every=1), stream=io.StringIO())
    losses = [entry["loss"] for entry in metrics_of(out) if "loss" in entry]
    assert len(losses) == 12
    assert all(loss == loss for loss in losses)
    assert 0 in losses


def test_conversations_of_another_tokenizer_are_refused(chats, base, tmp_path):
    metadata = json.loads((chats / "data" / "metadata.json").read_text())
    copy = tmp_path / "data"
    copy.mkdir()
    for path in (chats / "data").rglob("*.npy"):
        (copy / path.relative_to(chats / "data")).parent.mkdir(exist_ok=True)
        (copy / path.relative_to(chats / "data")).write_bytes(path.read_bytes())
    (copy / "metadata.json").write_text(json.dumps(metadata | {"tokenizer_hash": "0" * 64}))
    with pytest.raises(InputError, match="prepared with another tokenizer"):
        train(tuning(chats, base, tmp_path / "out", data_dir=str(copy)), stream=io.StringIO())
