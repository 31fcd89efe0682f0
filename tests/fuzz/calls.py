"""Public calls with hostile values in the place of one or two of their arguments."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch

from lepton import checkpoint
from lepton.api import Lepton, create_lepton, create_lepton_nano
from lepton.config import LeptonConfig
from lepton.data.prepare import prepare
from lepton.data.shards import ShardedDataset
from lepton.data.sources import Corpus
from lepton.data.tokenizer import Tokenizer, load_tokenizer, train_tokenizer
from lepton.engine.options import check_sampling
from lepton.generate.sampling import probabilities
from lepton.train.settings import TrainSettings
from lepton.train.starting_point import find_starting_point
from tests.fuzz.judge import not_finite
from tests.fuzz.specimens import settings
from tests.fuzz.values import hostile, same_kind, shown
from tests.fuzz.world import World

TOKENS = torch.tensor([[50, 51, 0, 52, 53]])
MANY = 1000
"""Counts of work above this are left out where they are the work asked for: a million new tokens are no hang."""


@dataclass(frozen=True)
class Invocation:
    """A call with its values."""

    action: Callable[[], Any]
    shown: str
    accepted: tuple[type[Exception], ...]
    """What it may raise beside InputError."""


@dataclass(frozen=True)
class Call:
    """A function and the good values of its arguments, some of which are replaced."""

    name: str
    function: Callable[..., Any]
    """Called as function(world, place, **values); `place` is an empty folder."""
    good: Callable[[World, Path], Mapping[str, Any]]
    also: Mapping[str, Any] = field(default_factory=dict)
    """Arguments that are left out unless a hostile value is chosen, with a good value of each."""
    check: Callable[[World, Any], str | None] = lambda _world, value: not_finite(value)
    promised: bool = True
    """Whether a value of a wrong type is promised to be an InputError, as one of the right type is."""
    work: frozenset[str] = field(default_factory=frozenset)
    """Arguments that count work, see `MANY`."""
    values: tuple[Any, ...] = ()
    """Values that are hostile to this call."""

    def draw(self, random: Random, world: World, place: Path) -> Invocation:
        """Choose the values of a case."""
        good = self.good(world, place)
        values, other_kind = dict(good), False
        names = [name for name in (*good, *self.also) if name not in ("command", "words")]
        for name in random.sample(names, min(len(names), random.choice([1, 1, 2]))):
            value = random.choice(self.values) if self.values and random.random() < 0.3 else hostile(random, world)
            if name in self.work and _number(value) > MANY:
                value = -1
            values[name] = value
            other_kind |= not same_kind(value, good.get(name, self.also.get(name)))
        text = ", ".join(f"{name}={shown(value)}" for name, value in values.items())
        accepted = (Exception,) if other_kind and not self.promised else ()
        return Invocation(lambda: self.function(world, place, **values), text, accepted)


def _number(value: Any) -> float:
    try:
        return float(value)
    except Exception:
        return 0.0


def _create(world: World, _place: Path, size: Any, **overrides: Any) -> Any:
    """Build without memory: what fits this machine is another question than what is a shape."""
    with torch.device("meta"):
        model = create_lepton(size, **overrides)
    return model.num_params()


def _create_named(_world: World, _place: Path, **overrides: Any) -> Any:
    with torch.device("meta"):
        return create_lepton_nano(**overrides).num_params()


@torch.no_grad()
def _forward(world: World, _place: Path, tokens: Any, **options: Any) -> Any:
    out = world.model(tokens, **options)
    return {"logits": out.logits, "position": out.state.position_B}


def _loss(world: World, _place: Path, tokens: Any, **options: Any) -> Any:
    with torch.no_grad():
        return world.model.loss(tokens, **options).loss


def _generate(world: World, _place: Path, prompt_ids: Any, **options: Any) -> Any:
    return prompt_ids, world.model.generate(prompt_ids, **options)


def _check_generated(world: World, result: Any) -> str | None:
    prompt, tokens = result
    rows = tokens if tokens and isinstance(tokens[0], list) else [tokens]
    if not all(type(token) is int and 0 <= token < world.model.config.vocab_size for row in rows for token in row):
        return f"generated {tokens}"
    several = isinstance(prompt, list | tuple) and len(prompt) > 1 and all(hasattr(row, "__len__") for row in prompt)
    return f"{len(prompt)} prompts gave one row" if several and len(rows) == 1 else None


def _commit(world: World, _place: Path, count: Any) -> Any:
    with torch.no_grad():
        return world.model(TOKENS).commit(count).position_B


def _check_ids(world: World, ids: Any) -> str | None:
    return None if all(type(i) is int and 0 <= i < world.tokenizer.size for i in ids) else f"ids {ids}"


def _data_set(world: World, _place: Path, batch_size: Any = 2, limit: Any = 2, **options: Any) -> Any:
    data = ShardedDataset(**options)
    return [batch.lengths for batch in data.batches(batch_size, limit)] + [data.batch(0, batch_size=2).tokens]


def _begin(world: World, place: Path, **changes: Any) -> Any:
    start = find_starting_point(settings(world.folder, place / "out", **changes), changes.keys())
    return start.config.to_dict()


def _probabilities(_world: World, _place: Path, logits: Any, **options: Any) -> Any:
    check_sampling(options["temperature"], options["top_p"], options["top_k"])
    return logits, probabilities(logits, **options)


def _check_probabilities(_world: World, result: Any) -> str | None:
    logits, p = result
    if not bool(logits.isfinite().all()):
        return None  # what a model computes is not checked here
    good = bool((p >= 0).all()) and bool(((p.sum(-1) - 1).abs() < 1e-9).all())
    return None if good else "no distributions"


def _command(world: World, place: Path, command: str, **flags: Any) -> Any:
    words: list[str] = [command, *flags.pop("words", [])]
    for name, value in flags.items():
        words += [f"--{name}"] + ([] if value is True else [value if isinstance(value, str) else shown(value)])
    return world.command(*words)


_OPTIONS = dict.fromkeys(
    ("max_new_tokens", "temperature", "top_p", "top_k", "use_speculative", "seed", "stop", "depth", "max_cost", "think")
)
_GENERATION: dict[str, Any] = {"max_new_tokens": 3, "temperature": 0.9, "top_p": 0.9, "seed": 1}
_PROMPTS = (
    [torch.tensor([5]), torch.tensor([9])], [np.array([5]), np.array([9])], [torch.tensor(5), 6], np.array([[5, 6],
    [7, 8]]), "text", [5, 6],
    [[5], [6, 7]], torch.tensor([5.0]), [[5], []], (5, 6), [np.int64(5)], torch.tensor([[5, 6]], dtype=torch.uint16),
    [[[5]]],
)  # fmt: skip
_SMALL_OPTIONS = frozenset({"max_new_tokens"})
_TRAIN = dict.fromkeys(field.name for field in dataclasses.fields(TrainSettings))
_CONFIG = dict.fromkeys(field.name for field in dataclasses.fields(LeptonConfig))


def _is_fine(_world: World, _value: Any) -> None:
    """Any result will do."""


CALLS = (
    Call("create_lepton", _create, lambda w, p: {"size": "nano"}, also=_CONFIG, values=(8, 64, 4, 12, 10**6, 10**9,
         2**62)),
    Call("create_lepton_nano", _create_named, lambda w, p: {"window": 16}, also=_CONFIG, values=(8, 64, 10**5, 10**9)),
    Call("LeptonConfig", lambda w, p, **v: LeptonConfig.from_dict(v).to_dict(), lambda w, p: w.model.config.to_dict()),
    Call("LeptonConfig.from_dict", lambda w, p, fields: LeptonConfig.from_dict(fields).to_dict(), lambda w,
         p: {"fields": {}}),
    Call("config.replace", lambda w, p, **v: w.model.config.replace(**v).to_dict(), lambda w, p: {"width": 8},
         also=_CONFIG),
    Call("TrainSettings", lambda w, p, **v: TrainSettings(**v).to_dict(), lambda w, p: {"seed": 1}, also=_TRAIN,
         check=_is_fine),
    Call("begin", _begin, lambda w, p: {"seed": 1}, also=_TRAIN, check=_is_fine),
    Call("model", _forward, lambda w, p: {"tokens": TOKENS}, also=dict.fromkeys(("state", "lengths", "depth", "think",
         "opens")),
         values=(10**6, [[5, 6]], np.array([[5, 6]]), torch.tensor([[5, 6]], dtype=torch.uint16), torch.tensor([5]))),
    Call("model.loss", _loss, lambda w, p: {"tokens": TOKENS}, also=dict.fromkeys(("lengths", "think", "groups",
         "auxiliary")), check=_is_fine,
         values=(10**6, torch.tensor([5]), torch.tensor([2]), torch.tensor([0]))),
    Call("model.generate", _generate, lambda w, p: {"prompt_ids": [5, 6], **_GENERATION}, also=_OPTIONS,
         check=_check_generated,
         work=_SMALL_OPTIONS, values=_PROMPTS),
    Call("model.generate_stream", lambda w, p, **v: list(w.model.generate_stream(**v)),
         lambda w, p: {"prompt_ids": [5, 6], **_GENERATION}, also=_OPTIONS, check=_check_ids, work=_SMALL_OPTIONS,
         values=_PROMPTS),
    Call("model.generate_with_uncertainty", lambda w, p, **v: w.model.generate_with_uncertainty(**v),
         lambda w, p: {"prompt_ids": [5, 6], **_GENERATION}, also=_OPTIONS, work=_SMALL_OPTIONS, values=_PROMPTS),
    Call("model.new_state", lambda w, p, **v: w.model.new_state(**v).position_B, lambda w, p: {"batch_size": 1},
         also={"memory": None},
         values=(10**6, 10**9)),
    Call("model.load_state", lambda w, p, **v: w.model.load_state(**v).position_B,
         lambda w, p: {"path": w.folder / "state.safetensors"}),
    Call("Lepton.from_checkpoint", lambda w, p, path: Lepton.from_checkpoint(path).num_params(),
         lambda w, p: {"path": w.folder / "weights.pt"}),
    Call("checkpoint.load", lambda w, p, path: checkpoint.load(path)["step"], lambda w,
         p: {"path": w.folder / "weights.pt"}),
    Call("out.commit", _commit, lambda w, p: {"count": torch.tensor([2])},
         values=(torch.tensor([6]), torch.tensor([-1]), torch.tensor([2.0]), torch.tensor([2], dtype=torch.int32))),
    Call("state.rows", lambda w, p, index: w.state.rows(index).position_B, lambda w, p: {"index": torch.tensor([0])},
         promised=False),
    Call("state.save", lambda w, p, path: w.state.save(path), lambda w, p: {"path": p / "state"}, check=_is_fine,
         promised=False,
         values=("pipe", "folder", "file/x", "missing/x", "")),
    Call("tokenizer.encode", lambda w, p, text: w.tokenizer.encode(text), lambda w, p: {"text": "a"},
         check=_check_ids, promised=False,
         values=("<|endoftext|>", "\ud800", "a" * 100_000, "\0", "🙂" * 1000)),
    Call("tokenizer.encode_batch", lambda w, p, texts: w.tokenizer.encode_batch(texts), lambda w, p: {"texts": ["a"]},
         promised=False,
         values=(["a", "\ud800"], "text", ["a", None])),
    Call("tokenizer.decode", lambda w, p, ids: w.tokenizer.decode(ids), lambda w, p: {"ids": [5]}, promised=False,
         values=([0, 1, 2], [-1, 10**30], [299, 300], np.array([5, 6]), torch.tensor([5, 6]))),
    Call("Tokenizer.from_json", lambda w, p, text: Tokenizer.from_json(text).size, lambda w,
         p: {"text": w.tokenizer.to_json()}),
    Call("load_tokenizer", lambda w, p, **v: load_tokenizer(**v).size, lambda w,
         p: {"path": w.folder / "tokenizer.json"}),
    Call("train_tokenizer", lambda w, p, **v: train_tokenizer(**v).size,
         lambda w, p: {"sources": [w.folder / "texts" / "notes.txt"], "out": p / "t.json", "vocab_size": 280},
         also={"text_field": "text", "force": True}, promised=False, values=("pipe", "folder", "file/x", 259, 50258)),
    Call("ShardedDataset", _data_set,
         lambda w, p: {"folder": w.folder / "data", "seq_len": 32, "seed": 0, "split": "train", "vocab_size": 300},
         also={"eos_id": 0, "tokenizer_hash": "", "batch_size": 2, "limit": 2}, check=_is_fine, promised=False,
         work=frozenset({"batch_size"}), values=(0, -1, 2**64, "test", "val", "pipe", "folder")),
    Call("prepare", lambda w, p, **v: prepare(**v)["total_tokens"],
         lambda w, p: {"sources": [w.folder / "texts" / "notes.txt"], "out": p / "out", "tokenizer": w.tokenizer,
                       "row_len": 65, "shard_rows": 4},
         also={"val_fraction": 0.1, "text_field": "text", "force": True, "name": "x"}, promised=False,
         values=("pipe", "folder", "file", "file/x", ["/dev/zero"], ["pipe"], 0, -1, 1, 2, 2**40)),
    Call("Corpus", lambda w, p, **v: [piece.last for piece in Corpus(**v).pieces()],
         lambda w, p: {"sources": [w.folder / "texts" / "docs.jsonl"], "text_field": "text"}, promised=False,
         values=(["/dev/zero"], ["pipe"], ["folder", "file"], ["missing"], "n", [""])),
    Call("probabilities", _probabilities, lambda w, p: {"logits": torch.ones(2, 7), "temperature": 1.0, "top_p": 0.9,
         "top_k": None},
         check=_check_probabilities, promised=False),
    Call("check_sampling", lambda w, p, **v: check_sampling(**v), lambda w, p: {"temperature": 1.0, "top_p": 0.9,
         "top_k": None}),
    Call("generate command", _command,
         lambda w, p: {"command": "generate", "checkpoint": str(w.folder / "weights.pt"), "prompt": "The",
         "max_new_tokens": 3, "seed": 1},
         also=dict.fromkeys(("temperature", "top_p", "top_k", "stop", "depth", "max_cost", "think", "device",
         "dtype", "tokenizer", "uncertainty", "json")),
         check=_is_fine, work=_SMALL_OPTIONS, values=("---", "-1", "--", "\\n", "-->", "1e999", "0x10", "1_000")),
    Call("train command", _command,
         lambda w, p: {"command": "train", "data_dir": str(p / "no data"), "model_size": "nano", "device": "cpu",
         "checkpoint_dir": str(p / "out")},
         also={name: None for name in (*_TRAIN, "override") if name not in ("overrides", "checkpoint_activations",
         "compile", "dense")},
         check=_is_fine, values=("window=16", "window=None", "layers=10**9", "width=[" + "[" * 500, "x=1", "=",
         "seed=1e999", "20241126130100")),
    Call("prepare command", _command,
         lambda w, p: {"command": "prepare", "words": [str(w.folder / "texts" / "notes.txt")], "out": str(p / "out"),
                       "tokenizer": str(w.folder / "tokenizer.json")},
         also=dict.fromkeys(("val_fraction", "text_field", "force")), check=_is_fine, values=("---", "pipe", "folder",
         "file/x", "0.5")),
    Call("eval command", _command,
         lambda w, p: {"command": "eval", "checkpoint": str(w.folder / "weights.pt"),
         "data_dir": str(w.folder / "data"), "max_tokens": 64,
                       "batch_size": 1},
         also=dict.fromkeys(("depth", "think", "device", "dtype", "json", "text", "speculation")), check=_is_fine,
         work=frozenset({"max_tokens", "speculation"}), values=("0", "-1", "nan", "pipe", "folder")),
    Call("tokenizer command", _command,
         lambda w, p: {"command": "tokenizer", "words": ["info"], "tokenizer": str(w.folder / "tokenizer.json")},
         check=_is_fine),
)  # fmt: skip
