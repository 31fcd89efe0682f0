"""Messages to the user before the first step, and when the GPU's memory is too small."""

from collections.abc import Callable
from functools import partial

import torch

from lepton.distributed import Ranks
from lepton.model import Network
from lepton.model.weights import on_meta_device
from lepton.runtime.device import device_name, gpu_memory, pick_device, pick_dtype
from lepton.train.assembly import GRAD_ACCUM, GRAD_ACCUM_CPU, Parts, settle_for_device, with_split
from lepton.train.cost import training_flops_per_token, training_seconds
from lepton.train.memory_forecast import fitting_flags, predicted_memory
from lepton.train.progress import duration
from lepton.train.settings import TrainSettings
from lepton.train.starting_point import StartingPoint


def introduce(parts: Parts, start: StartingPoint, say: Callable[[str], None], ranks: Ranks | None = None) -> None:
    """Say what is trained on which data, about how long the processes will take, and which choices were made."""
    ranks = ranks or Ranks()
    processes = ranks.size
    settings, model = parts.settings, parts.model
    batch_size, grad_accum = settings.split
    tokens = batch_size * grad_accum * settings.seq_len
    left = settings.max_steps - start.step
    flops = training_flops_per_token(model, batch_size, settings.seq_len) * tokens * left
    seconds = training_seconds(flops / processes, left * grad_accum // processes, parts.device, model.dtype)
    dtype = "bf16" if model.dtype is torch.bfloat16 else "fp32"
    name = f"{parts.size or 'model'}{', dense' if model.config.dense else ''}"
    data = parts.data.train.describe()
    say(
        f"{name}: {model.num_params() / 1e6:.1f} M parameters; {tokens:,} tokens per step; {data}; "
        f"{left:,} steps in about {duration(seconds)} on "
        f"{f'{processes} x ' if processes > 1 else ''}{device_name(parts.device)}, {dtype}"
    )
    if parts.device.type == "cpu":
        choices = {"grad_accum": f"--grad_accum {GRAD_ACCUM_CPU} instead of {GRAD_ACCUM}", "compile": "not compiled"}
        chosen = [text for name, text in choices.items() if getattr(start.settings, name) is None]
        if chosen:
            say(f"on a CPU: {', '.join(chosen)}; explicit flags win")
    if start.settings.batch_size is None:
        say(f"--batch_size auto: {rows_a_time(settings)}")
    memory = gpu_memory(parts.device)
    if memory is not None:
        available, total = memory
        predicted = predicted_memory(model, settings, ranks.shards)
        say(f"GPU memory: about {predicted / 1e9:.1f} GB of {total / 1e9:.1f} GB")
        if predicted > available:
            own = partial(predicted_memory, model, shards=ranks.shards)
            use = fitting_flags(settings, own, available, partial(predicted_memory, model))
            say(f"only {available / 1e9:.1f} GB of it are free, which will hardly do: use {use}")
    for note in [*start.notes, *parts.data.notes]:
        say(note)


def rows_a_time(settings: TrainSettings) -> str:
    """Return the split of a step in words."""
    batch_size, grad_accum = settings.split
    times = "at once" if grad_accum == 1 else f"{batch_size} at a time"
    return f"the {batch_size * grad_accum} rows of a step {times}"


def out_of_memory(start: StartingPoint, settings: TrainSettings | None = None) -> str:
    """Return the error message of a run that did not fit on the GPU: what happened, and which flags would fit.

    `settings` are those of the run, if they were decided before it failed.
    """
    device = pick_device(start.settings.device)
    settings = settings or settle_for_device(start.settings, device)
    with on_meta_device():
        model = Network(start.config)
    model.compute_dtype = pick_dtype(settings.dtype, device)
    settings = with_split(settings, model, device)
    memory = gpu_memory(device)
    assert memory is not None
    available, total = memory
    sharded = partial(predicted_memory, model)
    use = fitting_flags(settings, sharded, available, sharded)
    return f"out of GPU memory with --batch_size {settings.batch_size} on {total / 1e9:.0f} GB: use {use}"
