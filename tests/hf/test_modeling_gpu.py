"""On a GPU: the kernels that LEPTON runs there also run behind transformers, and say the same."""

import pytest
import torch
from transformers import Trainer, TrainingArguments

from lepton.api import create_lepton_nano
from lepton.hf.conversion import from_lepton
from tests.hf.small import left_padded

pytestmark = pytest.mark.gpu


def pair(dtype):
    torch.manual_seed(0)
    model = create_lepton_nano(vocab_size=5000)
    for parameter in model.parameters():  # what begins with zeros would hide mistakes
        parameter.data += 0.3 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    model = model.to("cuda", dtype).eval()
    return model, from_lepton(model)


def rows(*lengths):
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(1, 5000, (length,), generator=generator) for length in lengths]


@pytest.mark.parametrize(("dtype", "close"), [(torch.float32, 1e-5), (torch.bfloat16, 0.1)])
def test_logits_are_those_of_lepton_with_padding_and_in_chunks(dtype, close):
    model, wrapped = pair(dtype)
    texts = rows(700, 311, 5)
    tokens, mask = (each.cuda() for each in left_padded(texts, 1))
    with torch.no_grad():
        whole = wrapped(tokens, attention_mask=mask).logits
        cache, parts = None, []
        for start, end in ((0, 400), (400, 401), (401, 700)):
            found = wrapped(tokens[:, start:end], attention_mask=mask[:, :end], cache=cache)
            cache, _ = found.cache, parts.append(found.logits)
        for each, text, logits in zip(texts, whole, torch.cat(parts, 1), strict=True):
            own = model(each[None].cuda()).logits[0]
            torch.testing.assert_close(text[-len(each) :], own, rtol=0, atol=close)
            torch.testing.assert_close(logits[-len(each) :], own, rtol=0, atol=close)


def test_greedy_text_is_that_of_lepton():
    model, wrapped = pair(torch.float32)
    (prompt,) = rows(300)
    found = wrapped.generate(prompt[None].cuda(), do_sample=False, max_new_tokens=60, pad_token_id=1)
    assert found[0].tolist() == model.generate(prompt.tolist(), 60, temperature=0)


@pytest.mark.parametrize("bf16", [False, True])
def test_trainer_lowers_the_loss(tmp_path, bf16):
    _, wrapped = pair(torch.float32)
    data = [{"input_ids": row, "labels": row} for row in rows(*[256] * 8)]
    settings = TrainingArguments(
        str(tmp_path),
        max_steps=20,
        per_device_train_batch_size=8,
        learning_rate=1e-3,
        lr_scheduler_type="constant",
        logging_steps=1,
        report_to=[],
        save_strategy="no",
        bf16=bf16,
        disable_tqdm=True,
    )
    training = Trainer(wrapped, settings, train_dataset=data)
    training.train()
    losses = [entry["loss"] for entry in training.state.log_history if "loss" in entry]
    assert losses[-1] < losses[0] - 0.2, losses
