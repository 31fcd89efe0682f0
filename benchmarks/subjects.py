"""Models to decode with, and the held-out text that they continue."""

import math
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from lepton import checkpoint
from lepton.api import Lepton
from lepton.data.shards import ShardedDataset
from lepton.data.stdlib import default_corpus
from lepton.data.tokenizer import load_tokenizer
from lepton.errors import InputError
from lepton.model import Network
from lepton.model.size_config import size_config
from lepton.runtime.device import pick_dtype

ROOT = Path(__file__).parents[1]
TRAINING_ROWS = {"cuda": 64, "cpu": 4}
TRAINING_LENGTH = 512
NEVER = 10**9
"""Steps between two things that a short training does not need."""
PROMPTS = 256
"""Different prompts; more rows than that share them."""


@dataclass(frozen=True)
class Subject:
    """A model in the precision that it decodes in, on its device."""

    name: str
    size: str | None
    """Name of its size, which decides the shape of its peer; None: it has none, and so no peer."""
    model: Lepton
    text: np.ndarray
    """Token ids that its prompts are cut from."""
    origin: str
    """Where its weights are from, in words."""

    def prompts(self, length: int) -> list[list[int]]:
        """Return `PROMPTS` prompts, spread over the text."""
        return spread(self.text, PROMPTS, length)


def spread(text: np.ndarray, count: int, length: int) -> list[list[int]]:
    """Return `count` windows of `length` tokens that begin at equal distances; a text that is too short is repeated.

    The first few windows are spread over the text, too.
    """
    text = np.resize(text, max(len(text), length))
    starts = np.linspace(0, len(text) - length, count).astype(int)
    golden = next(step for step in range(round(0.618 * count) or 1, count + 1) if math.gcd(step, count) == 1)
    order = (starts[i * golden % count] for i in range(count))
    return [text[start : start + length].tolist() for start in order]


def held_out(folder: Path, model: Network) -> np.ndarray:
    """Return the tokens of a data set's validation split, row after row."""
    vocabulary, eos = model.config.vocab_size, model.config.eos_id

    def split(seq_len: int) -> ShardedDataset:
        return ShardedDataset(folder, seq_len=seq_len, seed=0, split="val", vocab_size=vocabulary, eos_id=eos)

    rows = split(split(1).row_len - 1).batches(1)  # a window is then a whole row
    return np.concatenate([row[:n].numpy() for batch in rows for row, n in zip(*batch[:2], strict=True)])


def shake(model: Network) -> None:
    """Move all weights a little: some begin at zero, and what they multiply would be zero."""
    torch.manual_seed(0)
    for parameter in model.parameters():
        parameter.data += 0.3 * torch.randn_like(parameter) / parameter.shape[-1] ** 0.5
    drafter = model.idea("drafter")
    if drafter is not None:
        drafter.ids.copy_(torch.arange(len(drafter.ids)))


@dataclass(frozen=True)
class Data:
    """What is trained on, and what prompts are cut from."""

    folder: Path | None = None
    """Folder of shard_*.npy; None: the default corpus."""
    tokenizer: Path | None = None
    """The tokenizer that they were made with; None: what train.py takes by default."""


def random_subject(size: str, data: Data, device: torch.device) -> Subject:
    """Build a model of random weights. Its speed is that of a trained one, but for what drafts bring."""
    model = Lepton(size_config(size)).eval()
    shake(model)
    if data.folder is None:
        text = np.random.default_rng(0).integers(1, model.config.vocab_size, 1 << 16)
    else:
        text = held_out(data.folder, model)
    return Subject(size, size, model.to(device, pick_dtype("auto", device)), text, "random weights: timing alone")


def loaded_subject(path: Path, data: Data, device: torch.device) -> Subject:
    """Load a checkpoint; without a folder its prompts come from the default corpus."""
    content = checkpoint.load(path)
    model, size = Lepton.restored(content, path), content.get("size")
    text = held_out(data.folder or default_corpus(model.tokenizer or load_tokenizer(data.tokenizer)), model)
    origin = f"{path.name}, step {content['step']}"
    return Subject(size or path.stem, size, model.to(device, pick_dtype("auto", device)), text, origin)


def training_command(size: str, tokens: float, data: Data, folder: Path, device: torch.device) -> list[str]:
    """Return the command that trains a model on so many tokens."""
    rows = TRAINING_ROWS[device.type]
    flags: dict[str, object] = {
        "model_size": size, "checkpoint_dir": folder, "device": device.type, "seq_len": TRAINING_LENGTH,
        "batch_size": rows, "grad_accum": 1, "max_steps": max(1, int(tokens) // (rows * TRAINING_LENGTH)),
        "log_every": 100, "eval_every": NEVER, "save_every": NEVER, "sample_every": NEVER,
    }  # fmt: skip
    given = {"data_dir": data.folder, "tokenizer": data.tokenizer}
    flags |= {name: path for name, path in given.items() if path is not None}
    return [sys.executable, str(ROOT / "train.py"), *(f"--{name}={value}" for name, value in flags.items())]


def trained_subject(size: str, tokens: float, data: Data, folder: Path | None, device: torch.device) -> Subject:
    """Train a model in a process of its own, or take the one that an earlier run has left in `folder`.

    Raises:
        InputError: training failed.
    """
    with tempfile.TemporaryDirectory() as temporary:
        kept = Path(temporary if folder is None else folder) / f"{size}-{tokens:g}"
        final = kept / "final.pt"
        if not final.exists():
            command = training_command(size, tokens, data, kept, device)
            print("training:", *command, flush=True)
            if subprocess.run(command, check=False).returncode:
                raise InputError(f"training of '{size}' failed; give a trained one with --checkpoint, or --random")
        subject = loaded_subject(final, data, device)
    return Subject(size, size, subject.model, subject.text, f"{tokens:g} tokens of {data.folder or 'the default data'}")
