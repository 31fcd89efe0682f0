"""The undamaged files, a few kilobytes each, all of one small model."""

import bz2
import csv
import gzip
import io
import json
import lzma
import shutil
from pathlib import Path

import numpy as np
import torch

from lepton import checkpoint
from lepton.data.prepare import prepare
from lepton.data.tokenizer import Tokenizer
from lepton.train.settings import TrainSettings
from lepton.train.trainer import train
from tests.cli.tiny import TEXT
from tests.train.small import SHAPE, small_settings, write_data

STEPS = 2
STREAM = (40, 41, 42, 43, 44, 45, 46, 47, 48, 49) * 4
"""Tokens that the state and the memory have read: more than a window, so that there are crystals."""


def make(folder: Path) -> None:
    """Write all specimens into `folder`. Runs the model: call it in a process that is not forked from."""
    torch.set_num_threads(1)
    data = write_data(folder / "data")
    (data / "val").mkdir()
    np.save(data / "val" / "shard_00000.npy", np.load(data / "shard_00001.npy")[:4])
    tokenizer_json = (data / "tokenizer.json").read_bytes()
    (folder / "tokenizer.json").write_bytes(tokenizer_json)
    (folder / "tokenizer.json.xz").write_bytes(lzma.compress(tokenizer_json))
    (data / "tokenizer.json").unlink()
    run = folder / "run"
    train(settings(folder, run), stream=io.StringIO())
    shutil.copy(run / f"step_{STEPS}.pt", folder / "resumable.pt")
    shutil.copy(run / "metrics.jsonl", folder / "metrics.jsonl")
    content = checkpoint.load(folder / "resumable.pt")
    keys = ("model", "config", "size", "tokenizer", "step")
    checkpoint.save(folder / "weights.pt", {key: content[key] for key in keys})
    checkpoint.save(folder / "weights.safetensors", {key: content[key] for key in keys})
    (folder / "config.json").write_text(json.dumps(content["config"]), encoding="utf-8")
    _write_state(folder)
    _write_texts(folder, Tokenizer.from_json(tokenizer_json.decode()))


def settings(folder: Path, out: Path, **changes: object) -> TrainSettings:
    """Settings of a run of two short steps on the specimens' data."""
    usual = {
        "overrides": SHAPE | {"router": True, "thoughts": 2, "slots": 4},
        "tokenizer": str(folder / "tokenizer.json"),
        "max_steps": STEPS,
        "save_every": STEPS,
        "eval_every": STEPS,
        "sample_tokens": 1,
    }
    return small_settings(folder / "data", out, **(usual | changes))


def _write_state(folder: Path) -> None:
    from lepton.api import Lepton

    model = Lepton.from_checkpoint(folder / "weights.pt")
    with torch.no_grad():
        state = model(torch.tensor([STREAM])).state
    state.save(folder / "state.safetensors")
    state.memory.save(folder / "memory.safetensors")


def _write_texts(folder: Path, tokenizer: Tokenizer) -> None:
    texts = folder / "texts"
    texts.mkdir()
    documents = [TEXT, "A second story.\nIt has 2 lines.\n", "Ünïcode — 東京 🙂", "x" * 300]
    entries = "".join(json.dumps({"text": text, "n": i}, ensure_ascii=False) + "\n" for i, text in enumerate(documents))
    (texts / "notes.txt").write_text(TEXT, encoding="utf-8")
    (texts / "page.md").write_text("# Title\n\n" + TEXT, encoding="utf-8")
    (texts / "docs.jsonl").write_text(entries, encoding="utf-8")
    (texts / "more.jsonl.xz").write_bytes(lzma.compress(entries.encode()))
    (texts / "packed.jsonl.gz").write_bytes(gzip.compress(entries.encode(), mtime=0))
    (texts / "packed.txt.bz2").write_bytes(bz2.compress(TEXT.encode()))
    (texts / "table.csv").write_text(_table(documents), encoding="utf-8")
    (texts / "list.json").write_text(json.dumps([{"text": text} for text in documents]), encoding="utf-8")
    prepare([texts / "notes.txt"], folder / "prepared", tokenizer, row_len=65, shard_rows=8, val_fraction=0.3)


def _table(documents: list[str]) -> str:
    out = io.StringIO()
    writer = csv.writer(out)
    writer.writerows([["text", "n"], *([text, i] for i, text in enumerate(documents))])
    return out.getvalue()
