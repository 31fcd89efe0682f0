"""What a trial of the trunk can change: a field for each switch, whose default is what the product does today."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lepton.config import LeptonConfig, check_type
from lepton.errors import InputError, naming, nearest, shown
from lepton.files import parse_json
from lepton.model.parameters import BACKOUT, EMBEDDING, EMBEDDING_MATRIX, SHIFT
from lepton.model.size_config import size_config
from lepton.train.optimizer import BETAS, MOMENTUM
from lepton.train.settings import TrainSettings

DEFAULTS = TrainSettings()
CHOICES = {
    "shifted_keys": ("none", "odd", "even", "all"),
    "smear": ("none", "gated", "channels"),
    "decay_schedule": ("constant", "cosine"),
    "newton_schulz": ("quintic", "polar_express"),
}
SHAPE = ("width", "layers", "heads", "kv_heads", "head_dim", "ffn", "embed_rank", "rope_base")
"""Fields of `LeptonConfig`; what a trial does not say of them is that of its size."""
Betas = tuple[float, float]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """One run: a shape of the trunk, its switches, its optimizer and its data. `read` makes one of a line of a queue.

    Rates are peaks. The schedule of the run, a number in 0..1 a step, multiplies all of them.
    """

    name: str
    """What the row of results is called; each of a queue has its own."""
    size: str = "tiny"
    """The size whose dense baseline gives what is not said of the shape."""

    width: int
    """Width of the residual stream."""
    layers: int
    """Blocks."""
    heads: int
    """Query heads of a block."""
    kv_heads: int
    """Heads of keys and values; each serves heads / kv_heads query heads."""
    head_dim: int
    """Width of a head."""
    ffn: int
    """Hidden width of an MLP; by default the parameters are those of the complete model of the same shape."""
    embed_rank: int | None
    """Width of the embedding; None: that of the stream."""
    rope_base: float
    """Base of the rotary wavelengths."""
    vocab_size: int = LeptonConfig.vocab_size
    """Token ids of the data."""

    tied: bool = True
    """Whether the embedding is also the head."""
    rotary_share: float = 0.5
    """Share of a head that is rotated by position, from its beginning; in 0..1."""
    query_gain: float = 1.0
    """Factor on the normed queries, and so on all attention scores."""
    shifted_keys: str = "odd"
    """Blocks, counted from 0, in which the second half of a key is that of the token before: none, odd, even, all."""
    smear: str = "channels"
    """What is added of the previous token's embedding: none; 'gated', a gate of the token's first channels times one
    learned number; 'channels', a learned number for each channel (a token shift)."""
    residual_scale: bool = False
    """Whether each block first multiplies the stream by a learned number, at first 1.15 to 1.05 from below to above."""
    reinjection: bool = False
    """Whether each block first adds the embedding, times a learned number, at first 0.2 to 0.05."""
    backout: bool = True
    """Whether the stream of the middle, times a learned number, is subtracted at the end."""
    conv: int = 0
    """Tokens that a causal convolution on keys and values reads, a filter for each channel; 0 or 1: there is none."""
    head_gates: bool = False
    """Whether each head's output is multiplied by a gate of the token's first channels, at first 1."""

    embed_std: float = 0.02
    """Standard deviation of the embedding at the start."""
    head_std: float = 0.001
    """That of an untied head."""
    embed_lr: float = EMBEDDING.rate * DEFAULTS.lr
    """Rate of the embedding."""
    head_lr: float = EMBEDDING.rate * DEFAULTS.lr
    """Rate of an untied head."""
    projection_lr: float = EMBEDDING_MATRIX.rate * DEFAULTS.lr
    """Rate of the two projections of an embedding with a rank."""
    scale_lr: float = 0.005
    """Rate of `residual_scale`."""
    reinjection_lr: float = 0.5
    """Rate of `reinjection`."""
    smear_lr: float = SHIFT.rate * DEFAULTS.lr
    """Rate of `smear`; the gated form was tried at 0.14."""
    backout_lr: float = BACKOUT.rate * DEFAULTS.lr
    """Rate of `backout`."""
    conv_lr: float = 0.01
    """Rate of `conv`."""
    gate_lr: float = 0.02
    """Rate of `head_gates`."""
    betas: Betas = BETAS
    """AdamW's, of embedding, head and projections. Learned numbers and filters have their own."""
    embed_betas: Betas | None = None
    """Those of the embedding; None: `betas`."""
    head_betas: Betas | None = None
    """Those of an untied head; None: `betas`."""
    projection_decay: float = DEFAULTS.weight_decay
    """Share that the projections of the embedding lose in a step, times their rate."""

    muon_lr: float = DEFAULTS.muon_lr
    """Rate of Muon, in units of the spectral norm of an update."""
    weight_decay: float = DEFAULTS.weight_decay * DEFAULTS.lr / DEFAULTS.muon_lr
    """Share that a matrix of a block loses in a step, times Muon's rate."""
    decay_schedule: str = "constant"
    """What multiplies `weight_decay`, besides the rate: 'constant', 1; 'cosine', half a cosine from 1 to 0."""
    cautious: bool = False
    """Whether only those numbers of a matrix decay that the update moves towards 0, too (arXiv 2411.16085)."""
    newton_schulz: str = "quintic"
    """Coefficients of the orthogonalisation: 'quintic', five equal steps; 'polar_express' (arXiv 2505.16932)."""
    row_equilibration: bool = False
    """Whether the rows of a momentum are given one norm before it is orthogonalised."""
    renormalisation: bool = False
    """Whether an update is then given the Frobenius norm of an exactly orthogonal one."""
    second_moments: bool = True
    """Whether an update's rows (of a wide matrix its columns) are divided by a running mean of their size; the norm of
    the whole stays (NorMuon, arXiv 2510.05491)."""
    momentum: tuple[float, float, float] = (MOMENTUM, MOMENTUM, MOMENTUM)
    """Muon's at the start, at the peak, and at the end of the cool-down; linear between them."""
    momentum_steps: int = 300
    """Steps from the start's momentum to the peak's."""

    warmup_steps: int = DEFAULTS.warmup_steps
    """Steps of linear warm-up, at most a tenth of the run."""
    cooldown: float = DEFAULTS.cooldown
    """Share of the steps, at the end, over which the rates fall linearly."""
    final_rate: float = DEFAULTS.min_lr_ratio
    """Where the cool-down ends, as a share of the peak."""
    clip: float = DEFAULTS.grad_clip
    """Largest norm of the gradient; 0: it is not clipped."""
    rows: int = 64
    """Rows of a batch."""
    seq_len: int = DEFAULTS.seq_len
    """Targets of a row."""
    tokens: float = 24.5e6
    """Tokens of the whole run."""
    seed: int = 0
    """Decides the initial weights and the order of the data."""

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if "tuple" in str(field.type):
                object.__setattr__(self, field.name, _numbers(field, value))
            else:
                check_type(field.name, value, field.type)
            if isinstance(value, float) and not math.isfinite(value):
                raise InputError(f"{field.name}={value}: must be a finite number")
        for name, choices in CHOICES.items():
            if getattr(self, name) not in choices:
                raise InputError(f"unknown {name} '{getattr(self, name)}'{nearest(getattr(self, name), choices)}")
        for name in ("rows", "seq_len", "steps", "vocab_size"):
            if getattr(self, name) < 1:
                raise InputError(f"{name}={getattr(self, name)}: must be at least 1 (tokens={self.tokens:g})")
        for name in ("rotary_share", "cooldown", "final_rate"):
            if not 0 <= getattr(self, name) <= 1:
                raise InputError(f"{name}={getattr(self, name)}: must lie in 0..1")
        for name in ("conv", "clip", "weight_decay", "projection_decay", "warmup_steps", "momentum_steps"):
            if getattr(self, name) < 0:
                raise InputError(f"{name}={getattr(self, name)}: must not be negative")

    @property
    def steps(self) -> int:
        """Optimizer steps of the run."""
        return int(self.tokens) // (self.rows * self.seq_len)

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding, as the product pads them."""
        return -(-self.vocab_size // 128) * 128

    def shifts_keys(self, layer: int) -> bool:
        """Return whether a block, counted from 0, has shifted keys."""
        return self.shifted_keys in ("all", "odd" if layer % 2 else "even")

    @staticmethod
    def read(fields: Mapping[str, Any]) -> "Trial":
        """Return the trial of a line of a queue, which is filled up with the shape of its size.

        Raises:
            InputError: an unknown field, with the nearest name, or a value that cannot be used.
        """
        if not isinstance(fields, Mapping):
            raise InputError(f'{shown(fields)} is no trial: write {{"name": ..., FIELD: VALUE, ...}}')
        names = [field.name for field in dataclasses.fields(Trial)]
        for name in fields:
            if name not in names:
                raise InputError(f"unknown field {shown(name)}{nearest(name, names)}")
        if not isinstance(fields.get("name"), str) or not fields["name"] or "/" in fields["name"]:
            raise InputError(f"name={shown(fields.get('name'))}: must be a text without '/', one of its own a trial")
        config = size_config(
            fields.get("size", Trial.size), dense=True, **{name: fields[name] for name in SHAPE if name in fields}
        )
        return Trial(**{**{name: getattr(config, name) for name in SHAPE}, **fields})


LOGIT_CAP = LeptonConfig.logit_cap


def _numbers(field: "dataclasses.Field[Any]", value: Any) -> tuple[float, ...] | None:
    """Return the value of a field that holds several numbers; JSON has lists for them."""
    count = str(field.type).count("float")
    if value is None and "None" in str(field.type):
        return None
    if not isinstance(value, list | tuple) or len(value) != count or not all(_in_unit(each) for each in value):
        raise InputError(f"{field.name}={shown(value)}: must be {count} numbers from 0 to below 1")
    return tuple(map(float, value))


def _in_unit(value: Any) -> bool:
    return isinstance(value, int | float) and 0 <= value < 1


def read_queue(path: Path) -> list[Trial]:
    """Read a queue, a JSON object a line; empty lines and those that begin with # do not count.

    Raises:
        InputError: the file cannot be read, or a line is no trial; its number is named.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"cannot read the queue {path}: {error}") from None
    trials: dict[str, Trial] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        with naming(f"{path}, line {number}"):
            trial = Trial.read(parse_json(line, "the line"))
            if trial.name in trials:
                raise InputError(f"there is a trial '{trial.name}' already; give each a name of its own")
        trials[trial.name] = trial
    return list(trials.values())
