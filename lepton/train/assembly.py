"""The parts of a run, built from its starting point: device, data, model, optimizers, folder."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from lepton.data.shards import ShardedDataset
from lepton.data.tokenizer import Tokenizer
from lepton.distributed import Ranks
from lepton.errors import InputError, naming, reason
from lepton.model import Network
from lepton.model.weights import on_meta_device
from lepton.requirements import need
from lepton.runtime.device import gpu_memory, keep_freed_memory, pick_device, pick_dtype, synchronize
from lepton.train.folder import RunFolder
from lepton.train.memory_forecast import predicted_memory
from lepton.train.metrics_log import BAD, MetricsLog
from lepton.train.optimizer import Optimizers
from lepton.train.phases import Phases
from lepton.train.run_data import RunData, open_run_data
from lepton.train.settings import TrainSettings
from lepton.train.sharding import shard
from lepton.train.split import check_shared, largest_split, validated_alike
from lepton.train.starting_point import StartingPoint
from lepton.train.tensorboard import TensorBoardLog

GRAD_ACCUM, GRAD_ACCUM_CPU = 16, 1
COUNTED_WINDOWS, COUNTED_AT_ONCE = 1024, 16
"""Windows in which the frequencies of ids are counted, and how many of them at a time."""


@dataclass(frozen=True)
class Parts:
    """Everything that the trainer works with."""

    settings: TrainSettings
    """With the split of a step and `compile` decided for the device."""
    size: str | None
    device: torch.device
    tokenizer: Tokenizer
    data: RunData
    model: Network
    optimizers: Optimizers
    folder: RunFolder


def assemble(start: StartingPoint, phases: Phases | None = None, ranks: Ranks | None = None) -> Parts:
    """Build the parts. Nothing of an earlier run is touched yet. `phases` counts the seconds.

    Of several `ranks`, each builds its own, which share the micro-batches and Muon's work.

    Raises:
        InputError: a device, data or weights that cannot be used.
    """
    if start.settings.tensorboard:
        need("tensorboard", "--tensorboard")
    phases, ranks = phases or Phases(), ranks or Ranks()
    if start.settings.shard and not ranks.several:
        raise InputError(
            "--shard: one process has nobody to share with; start several with torchrun --nproc_per_node N"
        )
    with phases("device"):
        device = pick_device(start.settings.device)
        synchronize(device)  # the first call to a GPU takes a second or more
        settings = settle_for_device(start.settings, device)
        if device.type == "cpu":
            keep_freed_memory()
    if settings.compile:
        with phases("compile"):
            torch.compile(lambda: None)  # starts the compiler's workers, which take a while, beside what follows
    with phases("data"):
        prepares = settings.data_dir is None  # the default corpus, which rank 0 does alone
        if prepares and not ranks.leads:
            ranks.wait()
        data = open_run_data(start, settings)
        if prepares and ranks.leads:
            ranks.wait()
    with phases("model"):
        model = _build_model(start, settings, device)
        if start.weights is None:
            for idea in model.ideas.values():
                idea.learn_frequencies(lambda: token_counts(data.train, model.config.vocab_size))
        settings = ranks.told(with_split(settings, model, device, ranks))
        check_shared(settings, ranks.size)
        mesh = ranks.mesh(device.type, by_host=settings.shard) if ranks.several else None
        if settings.shard and mesh is not None:
            shard(model, mesh)
        else:
            ranks.copy_([*model.parameters(), *model.buffers()])
        optimizers = Optimizers(
            model,
            kind=settings.optimizer,
            lr=settings.lr,
            muon_lr=settings.muon_lr,
            weight_decay=settings.weight_decay,
            mesh=mesh,
        )
        if start.resumed is not None:
            _restore(start.resumed, optimizers, device)
    run_folder = RunFolder(settings.checkpoint_dir, keep=settings.keep, owned=ranks.leads)
    return Parts(settings, start.size, device, start.tokenizer, data, model, optimizers, run_folder)


def make_room(
    start: StartingPoint, folder: RunFolder, say: Callable[[str], None], *, tensorboard: bool = False
) -> MetricsLog:
    """Move aside what the run would overwrite of an earlier one; return the metrics.jsonl, cut at the first step."""
    goes_on = start.path is not None and start.path.parent.resolve() == folder.path.resolve()
    aside = folder.set_aside(after=start.step if goes_on else -1)
    if aside:
        hint = "" if goes_on else "; --resume auto would have gone on with it"
        say(f"{folder.path} held an earlier run, which is now in {aside}{hint}")
    bad = MetricsLog.rewind(folder.metrics, start.step)
    if bad:
        say(f"{folder.metrics}: {bad} line{'s' * (bad > 1)} without a step, moved to {folder.metrics.name}{BAD}")
    return TensorBoardLog(folder.metrics, start.step) if tensorboard else MetricsLog(folder.metrics)


def settle_for_device(settings: TrainSettings, device: torch.device) -> TrainSettings:
    """Return `settings` with `grad_accum` and `compile` decided; a CPU takes smaller steps, to be done in minutes."""
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


def with_split(
    settings: TrainSettings, model: Network, device: torch.device | None = None, ranks: Ranks | None = None
) -> TrainSettings:
    """Return `settings` with a `batch_size` that `model` has room for on `device`, by default its own.

    The `ranks` share the micro-batches of a step. A number that the user or a checkpoint has given stays.
    """
    if settings.batch_size is not None:
        return settings
    memory = gpu_memory(device or model.device)
    ranks = ranks or Ranks()
    predicted = partial(predicted_memory, model, shards=ranks.shards)
    found = largest_split(settings, predicted, memory and memory[0], ranks.size)
    return validated_alike(found, settings.eval_batches)  # whatever the memory


def _build_model(start: StartingPoint, settings: TrainSettings, device: torch.device) -> Network:
    if start.weights is not None:
        with on_meta_device(), naming("the checkpoint's weights do not fit this shape"):
            Network(start.config).load_state_dict(start.weights, assign=True)  # before any memory is taken
    torch.manual_seed(settings.seed)
    model = Network(start.config)
    if start.weights is not None:
        model.load_state_dict(start.weights)
    model.train()
    model.compute_dtype = pick_dtype(settings.dtype, device)
    if not settings.shard:  # else it moves there a block at a time
        model.to(device)
    model.checkpoint_activations = settings.checkpoint_activations
    return model


def token_counts(data: ShardedDataset, vocab_size: int) -> torch.Tensor:
    """Return how often each id occurs in the first windows of the data, int64 [vocab_size]."""
    seen = torch.zeros(vocab_size, dtype=torch.int64)
    for step in range(COUNTED_WINDOWS // COUNTED_AT_ONCE):
        tokens, lengths, _ = data.batch(step, batch_size=COUNTED_AT_ONCE)
        valid = torch.arange(tokens.shape[1]) < lengths[:, None]
        seen += torch.bincount(tokens[valid], minlength=vocab_size)
    return seen


def _restore(content: dict[str, Any], optimizers: Optimizers, device: torch.device) -> None:
    """Load optimizers and random generators from a checkpoint: all of them, or none if one does not fit."""
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
