"""Every choice of a training run that is not the model's shape: a flag of the command line each."""

import dataclasses
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import Any

from lepton.errors import InputError, nearest

OPTIMIZERS = ("muon", "adamw")
DTYPES = ("auto", "bf16", "fp32")
NOT_INHERITED = (
    "checkpoint_dir", "resume", "init_from", "allow_other_data", "device", "compile", "threads", "overrides",
    "model_size", "dense", "shard",
)  # fmt: skip
"""Settings that a resumed run does not inherit: where it runs, what is allowed once, and what the checkpoint's own
config says."""
BATCH_SIZE = 4
"""Rows of a micro-batch, unless the user says another number."""
MAX_SEED = 2**64 - 1
MAX_STEP_TOKENS = 2**28
"""Most tokens per optimizer step; all of them are read at once, 2 GiB."""
MAX_THREADS = 4096


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Settings of one run. `None` leaves the choice to the trainer, as the field says."""

    model_size: str | None = None
    """Name of the size; None is 'tiny', or the checkpoint's own size when one is resumed or initialised from."""
    dense: bool = False
    """Train the baseline of equal parameters, without any of the ideas."""
    overrides: Mapping[str, Any] = field(default_factory=dict)
    """Fields of `LeptonConfig` that differ from the size's."""
    data_dir: str | None = None
    """Folder of shard_*.npy; None is the default corpus, the Python standard library's source."""
    tokenizer: str | None = None
    """Tokenizer file; None is the checkpoint's own, pile_tokenizer.json if it exists, or the shipped one."""
    seq_len: int = 512
    """Targets of a training window."""
    batch_size: int | None = BATCH_SIZE
    """Windows of a micro-batch; None: a step has 4 x grad_accum windows, and as many of them as fit into the GPU's
    memory make a micro-batch. A run that resumes one keeps its split."""
    grad_accum: int | None = None
    """Micro-batches of an optimizer step; None is 16, and 1 on a CPU."""
    max_steps: int = 50_000
    """Optimizer steps in all, those before a resume included."""
    seed: int = 0
    """Decides the initial weights and the order of the data; any number of 64 bits."""
    lr: float = 6e-4
    """Peak rate of AdamW."""
    muon_lr: float = 0.02
    """Peak rate of Muon, in units of the spectral norm of an update, so that one value serves every width."""
    optimizer: str = "muon"
    """'muon': Muon for the matrices of blocks, AdamW for the rest; 'adamw': AdamW for everything."""
    weight_decay: float = 0.1
    """Each step matrices outside the embedding shrink by weight_decay x lr (AdamW's rate, for both optimizers)."""
    warmup_steps: int = 40
    """Steps of linear warm-up, at most a tenth of max_steps."""
    cooldown: float = 0.4
    """Share of max_steps, at the end, over which the rates fall linearly; between is the peak."""
    min_lr_ratio: float = 0.0
    """Where the cool-down ends, as a share of the peak."""
    grad_clip: float = 1.0
    """Largest norm of the gradient; larger ones are scaled down to it."""
    checkpoint_dir: str = "checkpoints"
    """Folder of checkpoints and metrics.jsonl."""
    resume: str | None = None
    """Checkpoint to continue from; 'auto' is the newest whole one in checkpoint_dir, or a fresh start without one."""
    allow_other_data: bool = False
    """Continue from a checkpoint although the data in its `data_dir` have changed since."""
    init_from: str | None = None
    """Checkpoint whose weights a new run starts from."""
    save_every: int = 1000
    """Steps between checkpoints."""
    keep: int = 3
    """Newest step_N.pt that are kept; best.pt and final.pt always are."""
    eval_every: int = 500
    """Steps between validations."""
    eval_batches: int = 16
    """Batches of a validation."""
    log_every: int = 10
    """Steps between progress lines."""
    tensorboard: bool = False
    """Also write the metrics for TensorBoard, into the folder `tensorboard` in `checkpoint_dir`."""
    sample_every: int = 1000
    """Steps between text samples."""
    sample_prompt: str | None = None
    """Text that samples continue; None is the beginning of the validation data."""
    sample_tokens: int = 64
    """New tokens of a sample."""
    device: str | None = None
    """Device such as 'cuda:1'; None is an NVIDIA or AMD GPU if there is any, else the CPU."""
    dtype: str = "auto"
    """Arithmetic of the model: 'bf16', 'fp32', or 'auto': bf16 where the hardware has it. Parameters stay fp32."""
    checkpoint_activations: bool = False
    """Store only each block's inputs and recompute it in the backward pass: slower, in less memory."""
    shard: bool = False
    """Each of several processes keeps a share of weights, gradients and optimizer state: for models that one card
    cannot hold."""
    compile: bool | None = None
    """Compile the parts that the model repeats; None compiles on a GPU. A CPU cannot."""
    threads: int | None = None
    """CPU threads; None leaves torch's choice."""

    def __post_init__(self) -> None:
        for name, annotation in _ANNOTATIONS.items():
            object.__setattr__(self, name, _plain(name, getattr(self, name), annotation))
        if not isinstance(self.overrides, Mapping):
            raise InputError(f"overrides={self.overrides!r}: must be a dict of configuration fields")
        for name in _AT_LEAST_ONE:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise InputError(f"{name}={value}: must be at least 1")
        for name in ("lr", "muon_lr", "grad_clip"):
            if not 0 < getattr(self, name) < float("inf"):
                raise InputError(f"{name}={getattr(self, name)}: must be a positive number")
        for name in ("weight_decay", "warmup_steps"):
            if not 0 <= getattr(self, name) < float("inf"):
                raise InputError(f"{name}={getattr(self, name)}: must not be negative")
        if not 0 <= self.seed <= MAX_SEED:
            raise InputError(f"seed={self.seed}: must lie in 0..{MAX_SEED} (64 bits)")
        rows, count = self.batch_size or BATCH_SIZE, self.grad_accum or 1
        tokens = rows * count * self.seq_len
        if tokens > MAX_STEP_TOKENS:
            raise InputError(
                f"batch_size={rows} x grad_accum={count} x seq_len={self.seq_len} are "
                f"{tokens:,} tokens per step: must be at most {MAX_STEP_TOKENS:,}"
            )
        if self.threads is not None and self.threads > MAX_THREADS:
            raise InputError(f"threads={self.threads}: must be at most {MAX_THREADS}")
        for name in ("cooldown", "min_lr_ratio"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}={getattr(self, name)}: must lie in 0..1")
        for name, choices in (("optimizer", OPTIMIZERS), ("dtype", DTYPES)):
            if getattr(self, name) not in choices:
                raise InputError(f"unknown {name} '{getattr(self, name)}'{nearest(getattr(self, name), choices)}")
        if self.sample_prompt == "":
            raise InputError(
                "sample_prompt is empty: give a text, or leave it out for the beginning of the held-out data"
            )
        if self.resume and self.init_from:
            raise InputError(f"resume={self.resume} and init_from={self.init_from}: give one of them")

    @property
    def split(self) -> tuple[int, int]:
        """The rows of a micro-batch and the micro-batches of a step, once both are decided."""
        assert self.batch_size is not None
        assert self.grad_accum is not None
        return self.batch_size, self.grad_accum

    def replace(self, **changes: Any) -> "TrainSettings":
        """Return a copy with `changes`."""
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values, the form that a checkpoint stores."""
        return {**dataclasses.asdict(self), "overrides": dict(self.overrides)}

    def changed(self) -> set[str]:
        """Return the names of the settings that differ from their defaults."""
        mine, default = self.to_dict(), TrainSettings().to_dict()
        return {name for name in mine if mine[name] != default[name]}

    def resumed_from(self, saved: Mapping[str, Any], given: Collection[str]) -> tuple["TrainSettings", list[str]]:
        """Return the settings of a run that resumes one with settings `saved`, and the changes, a line each.

        The settings named in `given` win; the others keep their saved values. A `batch_size` of None leaves the split
        as it was, so that the command that began a run also goes on with it.

        Raises:
            InputError: `batch_size` is None, and `grad_accum` asks for another number of rows in a step.
        """
        if self.batch_size is None:
            given = set(given) - {"batch_size", "grad_accum"}
        names = [field.name for field in dataclasses.fields(self) if field.name not in NOT_INHERITED]
        inherited = {name: saved[name] for name in names if name in saved and name not in given}
        changes = [
            f"{name}: {saved[name]} -> {getattr(self, name)}"
            for name in names
            if name in given and name in saved and saved[name] != getattr(self, name)
        ]
        resumed = self.replace(**inherited)
        if self.batch_size is None and self.grad_accum is not None:
            rows, count, asked = resumed.batch_size, resumed.grad_accum, BATCH_SIZE * self.grad_accum
            if rows and count and rows * count != asked:
                raise InputError(
                    f"--batch_size auto --grad_accum {self.grad_accum} is a step of {asked} rows, the run to resume "
                    f"has {rows} x {count}: leave both flags out, or give two numbers"
                )
        return resumed, changes


_PLAIN: dict[type, tuple[Any, str]] = {
    bool: (bool, "True or False"),
    int: (Integral, "a whole number of 64 bits"),
    float: (Real, "a number"),
    str: (str | os.PathLike, "a text"),
}
"""Types of the settings: what else is taken for each, and its name."""


def _plain(name: str, value: Any, annotation: Any) -> Any:
    """Return `value` as the plain type of the field `name`, which a checkpoint can hold.

    Paths become str, numbers of numpy Python's. Raises InputError for a value of another type.
    """
    kind = next(kind for kind in _PLAIN if annotation in (kind, kind | None))
    accepted, words = _PLAIN[kind]
    optional = annotation != kind
    if value is None and optional:
        return None
    shown = repr(value)[:100] if not isinstance(value, int) or abs(value) < 2**64 else "a number of more bits"
    wrong = InputError(f"{name}={shown}: must be {words}{' or None' if optional else ''}")
    if not isinstance(value, accepted) or isinstance(value, bool) != (kind is bool):
        raise wrong
    try:
        plain = os.fspath(value) if kind is str else kind(value)
    except OverflowError:  # a whole number that is too large for a float
        raise wrong from None
    if (kind is str and "\0" in plain) or (kind is int and abs(plain) >= 2**64):
        raise wrong
    return plain


_ANNOTATIONS = {each.name: each.type for each in dataclasses.fields(TrainSettings) if each.name != "overrides"}
_AT_LEAST_ONE = (
    "seq_len", "batch_size", "grad_accum", "max_steps", "save_every", "keep", "eval_every", "eval_batches", "log_every",
    "sample_every", "sample_tokens", "threads",
)  # fmt: skip
