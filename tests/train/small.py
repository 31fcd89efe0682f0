"""A data set, a tokenizer and a shape with which a training run takes a fraction of a second."""

import io
import json
from pathlib import Path

import numpy as np

from lepton.data.shards import ShardedDataset
from lepton.data.tokenizer import Tokenizer, load_tokenizer
from lepton.train.settings import TrainSettings
from lepton.train.trainer import train
from tests.cli.tiny import TEXT, small_bpe

SHAPE = {
    "width": 32, "layers": 3, "heads": 2, "kv_heads": 1, "head_dim": 16, "ffn": 48, "window": 16,
    "vocab_size": 300, "embed_rank": None, "segment": 8, "thought_ffn": 32, "memory_heads": 1, "key_dim": 8,
    "value_dim": 8, "slots": 8, "hint": 8, "exit_width": 16, "draft_width": 16, "draft_vocab": 64,
}  # fmt: skip
# Exit and router as they learn when they are to be used.
ROUTED = {
    "router.into_stem": 0.1, "router.exit_stride": 4, "router.distil": True, "router.expected": True,
    "router.reads_exit": True, "router.served": 0.75,
}  # fmt: skip
ROW_LEN = 129


def write_data(folder: Path, *, hashed: bool = True) -> Path:
    """Write 40 rows of a repetitive text with some noise as two shards, and tokenizer.json beside them."""
    backend = small_bpe()
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"))
    tokenizer = Tokenizer.from_json(backend.to_str())
    ids = [*tokenizer.encode(TEXT), tokenizer.eos_id]
    rows = np.resize(np.array(ids, dtype=np.uint16), 40 * ROW_LEN).reshape(40, ROW_LEN)
    noise = np.random.default_rng(0)
    rows[noise.random(rows.shape) < 0.1] = 40
    np.save(folder / "shard_00000.npy", rows[:20])
    np.save(folder / "shard_00001.npy", rows[20:])
    metadata = {"total_tokens": rows.size} | ({"tokenizer_hash": tokenizer.hash} if hashed else {})
    (folder / "metadata.json").write_text(json.dumps(metadata), encoding="utf-8")
    return folder


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def small_settings(data: Path, out: Path, **changes) -> TrainSettings:
    """Settings of 8 steps on the CPU in fp32, with a validation and a checkpoint every 4."""
    usual = {
        "model_size": "nano",
        "overrides": SHAPE,
        "data_dir": str(data),
        "tokenizer": str(data / "tokenizer.json"),
        "checkpoint_dir": str(out),
        "seq_len": 32,
        "batch_size": 2,
        "max_steps": 8,
        "save_every": 4,
        "eval_every": 4,
        "eval_batches": 1,
        "log_every": 2,
        "sample_tokens": 4,
        "dtype": "fp32",
        "device": "cpu",
    }
    return TrainSettings(**(usual | changes))


def small_run(data: Path, out: Path, **changes) -> tuple[Path, str]:
    """Train; return the path of the final checkpoint and what was printed."""
    stream = io.StringIO()
    return train(small_settings(data, out, **changes), stream=stream), stream.getvalue()


def metrics_of(out: Path) -> list[dict]:
    """The objects of metrics.jsonl without their speeds."""
    lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{name: value for name, value in json.loads(line).items() if name != "tokens_per_s"} for line in lines]


def opened(data, seq_len=50, split="val"):
    """Return a split of `data` and its tokenizer."""
    tokenizer = load_tokenizer(data / "tokenizer.json")
    return ShardedDataset(data, seq_len=seq_len, seed=0, split=split, vocab_size=300), tokenizer


def losses_of(out):
    """The steps of a run, and the loss of each."""
    return [(entry["step"], entry["loss"]) for entry in metrics_of(out) if "loss" in entry]
