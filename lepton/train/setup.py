"""Building the parts of a run from its settled start: device, data, model, optimizers, folder."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from lepton.data.shards import ShardedDataset
from lepton.data.tokenizer import Tokenizer
from lepton.errors import InputError, naming, reason
from lepton.model import Lepton
from lepton.model.weights import without_memory
from lepton.runtime.device import device_name, gpu_memory, keep_freed_memory, pick_device, pick_dtype
from lepton.train.corpus import Corpus, open_corpus
from lepton.train.cost import training_flops_per_token, training_seconds
from lepton.train.folder import RunFolder
from lepton.train.memory import mend, predicted_bytes
from lepton.train.metrics import BAD, MetricsLog, duration
from lepton.train.optimizer import Optimizers
from lepton.train.settings import TrainSettings
from lepton.train.start import Start

GRAD_ACCUM, GRAD_ACCUM_CPU = 16, 1
COUNTED_WINDOWS, COUNTED_AT_ONCE = 1024, 16
"""Windows in which the frequency of ids is counted."""


@dataclass(frozen=True)
class Parts:
    """What the trainer works with."""

    settings: TrainSettings
    """With `grad_accum` and `compile` settled for the device."""
    size: str | None
    device: torch.device
    tokenizer: Tokenizer
    corpus: Corpus
    model: Lepton
    optimizers: Optimizers
    folder: RunFolder


def assemble(start: Start) -> Parts:
    """Build the parts. Nothing of an earlier run is touched yet.

    Raises:
        InputError: a device, data or weights that cannot be used.
    """
    device = pick_device(start.settings.device)
    if device.type == "cpu":
        keep_freed_memory()
    settings = _for_device(start.settings, device)
    corpus = open_corpus(start, settings)
    model = _build_model(start, settings, device)
    if start.weights is None:
        for idea in model.ideas.values():
            idea.learn_frequencies(lambda: token_counts(corpus.train, model.config.vocab_size))
    optimizers = Optimizers(
        model,
        kind=settings.optimizer,
        lr=settings.lr,
        muon_lr=settings.muon_lr,
        weight_decay=settings.weight_decay,
    )
    if start.resumed is not None:
        _restore(start.resumed, optimizers, device)
    run_folder = RunFolder(settings.checkpoint_dir, keep=settings.keep)
    return Parts(settings, start.size, device, start.tokenizer, corpus, model, optimizers, run_folder)


def make_room(start: Start, folder: RunFolder, say: Callable[[str], None]) -> MetricsLog:
    """Move what the run would overwrite of an earlier one, and return its metrics.jsonl, cut at the first step."""
    goes_on = start.path is not None and start.path.parent.resolve() == folder.path.resolve()
    aside = folder.set_aside(after=start.step if goes_on else -1)
    if aside:
        hint = "" if goes_on else "; --resume auto would have gone on with it"
        say(f"{folder.path} held an earlier run, which is now in {aside}{hint}")
    bad = MetricsLog.rewind(folder.metrics, start.step)
    if bad:
        say(f"{folder.metrics}: {bad} line{'s' * (bad > 1)} without a step, moved to {folder.metrics.name}{BAD}")
    return MetricsLog(folder.metrics)


def introduce(parts: Parts, start: Start, say: Callable[[str], None]) -> None:
    """Say what is trained on what and for about how long, and what was decided on the way."""
    settings, model = parts.settings, parts.model
    assert settings.grad_accum is not None
    tokens = settings.batch_size * settings.grad_accum * settings.seq_len
    left = settings.max_steps - start.step
    flops = training_flops_per_token(model, settings.batch_size, settings.seq_len) * tokens * left
    seconds = training_seconds(flops, left * settings.grad_accum, parts.device, model.dtype)
    dtype = "bf16" if model.dtype is torch.bfloat16 else "fp32"
    name = f"{parts.size or 'model'}{', dense' if model.config.dense else ''}"
    data = parts.corpus.train.describe()
    say(
        f"{name}: {model.num_params() / 1e6:.1f} M parameters; {tokens:,} tokens a step; {data}; "
        f"{left:,} steps in about {duration(seconds)} on {device_name(parts.device)}, {dtype}"
    )
    if parts.device.type == "cpu":
        choices = {"grad_accum": f"--grad_accum {GRAD_ACCUM_CPU} instead of {GRAD_ACCUM}", "compile": "not compiled"}
        chosen = [text for name, text in choices.items() if getattr(start.settings, name) is None]
        if chosen:
            say(f"on a CPU: {', '.join(chosen)}; explicit flags win")
    memory = gpu_memory(parts.device)
    if memory is not None:
        available, total = memory
        predicted = predicted_memory(model, settings)
        say(f"GPU memory: about {predicted / 1e9:.1f} GB of {total / 1e9:.1f} GB")
        if predicted > available:
            use = mend(settings, lambda other: predicted_memory(model, other), available)
            say(f"only {available / 1e9:.1f} GB of it are free, which will hardly do: use {use}")
    for note in [*start.notes, *parts.corpus.notes]:
        say(note)


def predicted_memory(model: Lepton, settings: TrainSettings) -> int:
    """Return about how many bytes training `model` takes on a GPU."""
    return predicted_bytes(
        model, settings.batch_size, settings.seq_len, settings.checkpoint_activations, settings.optimizer
    )


def out_of_memory(start: Start) -> str:
    """Return what to tell a user whose run did not fit on the GPU, and what to change."""
    device = pick_device(start.settings.device)
    settings = _for_device(start.settings, device)
    with torch.device("meta"):
        model = Lepton(start.config)
    model.compute_dtype = pick_dtype(settings.dtype, device)
    memory = gpu_memory(device)
    assert memory is not None
    available, total = memory
    use = mend(settings, lambda other: predicted_memory(model, other), available)
    return f"out of GPU memory with --batch_size {settings.batch_size} on {total / 1e9:.0f} GB: use {use}"


def _for_device(settings: TrainSettings, device: torch.device) -> TrainSettings:
    """Settle what depends on the device; on a CPU smaller steps, which reach results in minutes."""
    grad_accum, compiled = settings.grad_accum, settings.compile
    if grad_accum is None:
        grad_accum = GRAD_ACCUM_CPU if device.type == "cpu" else GRAD_ACCUM
    if compiled is None:
        compiled = device.type == "cuda"
    if compiled and device.type == "cpu":
        raise InputError(
            "--compile: PyTorch's compiler for CPUs gets some of this model's gradients wrong (2.13); leave it out, "
            "nothing is slower for it"
        )
    return settings.replace(grad_accum=grad_accum, compile=compiled)


def _build_model(start: Start, settings: TrainSettings, device: torch.device) -> Lepton:
    if start.weights is not None:
        with without_memory(), naming("the checkpoint's weights do not fit this shape"):
            Lepton(start.config).load_state_dict(start.weights, assign=True)  # before any memory is taken
    torch.manual_seed(settings.seed)
    model = Lepton(start.config)
    if start.weights is not None:
        model.load_state_dict(start.weights)
    model.to(device).train()
    model.compute_dtype = pick_dtype(settings.dtype, device)
    model.checkpoint_activations = settings.checkpoint_activations
    return model


def token_counts(data: ShardedDataset, vocab_size: int) -> torch.Tensor:
    """Return how often each id occurs in the first windows of the data, int64 [vocab_size]."""
    seen = torch.zeros(vocab_size, dtype=torch.int64)
    for step in range(COUNTED_WINDOWS // COUNTED_AT_ONCE):
        tokens, lengths = data.batch(step, batch_size=COUNTED_AT_ONCE)
        valid = torch.arange(tokens.shape[1]) < lengths[:, None]
        seen += torch.bincount(tokens[valid], minlength=vocab_size)
    return seen


def _restore(content: dict[str, Any], optimizers: Optimizers, device: torch.device) -> None:
    """Take over the optimizers' state and the random generators of a checkpoint, once all of them fit."""
    random = {"cpu": torch.Generator()} | ({"cuda": torch.Generator(device)} if device.type == "cuda" else {})
    states = {name: content["rng"][name] for name in random if name in content["rng"]}
    try:
        for name, state in states.items():
            random[name].set_state(state)
    except (RuntimeError, TypeError) as error:
        raise InputError(f"the checkpoint's random generator cannot be set: {reason(error)}") from error
    if content["optimizer"]["kind"] == optimizers.kind:
        with naming("the checkpoint's optimizer"):
            optimizers.load_state_dict(content["optimizer"])
    torch.set_rng_state(states["cpu"])
    if "cuda" in states:
        torch.cuda.set_rng_state(states["cuda"], device)
