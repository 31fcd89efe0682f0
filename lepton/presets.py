"""The table of sizes: a line each."""

from dataclasses import dataclass

from lepton.config import LeptonConfig
from lepton.errors import InputError, nearest, shown


@dataclass(frozen=True)
class Preset:
    """A named size: what it is for, the parameters it aims at, and its shape."""

    name: str
    target_params: int
    purpose: str
    config: LeptonConfig


def _preset(
    name: str, millions: int, purpose: str, width: int, layers: int, heads: int, kv_heads: int, head_dim: int, ffn: int,
    memory_heads: int, draft_width: int, embed_rank: int | None = None,
) -> Preset:  # fmt: skip
    small = name == "nano"
    config = LeptonConfig(
        width=width,
        layers=layers,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        ffn=ffn,
        embed_rank=embed_rank,
        thoughts=2 if small else 4,
        thought_ffn=width,
        memory_heads=memory_heads,
        key_dim=32 if small else 64,
        value_dim=64 if small else 128,
        hint=32 if small else 64,
        exit_width=width // 2,
        draft_width=draft_width,
    )
    return Preset(name, millions * 1_000_000, purpose, config)


# The targets hold for the complete model: every trainable parameter that inference uses. From TINY on the MLP's width
# is a multiple of 256: a GPU computes a product in tiles of up to so many columns, and the last one as a whole too.
#           name      M     purpose             width layers heads kv head  ffn  memory draft embedding
_TABLE = (
    _preset("nano",   10,   "debugging",         192,   7,    3,   1,  64,   800,  2,  128, 128),
    _preset("micro",  25,   "quick experiments", 384,   6,    6,   2,  64,  1600,  3,  192, 256),
    _preset("tiny",   112,  "development",       768,  12,   12,   4,  64,  2560,  4,  256),
    _preset("small",  160,  "overnight runs",    896,  12,   14,   2,  64,  3840,  4,  256),
    _preset("medium", 350,  "real training",    1152,  19,   18,   6,  64,  4864,  6,  256),
    _preset("large",  760,  "full scale",       1536,  26,   12,   4, 128,  6144,  6,  384),
    _preset("xl",     1500, "a big GPU",        2048,  30,   16,   4, 128,  8448,  8,  512),
    _preset("xxl",    3000, "go big or go home", 2560, 40,   20,   4, 128, 10752,  8,  512),
)  # fmt: skip

SIZES: dict[str, Preset] = {preset.name: preset for preset in _TABLE}


def preset(name: str) -> Preset:
    """Return the size called `name`; an unknown one raises InputError with the nearest match."""
    if not isinstance(name, str) or name not in SIZES:
        raise InputError(f"unknown model size {shown(name)}{nearest(name, SIZES)}")
    return SIZES[name]
