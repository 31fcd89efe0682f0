"""There and back: the same tensors behind either interface."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from lepton.api import Lepton
from lepton.errors import InputError
from lepton.hf.configuration import LeptonHFConfig
from lepton.hf.conversion import from_lepton, save_checkpoint, to_lepton
from lepton.hf.modeling import LeptonForCausalLM
from lepton.hf.tokenizer import as_fast_tokenizer
from tests.cli.tiny import run, save_tiny
from tests.hf.small import CLOSE, pair, text


def test_both_have_the_same_tensors_and_texts():
    model, wrapped = pair()
    back = to_lepton(wrapped)
    for name, value in model.state_dict().items():
        assert wrapped.network.state_dict()[name].data_ptr() == value.data_ptr() == back.state_dict()[name].data_ptr()
    assert back.generate([5, 9, 33], 20, temperature=0) == model.generate([5, 9, 33], 20, temperature=0)
    assert (wrapped.training, back.training) == (False, False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_saved_model_is_the_same_when_it_is_read(tmp_path, dtype):
    model, wrapped = pair(dtype=dtype)
    wrapped.save_pretrained(tmp_path)
    read, notes = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(map(len, notes.values())), notes
    assert type(read) is LeptonForCausalLM
    for name, value in model.state_dict().items():
        found = read.network.state_dict()[name]
        kept = name in dict(model.named_parameters()) or not value.is_floating_point()
        assert found.dtype == (value.dtype if kept else torch.float32), name
        assert torch.equal(found.to(value.dtype), value), name
    with torch.no_grad():
        torch.testing.assert_close(read(text(20)).logits, model(text(20)).logits, **CLOSE)


def test_weights_that_are_missing_are_named(tmp_path):
    _, wrapped = pair()
    weights = {name: value for name, value in wrapped.state_dict().items() if "memory" not in name}
    wrapped.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(InputError, match="the weights lack 'memory"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_model_from_a_configuration_alone_has_first_weights():
    config = LeptonHFConfig(lepton=pair()[0].config.to_dict())
    model = AutoModelForCausalLM.from_config(config)
    assert 0 < model.network.embed.weight.std() < 1
    assert model.network.router.quantiles.isfinite().all()
    assert model.loss_function is not None
    assert from_lepton(model.network).config.shape == config.shape


@pytest.mark.parametrize("name", ["back.pt", "back.safetensors"])
def test_a_model_goes_back_to_the_commands_of_lepton(tmp_path, name):
    model, tokenizer = save_tiny(tmp_path / "final.pt")
    save_checkpoint(from_lepton(model), tmp_path / name, as_fast_tokenizer(tokenizer))
    flags = ["--dtype", "fp32", "--prompt", "fox", "--seed", 1, "--max_new_tokens", 6]
    texts = [run("generate", "--checkpoint", tmp_path / path, *flags)[1] for path in ("final.pt", name)]
    assert texts[0] == texts[1] != ""
    assert Lepton.from_checkpoint(tmp_path / name).tokenizer.hash == tokenizer.hash
    save_checkpoint(from_lepton(model), tmp_path / name)
    assert Lepton.from_checkpoint(tmp_path / name).tokenizer is None
