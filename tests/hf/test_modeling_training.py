"""Training by `Trainer` of transformers."""

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DataCollatorForLanguageModeling,
    Trainer,
    TrainingArguments,
)

from lepton.hf.conversion import to_lepton
from tests.cli.tiny import TEXT, run, save_tiny
from tests.hf.small import CLOSE, pair, text

pytest.importorskip("accelerate", reason="accelerate is not installed (extra hf)")


def trainer(model, folder, tokenizer=None, data=None, **options):
    collator = None if tokenizer is None else DataCollatorForLanguageModeling(tokenizer, mlm=False)
    settings = {
        "output_dir": str(folder),
        "max_steps": 10,
        "per_device_train_batch_size": 4,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return Trainer(
        model=model,
        args=TrainingArguments(**settings | options),
        train_dataset=data,
        data_collator=collator,
        processing_class=tokenizer,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("training")
    save_tiny(path / "final.pt")
    assert run("export", "--to", "hf", "--checkpoint", path / "final.pt", "--out", path / "hf")[0] == 0
    return path / "hf"


def test_ten_steps_lower_the_loss_and_the_result_is_a_model_of_lepton(folder, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    before = {name: value.clone() for name, value in model.named_parameters()}
    lines = [line for line in TEXT.splitlines() if line]
    data = [tokenizer(line[start:]) for line in lines for start in range(0, 40, 3)]
    training = trainer(model, tmp_path, tokenizer, data)
    training.train()
    losses = [entry["loss"] for entry in training.state.log_history if "loss" in entry]
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 0.3, losses
    still = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    assert still == [], "each parameter has a gradient, those of the ideas too"
    training.save_model(str(tmp_path / "trained"))
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "trained")
    ids = torch.tensor([tokenizer.encode("The quick brown fox")])
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, to_lepton(model)(ids).logits, **CLOSE)
    assert AutoTokenizer.from_pretrained(tmp_path / "trained").encode("fox") == tokenizer.encode("fox")


def test_evaluation_is_the_cross_entropy(folder, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    data = [tokenizer(TEXT.splitlines()[0])]
    found = trainer(model, tmp_path, tokenizer, data).evaluate(data)
    ids = torch.tensor([data[0]["input_ids"]])
    assert found["eval_loss"] == pytest.approx(model(ids, labels=ids).loss.item(), abs=1e-5)


def test_accumulated_steps_are_one_large_step(tmp_path):
    data = [{"input_ids": row, "labels": row} for row in text(20, rows=4)]
    losses = []
    for size, steps in ((4, 1), (1, 4)):
        _, wrapped = pair("dense", torch.float32)  # without ideas, which sample their positions from each batch
        options = {"per_device_train_batch_size": size, "gradient_accumulation_steps": steps, "max_steps": 3}
        training = trainer(wrapped, tmp_path, data=data, **options)
        training.train()
        losses.append([entry["loss"] for entry in training.state.log_history if "loss" in entry])
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)


def test_activations_may_be_computed_again():
    tokens, found = text(20, rows=4), []
    for again in (False, True):
        model, wrapped = pair()
        wrapped.train()
        if again:
            wrapped.activation_checkpointing_enable()
        assert wrapped.network.checkpoint_activations is again
        wrapped(tokens, labels=tokens).loss.backward()
        found.append({name: value.grad for name, value in model.named_parameters()})
    for name, value in found[0].items():
        torch.testing.assert_close(found[1][name], value, rtol=1e-5, atol=1e-6)
