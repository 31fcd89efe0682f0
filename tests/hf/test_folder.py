"""`write_folder`, and `python -m lepton export --to hf`: what transformers reads from a folder."""

import json

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from lepton.api import Lepton
from lepton.errors import InputError
from lepton.hf.folder import write_folder
from tests.cli.tiny import run, run_json, save_tiny, tiny_model
from tests.hf.small import CLOSE

FILES = {"README.md", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json"}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "final.pt"
    return path, *save_tiny(path, size="nano", step=1234)


@pytest.fixture(scope="module")
def folder(saved, tmp_path_factory):
    out = tmp_path_factory.mktemp("hf") / "model"
    assert run("export", "--to", "hf", "--checkpoint", saved[0], "--out", out)[0] == 0
    return out


def test_transformers_reads_the_folder(saved, folder):
    _, model, tokenizer = saved
    assert {*FILES} <= {path.name for path in folder.iterdir()}
    read, fast = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = fast("The quick brown fox", return_tensors="pt").input_ids
    assert ids[0].tolist() == tokenizer.encode("The quick brown fox")
    with torch.no_grad():
        torch.testing.assert_close(read(ids).logits, model(ids).logits, **CLOSE)
    for name, value in model.state_dict().items():
        assert torch.equal(read.network.state_dict()[name], value), name


def test_generation_has_the_defaults_of_lepton(folder):
    found = GenerationConfig.from_pretrained(folder)
    assert (found.do_sample, found.temperature, found.top_p, found.top_k) == (True, 0.8, 0.9, 0)
    assert (found.max_new_tokens, found.bos_token_id, found.eos_token_id, found.pad_token_id) == (100, 0, 0, 1)
    assert AutoModelForCausalLM.from_pretrained(folder).generation_config.to_dict() == found.to_dict()


def test_half_precision_keeps_the_buffers(saved, tmp_path):
    path, model, _ = saved
    figures = run_json("export", "--to", "hf", "--checkpoint", path, "--out", tmp_path / "half", "--dtype", "bf16")
    assert (figures["params"], figures["dtype"]) == (model.num_params(), "bf16")
    assert figures["bytes"] == sum(file.stat().st_size for file in (tmp_path / "half").iterdir())
    read = AutoModelForCausalLM.from_pretrained(tmp_path / "half")
    for name, value in model.named_parameters():
        assert torch.equal(read.network.get_parameter(name), value.bfloat16()), name
    for name, value in model.named_buffers():
        assert torch.equal(read.network.get_buffer(name), value), name
    with torch.no_grad():
        assert read(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


def test_files_that_are_there_are_kept_without_force(saved, tmp_path, monkeypatch):
    command = ("export", "--to", "hf", "--checkpoint", saved[0], "--out")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "notes.md").write_text("mine")
    for out, message in ((tmp_path / "file", "is a file: name a folder"), (tmp_path, "has files: give another")):
        code, _, err = run(*command, out)
        assert (code, len(err.splitlines())) == (2, 1)
        assert message in err
    assert {path.name for path in tmp_path.iterdir()} == {"file", "notes.md"}
    monkeypatch.chdir(tmp_path)
    assert run(*command, ".", "--force")[0] == 0
    assert (tmp_path / "notes.md").read_text() == "mine"
    assert {*FILES} <= {path.name for path in tmp_path.iterdir()}
    assert not [path for path in tmp_path.parent.iterdir() if path.name.startswith(".")]
    assert len({(tmp_path / name).stat().st_mode for name in FILES}) == 1


def test_what_cannot_be_written_is_one_line(saved, tmp_path):
    (tmp_path / "file").write_text("mine")
    code, _, err = run("export", "--to", "hf", "--checkpoint", saved[0], "--out", tmp_path / "file" / "deeper")
    assert (code, len(err.splitlines())) == (2, 1)
    assert "cannot write" in err


def test_a_model_without_a_tokenizer_has_a_folder_without_one(tmp_path):
    out = write_folder(tiny_model(), tmp_path / "bare", tokenizer=None)
    assert not (out / "tokenizer.json").exists()
    fields = json.loads((out / "config.json").read_text(encoding="utf-8"))
    assert (fields["model_type"], fields["pad_token_id"]) == ("lepton", 0)
    assert AutoModelForCausalLM.from_pretrained(out).config.shape == tiny_model().config
    with pytest.raises(InputError, match="has files"):
        write_folder(tiny_model(), out, tokenizer=None)
    assert isinstance(tiny_model(), Lepton)
