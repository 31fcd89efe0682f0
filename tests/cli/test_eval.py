"""`python -m lepton eval`: figures of data sets and of text files, and what a user can get wrong."""

import json
import lzma
import os
import sysconfig

import numpy as np
import pytest
import torch
from torch.nn.modules.module import register_module_forward_pre_hook

from lepton.data.shards import ShardedDataset
from lepton.data.sources import Corpus
from lepton.evals.calibration import fit_temperature
from lepton.evals.heldout import document_batches, evaluate
from lepton.evals.positions import calibration_batches, evaluation_batches
from lepton.evals.reliability import brier, measure_uncertainty
from tests.cli.tiny import TEXT, run, run_json, save_tiny


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    path = tmp_path_factory.mktemp("eval") / "final.pt"
    return path, *save_tiny(path)


def command_of(path):
    """Run in fp32, as the comparisons do, also where the hardware has bf16."""
    return "eval", "--checkpoint", path, "--dtype", "fp32"


@pytest.fixture
def data_dir(tmp_path, saved):
    """Twelve rows of text, so that one is held out."""
    ids = saved[2].encode(TEXT * 8)[: 12 * 32]
    folder = tmp_path / "shards"
    folder.mkdir()
    np.save(folder / "shard_00000.npy", np.array(ids, dtype=np.int32).reshape(12, 32))
    return folder


def test_a_data_set(saved, data_dir):
    path, model, tokenizer = saved
    for split in ("val", "train"):
        figures = run_json(*command_of(path), "--data_dir", data_dir, "--split", split)
        data = ShardedDataset(data_dir, seq_len=31, seed=0, split=split, vocab_size=320)
        expected = evaluate(model, data.batches(8), tokenizer)
        assert figures["tokens"] == expected.tokens == data.tokens
        assert figures["bytes"] == expected.bytes
        assert figures["nats_per_token"] == pytest.approx(expected.nats_per_token)
        assert figures["bits_per_byte"] == pytest.approx(expected.bits_per_byte)
        assert figures["step"] == 7


def test_a_limit_on_tokens(saved, data_dir):
    words = [*command_of(saved[0]), "--data_dir", data_dir, "--split", "train", "--batch_size", 2]
    # Whole rows, in batches of one size: two of two for three rows.
    for asked, rows in ((1, 1), (63, 2), (93, 4), (10**9, 11)):
        assert run_json(*words, "--max_tokens", asked)["tokens"] == rows * 31


def test_parts_are_printed_as_they_are_known(saved, data_dir, monkeypatch):
    """29 minutes without a line: an estimate comes first, then each part and each row of the ablation."""
    printed, passes = [], []

    def watch(module, _):
        if isinstance(module, torch.nn.Embedding):  # once a pass
            passes.append(len(printed))

    monkeypatch.setattr("builtins.print", lambda *lines, **options: printed.append((lines, options)))
    hook = register_module_forward_pre_hook(watch)
    code, _, _ = run(*command_of(saved[0]), "--data_dir", data_dir, "--ablate", "--max_tokens", 31)
    hook.remove()
    assert code == 0
    assert all(options.get("flush") for _, options in printed[1:])
    (estimate,), _ = printed[1]
    assert estimate.startswith("about ")
    assert "tokens/s" in estimate
    # Two passes for the estimate, one for the loss, two for the uncertainty. What --max_tokens has measured already is
    # not measured again: then come eight switches, a row printed after each.
    assert passes == [1, 1, 2, 3, 3, *range(6, 14)]


def test_a_single_window_has_no_other_half(saved, tmp_path):
    (tmp_path / "val").mkdir()
    for name in ("shard_00000.npy", "val/shard_00000.npy"):
        np.save(tmp_path / name, np.full((1, 2), 40, dtype=np.int32))
    code, out, _ = run(*command_of(saved[0]), "--data_dir", tmp_path)
    assert code == 0
    assert "other half" not in out


def test_threads_share_the_cores(saved, data_dir, monkeypatch):
    monkeypatch.setattr("os.environ", {k: v for k, v in os.environ.items() if not k.startswith(("GOMP", "OMP"))})
    run(*command_of(saved[0]), "--data_dir", data_dir)
    assert os.environ["GOMP_SPINCOUNT"] == "2000"


def test_the_default_data_set(saved, tmp_path, monkeypatch):
    for number in range(60):
        (tmp_path / f"module_{number}.py").write_text(TEXT)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: {"stdlib": str(tmp_path)}[name])
    monkeypatch.setenv("LEPTON_CACHE", str(tmp_path / "cache"))
    found = run_json(*command_of(saved[0]))
    (folder,) = (tmp_path / "cache").glob("stdlib-*")
    named = run_json(*command_of(saved[0]), "--data_dir", folder)
    assert found["tokens"] == named["tokens"] > 0
    assert found["nats_per_token"] == named["nats_per_token"]


def test_text_files_and_json_lines(saved, tmp_path):
    path, model, tokenizer = saved
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    with lzma.open(tmp_path / "b.jsonl.xz", "wt", encoding="utf-8") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in ("fox", TEXT))
    files = [tmp_path / "a.txt", tmp_path / "b.jsonl.xz"]
    figures = run_json(*command_of(path), "--text", *files)
    expected = evaluate(model, document_batches(Corpus(files).pieces(), tokenizer), tokenizer, carry=True)
    assert figures["nats_per_token"] == pytest.approx(expected.nats_per_token)
    assert figures["bytes"] == 2 * len(TEXT.encode()) + 3
    assert figures["data"] == "2 files"
    assert run_json(*command_of(path), "--text", *files, "--max_tokens", 9)["tokens"] == 9


def test_lines_for_people(saved, data_dir):
    code, out, err = run(*command_of(saved[0]), "--data_dir", data_dir)
    assert code == 0
    figures = run_json(*command_of(saved[0]), "--data_dir", data_dir)
    assert f"nats per token  {figures['nats_per_token']:.4f}\n" in out
    assert f"bits per byte   {figures['bits_per_byte']:.4f}\n" in out
    assert "val split" in err


def test_reliability_of_both_sources_on_the_second_half(saved, data_dir):
    path, model, _ = saved
    report = run_json(*command_of(path), "--data_dir", data_dir)
    data = ShardedDataset(data_dir, seq_len=16, seed=0, split="val", vocab_size=320)
    temperature = fit_temperature(model, calibration_batches(data, 8))
    expected = measure_uncertainty(model, evaluation_batches(data, 8), temperature=temperature).to_dict()
    got = report["uncertainty"]
    assert got["tokens"] == expected["tokens"] == 15
    assert got["temperature"] == pytest.approx(temperature)
    assert list(got["scores"]) == ["uncertainty", "max-probability", "scaled max-probability"]
    for source, scores in got["scores"].items():
        assert scores == pytest.approx(expected["scores"][source])


def test_reliability_on_text_reads_on_from_chunk_to_chunk(saved, tmp_path):
    path, model, tokenizer = saved
    (tmp_path / "a.txt").write_text(TEXT * 20, encoding="utf-8")
    report = run_json(*command_of(path), "--text", tmp_path / "a.txt")
    ids = [tokenizer.eos_id, *tokenizer.encode(TEXT * 20), tokenizer.eos_id]
    out = model(torch.tensor([ids[:-1]]))
    wrong = out.logits[0].argmax(-1) != torch.tensor(ids[1:])
    assert len(ids) > 1026
    assert report["uncertainty"]["tokens"] == len(ids) - 1
    assert report["uncertainty"]["wrong"] == pytest.approx(wrong.double().mean().item())
    expected = brier(out.uncertainty[0].detach(), wrong)
    assert report["uncertainty"]["scores"]["uncertainty"]["brier"] == pytest.approx(expected, abs=1e-6)
    assert report["uncertainty"]["temperature"] is None


def test_depth_and_think(saved, data_dir):
    words = [*command_of(saved[0]), "--data_dir", data_dir]
    full, shallow = run_json(*words), run_json(*words, "--depth", 0, "--think", 0)
    assert (full["mean_depth"], shallow["mean_depth"]) == (3, 2)
    assert full["layers"] == 3
    assert full["nats_per_token"] != shallow["nats_per_token"]
    assert full["uncertainty"]["scores"] != shallow["uncertainty"]["scores"]


def test_ablations(saved, data_dir):
    words = [*command_of(saved[0]), "--data_dir", data_dir]
    table = run_json(*words, "--ablate")["ablation"]
    by_name = {row["off"]: row for row in table}
    assert list(by_name)[:5] == ["nothing", "thoughts", "working memory", "crystals", "peek"]
    assert by_name["nothing"]["nats_per_token"] == pytest.approx(run_json(*words)["nats_per_token"])
    assert by_name["depth 0"]["nats_per_token"] == pytest.approx(run_json(*words, "--depth", 0)["nats_per_token"])
    assert all(row["change"] for row in table[1:3])
    assert "ablation" not in run_json(*words)


def test_speculation(saved, data_dir, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT, encoding="utf-8")
    for data in (["--data_dir", data_dir, "--split", "train"], ["--text", tmp_path / "a.txt"]):
        rows = run_json(*command_of(saved[0]), *data, "--speculation", 3)["speculation"]
        assert [row["temperature"] for row in rows] == [0, 1]
        assert all(row["prompts"] == (3 if "--split" in data else 1) for row in rows)
        assert all(row["tokens_per_step"] >= 1 for row in rows)


def test_every_part_has_lines_for_people(saved, data_dir):
    code, out, _ = run(*command_of(saved[0]), "--data_dir", data_dir, "--ablate", "--speculation", 2)
    assert code == 0
    for word in (
        "mean depth      3.00 of 3",
        "scaled max-probability",
        "AUROC",
        "crystals",
        "depth 0.5",
        "temperature 1",
    ):
        assert word in out


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (["--data_dir", "nowhere"], "nowhere"),
        (["--text", "nowhere.txt"], "nowhere.txt"),
        (["--text", "a.txt", "--data_dir", "b"], "give one of them"),
        (["--max_tokens", 0], "--max_tokens 0"),
        (["--batch_size", 0], "--batch_size 0"),
        (["--speculation", 0], "--speculation 0"),
        (["--speculation", 10**30], "must lie in 1..1024"),
        (["--batch_size", 10**12], "must lie in 1..4096"),
        (["--max_tokens", 10**400], "--max_tokens 1000"),
        (["--max_tokens", -5], "--max_tokens -5"),
        (["--text", "EMPTY"], "there is no text in it"),
    ],
)
def test_mistakes_are_one_line(saved, flags, named, tmp_path):
    flags = [tmp_path if flag == "EMPTY" else flag for flag in flags]
    code, out, err = run(*command_of(saved[0]), *flags)
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert named in err


@pytest.mark.parametrize("flags", [["--depth", 1.5], ["--depth", "nan"], ["--think", -1]])
def test_knobs_out_of_range(saved, data_dir, flags):
    code, out, err = run(*command_of(saved[0]), "--data_dir", data_dir, *flags)
    assert (code, out) == (2, "")
    assert f"error: {flags[0][2:]}={flags[1]}" in err


def test_data_of_another_tokenizer(saved, data_dir):
    (data_dir / "metadata.json").write_text(json.dumps({"tokenizer_hash": "0" * 64}), encoding="utf-8")
    code, _, err = run(*command_of(saved[0]), "--data_dir", data_dir)
    assert code == 2
    assert "another tokenizer" in err
