"""`python -m lepton export`: the weights alone, and who reads them."""

import pytest
import torch

from lepton import checkpoint
from lepton.api import Lepton, create_lepton_nano
from tests.cli.tiny import run, run_json, save_tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "final.pt"
    model, tokenizer = save_tiny(path, optimizer={"kind": "muon", "states": {"x": torch.zeros(10**5)}})
    with torch.no_grad():  # calibrated, and a drafter with ids of its own
        model.router.quantiles.copy_(torch.linspace(-3, 2, 65))
        model.uncertainty.calibration.copy_(torch.tensor([1.1, -0.3]))
        model.drafter.ids.copy_(torch.arange(300, 100, -1))
    checkpoint.save(path, checkpoint.load(path) | {"model": model.state_dict()})
    return path, model, tokenizer


def test_full_precision_is_exact_and_smaller(saved, tmp_path):
    path, model, tokenizer = saved
    figures = run_json("export", "--checkpoint", path, "--out", tmp_path / "w.safetensors")
    assert figures["params"] == model.num_params()
    assert figures["bytes"] == (tmp_path / "w.safetensors").stat().st_size < path.stat().st_size / 2
    loaded, content = Lepton.from_checkpoint(tmp_path / "w.safetensors"), checkpoint.load(tmp_path / "w.safetensors")
    assert loaded.config == model.config
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert (content["step"], content["size"], content["tokenizer"]) == (7, None, tokenizer.to_json())


def test_half_precision_keeps_the_buffers(saved, tmp_path):
    path, model, _ = saved
    assert run("export", "--checkpoint", path, "--out", tmp_path, "--dtype", "bf16")[0] == 0
    loaded = Lepton.from_checkpoint(tmp_path / "model.safetensors")
    for name, value in model.named_parameters():
        assert torch.equal(value.bfloat16(), loaded.get_parameter(name)), name
    assert all(torch.equal(value, loaded.get_buffer(name)) for name, value in model.named_buffers())
    assert loaded(torch.tensor([[5, 6, 7]])).logits.isfinite().all()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_commands_read_it_like_the_checkpoint(saved, tmp_path, dtype):
    out = tmp_path / "w.safetensors"
    run("export", "--checkpoint", saved[0], "--out", out, "--dtype", dtype)
    flags = ["--dtype", dtype, "--prompt", "fox", "--seed", 1, "--max_new_tokens", 6]
    texts = [run("generate", "--checkpoint", path, *flags)[1] for path in (saved[0], out)]
    assert texts[0] == texts[1] != ""


def test_mistakes_are_one_line_and_files_are_kept(saved, tmp_path):
    out = tmp_path / "w.safetensors"
    out.write_text("mine")
    for words, message in (
        (["--out", out], "exists: give another --out, or --force"),
        (["--out", tmp_path / "w.pt"], "give a name that ends in .safetensors, or a folder"),
        (["--out", out, "--dtype", "fp64"], "unknown value 'fp64'"),
    ):
        code, _, err = run("export", "--checkpoint", saved[0], *words)
        assert code == 2
        assert message in err.splitlines()[-1]
    assert out.read_text() == "mine"
    assert run("export", "--checkpoint", saved[0], "--out", out, "--force")[0] == 0
    assert Lepton.from_checkpoint(out).config == saved[1].config
    out.write_bytes(out.read_bytes()[:-9])
    code, _, err = run("export", "--checkpoint", out, "--out", tmp_path / "again.safetensors")
    assert (code, len(err.splitlines())) == (2, 1)


def test_int8_takes_little_over_a_quarter_and_predicts_nearly_the_same(tmp_path):
    path = tmp_path / "nano.pt"
    model = create_lepton_nano(layers=4)
    with torch.no_grad():
        model.embed.weight.mul_(3)
    content = {"model": model.state_dict(), "config": model.config.to_dict(), "size": "nano", "step": 3}
    checkpoint.save(path, content)
    sizes = {}
    for dtype in ("fp32", "int8"):
        out = tmp_path / f"{dtype}.safetensors"
        sizes[dtype] = run_json("export", "--checkpoint", path, "--out", out, "--dtype", dtype)["bytes"]
    assert sizes["int8"] < 0.28 * sizes["fp32"]
    loaded = Lepton.from_checkpoint(tmp_path / "int8.safetensors")
    tokens = torch.arange(2, 66)[None]
    with torch.no_grad():
        wanted, found = (each.eval()(tokens).logits.log_softmax(-1) for each in (model, loaded))
    assert (wanted.exp() * (wanted - found)).sum(-1).mean() < 1e-3, "nats a token"


def test_several_files_replace_what_was_there(saved, tmp_path):
    out = tmp_path / "w.safetensors"
    words = "export", "--checkpoint", saved[0], "--out", out
    figures = run_json(*words)
    assert figures["out"] == str(out)
    code, _, err = run(*words, "--max_file_mb", "1")
    assert code == 2
    assert "w.safetensors exists" in err
    run_json(*words, "--max_file_mb", "1", "--force")
    assert out.exists(), "a small model is one file"
    code, _, err = run(*words, "--max_file_mb", "0", "--force")
    assert "--max_file_mb 0: must be at least 1" in err
    code, _, err = run(*words[:3], "--out", tmp_path / "hf", "--to", "hf", "--dtype", "int8")
    assert "takes neither --dtype int8" in err
