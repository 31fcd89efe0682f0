"""The loaders: each reads a file as a user's command would, uses what it read, and returns it for comparison."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from lepton import checkpoint
from lepton.api import Lepton
from lepton.config import LeptonConfig
from lepton.data.prepare import prepare
from lepton.data.shards import ShardedDataset
from lepton.data.sources import Corpus
from lepton.data.tokenizer import Tokenizer, load_tokenizer
from lepton.files import parse_json, read_bytes
from lepton.model.state import flatten
from lepton.train.assembly import assemble
from lepton.train.metrics_log import MetricsLog
from lepton.train.starting_point import find_starting_point
from tests.cli.tiny import TEXT
from tests.fuzz import specimens
from tests.fuzz.judge import not_finite
from tests.fuzz.world import World

TOKENS = torch.tensor([[50, 51, 52, 60, 61, 62, 0, 70]])


@dataclass(frozen=True)
class Target:
    """A loader."""

    name: str
    specimen: str
    """The undamaged file; of a folder, one of the files in it is damaged."""
    load: Callable[[World, Path], Any]
    """Read and use the specimen at a path; return all that was read."""
    check: Callable[[World, Any], str | None] = lambda _world, value: not_finite(value)
    """Return what is wrong with a result that no hash covers, or None."""
    damaged: str = "*"
    """Of a folder: which files are damaged."""
    weight: int = 1
    """Share of the cases."""
    skips: bool = False
    """Whether the loader may leave out a damaged file, which then no hash of it can show."""


class Untrue(Exception):
    """What a loader did is wrong, as seen from outside."""


@torch.no_grad()
def _checkpoint_content(_world: World, path: Path) -> Any:
    return checkpoint.load(path)


@torch.no_grad()
def _from_checkpoint(_world: World, path: Path) -> Any:
    model = Lepton.from_checkpoint(path)
    out = model(TOKENS)
    model.generate([50, 51], max_new_tokens=3, temperature=0)
    return {"config": model.config.to_dict(), "weights": _weights(model), "logits": out.logits}


def _resume(world: World, path: Path) -> Any:
    start = find_starting_point(
        specimens.settings(world.folder, path.parent / "out", resume=str(path), max_steps=9), {"max_steps"}
    )
    return _one_step(world, start)


def _init_from(world: World, path: Path) -> Any:
    settings = specimens.settings(world.folder, path.parent / "out", model_size=None, overrides={}, init_from=str(path))
    return _one_step(world, find_starting_point(settings, settings.changed()))


def _one_step(_world: World, start: Any) -> Any:
    """Build what a run works with, and update once: what was read of the optimizers is used there."""
    parts = assemble(start)
    before = {"weights": _weights(parts.model), "optimizer": parts.optimizers.state_dict(), "step": start.step}
    loss = parts.model.loss(parts.data.train.batch(start.step, batch_size=1).tokens).loss
    loss.backward()
    parts.optimizers.step(1.0, 1.0)
    return before | {"after": _weights(parts.model)}


def _command_line(world: World, path: Path) -> Any:
    return world.command("generate", "--checkpoint", path, "--prompt", "The", "--max_new_tokens", 3, "--seed", 1)


@torch.no_grad()
def _state(world: World, path: Path) -> Any:
    state = world.model.load_state(path)
    out = world.model(TOKENS.expand(state.batch_size, -1), state)
    return {"state": flatten(state), "logits": out.logits, "next": flatten(out.state), "crystals": list(state.memory)}


@torch.no_grad()
def _memory(world: World, path: Path) -> Any:
    state = world.model.new_state(1, memory=path)
    out = world.model(TOKENS, state)
    return {"state": flatten(state), "logits": out.logits, "crystals": list(state.memory)}


def _check_state(world: World, value: Any) -> str | None:
    return not_finite({name: value[name] for name in ("state", "logits") if name in value}) or next(
        (f"crystal {crystal}" for crystal in value["crystals"] if not _possible(world, crystal)), None
    )


def _possible(world: World, crystal: Any) -> bool:
    in_range = all(0 <= token < world.model.config.vocab_size for token in crystal.tokens)
    return in_range and 0 <= crystal.score <= 1


def _tokenizer(_world: World, path: Path) -> Any:
    tokenizer = load_tokenizer(path)
    ids = tokenizer.encode(TEXT)
    assert ids == tokenizer.encode_batch([TEXT])[0]
    decoder = tokenizer.stream_decoder()
    streamed = "".join(map(decoder.push, ids)) + decoder.flush()
    return {
        "ids": ids, "text": tokenizer.decode(ids), "streamed": streamed, "size": tokenizer.size,
        "eos": tokenizer.eos_id,
        "hash": tokenizer.hash, "bytes": tokenizer.token_bytes().tolist(),
        "json": Tokenizer.from_json(tokenizer.to_json()).hash,
    }  # fmt: skip


def _check_tokenizer(_world: World, value: Any) -> str | None:
    if not all(0 <= token < value["size"] for token in [*value["ids"], value["eos"]]):
        return "ids outside of 0..size-1"
    if value["text"] != value["streamed"]:
        return "decoded at once and one by one differ"
    return None if value["json"] == value["hash"] else "the hash changes from file to checkpoint"


def _data_set(world: World, folder: Path) -> Any:
    batches: list[Any] = []
    for split in ("train", "val"):
        data = ShardedDataset(
            folder,
            seq_len=32,
            seed=0,
            split=split,
            vocab_size=world.tokenizer.size,
            tokenizer_hash=world.tokenizer.hash,
        )  # type: ignore[arg-type]
        data.describe()
        batches += [tuple(batch) for batch in data.batches(16, limit=8)]
        batches.append(tuple(data.batch(3, batch_size=4)))
    return batches


def _check_batches(world: World, batches: Any) -> str | None:
    for tokens, lengths, _ in batches:
        if not bool(((tokens >= 0) & (tokens < world.tokenizer.size)).all()):
            return "ids outside of the vocabulary"
        if not bool(((lengths >= 1) & (lengths <= tokens.shape[1])).all()):
            return f"lengths {lengths.tolist()}"
    return None


def _prepare_folder(world: World, folder: Path) -> Any:
    out = folder.parent / "out"
    metadata = prepare([folder], out, world.tokenizer, row_len=65, shard_rows=8)
    return {name: value for name, value in metadata.items() if isinstance(value, int | float)}


def _prepare_file(world: World, folder: Path) -> Any:
    """Each file of the folder as a source that is named."""
    pieces = [(piece.text, piece.last) for file in sorted(folder.iterdir()) for piece in Corpus([file]).pieces()]
    out = folder.parent / "out"
    prepare(sorted(folder.iterdir()), out, world.tokenizer, row_len=65, shard_rows=8)
    if list(folder.parent.glob(".*partial*")):
        raise Untrue("a half-made folder is left")
    return pieces


def _metrics(_world: World, path: Path) -> Any:
    """Rewind to a step, and append: intact lines of that step and before must survive."""
    entries = MetricsLog.read(path)
    if path.is_absolute() and not path.is_relative_to(Path.cwd()):
        return entries  # a file of the system, which is not to be written
    intact = (
        [json.loads(line) for line in path.read_bytes().split(b"\n") if _is_entry(line)] if os.path.isfile(path) else []
    )
    MetricsLog.rewind(path, 1)
    log = MetricsLog(path)
    log.write({"step": 2})
    log.sync()
    log.close()
    kept = [json.dumps(entry) for entry in MetricsLog.read(path)]
    lost = [entry for entry in intact if entry["step"] <= 1 and json.dumps(entry) not in kept]
    if lost:
        raise Untrue("intact lines of the steps so far are lost")
    if kept[-1:] != ['{"step": 2}']:
        raise Untrue("the line that was written last is not read last")
    return {"read": entries, "kept": kept}


def _is_entry(line: bytes) -> bool:
    """Whether a line is what `MetricsLog.write` writes: an object with a step."""
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return False
    step = entry.get("step") if isinstance(entry, dict) else None
    return type(step) is int and step >= 0 and not_finite(entry) is None


def _config(_world: World, path: Path) -> Any:
    config = LeptonConfig.from_dict(parse_json(read_bytes(path, "config", 2**20), "config"))
    with torch.device("meta"):
        Lepton(config)
    return config.to_dict()


def _weights(model: Lepton) -> dict[str, torch.Tensor]:
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    return {name: value.detach().clone() for name, value in tensors.items()}


TARGETS = (
    Target("checkpoint.load", "weights.pt", _checkpoint_content, check=lambda _world, _value: None, weight=3),
    Target("Lepton.from_checkpoint", "weights.pt", _from_checkpoint, weight=3),
    Target("exported weights", "weights.safetensors", _from_checkpoint, weight=2),
    Target("train --resume", "resumable.pt", _resume, weight=3),
    Target("train --init_from", "weights.pt", _init_from),
    Target("generate --checkpoint", "weights.pt", _command_line, check=lambda _world, _value: None),
    Target("load_state", "state.safetensors", _state, check=_check_state, weight=2),
    Target("new_state(memory=)", "memory.safetensors", _memory, check=_check_state, weight=2),
    Target("load_tokenizer .json", "tokenizer.json", _tokenizer, check=_check_tokenizer, weight=2),
    Target("load_tokenizer .xz", "tokenizer.json.xz", _tokenizer, check=_check_tokenizer),
    Target("ShardedDataset", "data", _data_set, check=_check_batches, weight=2),
    Target("ShardedDataset, padded", "prepared", _data_set, check=_check_batches),
    Target("prepare FOLDER", "texts", _prepare_folder, weight=2, skips=True),
    Target("prepare FILES", "texts", _prepare_file, weight=2),
    Target("metrics.jsonl", "metrics.jsonl", _metrics, check=lambda _world, _value: None),
    Target("LeptonConfig.from_dict", "config.json", _config, check=lambda _world, _value: None),
)
