"""The model card of the shipped weights: its figures are those of the results, and the committed one is of the last."""

import json

import pytest

from benchmarks.claims import RESULTS
from benchmarks.model_card import card, files_in, gather, main, tokens_read
from lepton import checkpoint
from lepton.weight_files import to_int8
from lepton.weights import CARD, FILES, FOLDER
from tests.cli.tiny import save_tiny

EVAL = {
    "checkpoint": "/home/me/out/model.pt",
    "data": "report: 100 k tokens",
    "tokens": 100_000,
    "nats_per_token": 3.7512,
    "bits_per_byte": 1.3321,
    "uncertainty": {"tokens": 65_536, "wrong": 0.62, "scores": {"uncertainty": {"ece": 0.0123, "auroc": 0.871}}},
    "speculation": [{"temperature": 0.0, "tokens_per_step": 1.824}, {"temperature": 1.0, "tokens_per_step": 1.667}],
}
RISKS = [
    {"written": False, "promises": [{"risk": 0.05, "measured_risk": 0.07, "kept": 0.1}]},
    {"written": True, "promises": [{"risk": 0.2, "measured_risk": 0.1834, "kept": 0.25}]},
]
COSTS = [{"written": True, "budgets": [{"max_cost": 0.02, "measured_cost": 0.0171, "measured_share": 0.664}]}]
RUN = {
    "command": "bash benchmarks/shipped_weights.sh micro --max_steps 7",
    "training": {"batch_size": 64, "grad_accum": 2, "seq_len": 512, "max_steps": 7},
    "corpus_tokens": 114_688,
    "tune_flags": "no",
    "eval_flags": "--speculation 128",
    "seconds": 1260,
    "hardware": "NVIDIA H100",
    "versions": {"torch": "2.13.0"},
}


@pytest.fixture
def folder(tmp_path):
    """What benchmarks/shipped_weights.sh leaves, with a tiny model."""
    save_tiny(tmp_path / "model.pt", size="micro", data={"folder": "/home/me/data"})
    content = checkpoint.load(tmp_path / "model.pt")
    (tmp_path / "model.pt").unlink()  # the last stage has only what the first one sends
    checkpoint.save_weights(
        tmp_path / "model.safetensors", content | {"model": to_int8(content["model"], {"embed.weight"})}, 1 << 16
    )
    reports = {
        "run": RUN,
        "train": {"val_loss": 3.7},
        "export": {"params": 24_900_000, "out": "/home/me/out"},
        "eval-pt": EVAL | {"nats_per_token": 3.7500},
        "eval-safetensors": EVAL,
        "source-books": EVAL | {"nats_per_token": 4.0519},
        "source-code": EVAL | {"nats_per_token": 2.5012, "tokens": 11_000},
    }
    for name, report in reports.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(report))
    for name in ("tune", "calibrate"):  # refused before they measured anything
        (tmp_path / f"{name}.json").touch()
    for name, lines in (("risks", RISKS), ("costs", COSTS)):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return tmp_path


def test_the_figures_of_the_card_are_those_that_were_measured(folder):
    found = gather(folder)
    assert tokens_read(found) == 7 * 64 * 2 * 512
    assert found["tune"] is None
    text = card(found)
    for words in (
        "# MICRO, the model that comes with LEPTON",
        "24.9 M parameters",
        "1.82 at temperature 0; 1.67 at temperature 1",
        "4.0 times",
        "| **all** | 100,000 | 3.751 | 1.332 |",
        "| books | 100,000 | 4.052 | 1.332 |",
        "| code | 11,000 | 2.501 | 1.332 |",
        "rounding costs +0.0012",
        "wrong 62.0%",
        "off by 1.23%",
        "AUROC of 0.871",
        "| `--abstain_at 0.2` | of the tokens that are not marked at most 20% are wrong | 18.34% wrong | 75.0% marked",
        "| `--max_cost 0.02` | skipping blocks costs at most 0.02 nats a token | 0.0171 nats | 66.4% go deep |",
        "the other half broke it: `--abstain_at 0.05`.",
        "bash benchmarks/shipped_weights.sh micro --max_steps 7",
        "Training took 21 minutes on NVIDIA H100",
        "The drafter was not tuned.",
        "OpenStax",
        "CC BY 4.0",
        "PSF-2.0",
        "It makes things up",
    ):
        assert words in text
    for file in folder.glob(FILES):
        assert f"| {file.name} | {file.stat().st_size:,} |" in text


def test_without_promises_the_card_says_so(folder):
    text = card(gather(folder) | {"risks": RISKS[:1], "costs": []})
    assert "Nothing can be promised." in text
    assert "`--abstain_at 0.2`" not in text


def test_no_folder_of_the_machine_is_kept_and_the_file_alone_gives_the_same_card(folder):
    results, first, again = (folder / name for name in ("results.json", "first.md", "again.md"))
    main([str(folder), "--results", str(results), "--out", str(first)])
    assert "/home/me" not in results.read_text()
    main(["--results", str(results), "--out", str(again)])
    assert first.read_text() == again.read_text() == card(json.loads(results.read_text()))


@pytest.mark.skipif(not any(FOLDER.glob(FILES)), reason="this copy comes without weights")
def test_the_weights_of_the_package_have_a_card_and_results():
    results = sorted(RESULTS.glob("*-shipped-weights*.json"))
    assert results, "run python -m benchmarks.model_card"
    found = json.loads(results[-1].read_text(encoding="utf-8"))
    assert (FOLDER / CARD).read_text(encoding="utf-8") == card(found), "run python -m benchmarks.model_card"
    assert found["files"] == files_in(FOLDER), "other weights were measured"
