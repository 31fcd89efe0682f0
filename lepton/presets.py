"""The table of sizes: a line each. What the ideas of a size are made of stands beside each idea, in its `preset`."""

from dataclasses import dataclass

from lepton.config import IdeaConfig, LeptonConfig
from lepton.errors import InputError, nearest, shown


@dataclass(frozen=True)
class Preset:
    """A named size: what it is for, the parameters it aims at, and the shape of its trunk."""

    name: str
    millions: int
    """Parameters of the complete model, every trainable one that inference uses."""
    purpose: str
    width: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    embed_rank: int | None = None

    @property
    def target_params(self) -> int:
        """Parameters that the complete model aims at."""
        return self.millions * 1_000_000

    def config(self, ideas: dict[str, type[IdeaConfig]]) -> LeptonConfig:
        """Return the configuration with `ideas`, at what they use in this size."""
        return LeptonConfig(
            width=self.width,
            layers=self.layers,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=self.head_dim,
            ffn=self.ffn,
            embed_rank=self.embed_rank,
            wide_window=512,
            shifted_keys=True,
            token_shift=True,
            backout=True,
            ideas=tuple(idea.preset(self.name, self.width) for idea in ideas.values()),
        )


# Few wide layers: TINY with 8 layers learns as much from a token as with 12, and trains and generates faster
# (docs/log.md, 2026-11-27). From TINY on the MLP's width is a multiple of 256: a GPU computes a product in tiles of up
# to 256 columns, and a partial last tile costs as much as a full one.
#           name      M     purpose             width layers heads kv head  ffn  embedding
_TABLE = (
    Preset("nano",   10,   "debugging",         192,   7,    3,   1,  64,   800, 128),
    Preset("micro",  25,   "quick experiments", 384,   6,    3,   1, 128,  1600, 256),
    Preset("tiny",   112,  "development",       768,   8,    6,   2, 128,  4352),
    Preset("small",  160,  "overnight runs",    896,   9,    7,   1, 128,  5632),
    Preset("medium", 350,  "real training",    1152,  14,    9,   3, 128,  7168),
    Preset("large",  760,  "full scale",       1536,  20,   12,   4, 128,  8704),
    Preset("xl",     1500, "a big GPU",        2048,  24,   16,   4, 128, 11264),
    Preset("xxl",    3000, "go big or go home", 2560, 30,   20,   4, 128, 15360),
)  # fmt: skip

SIZES: dict[str, Preset] = {preset.name: preset for preset in _TABLE}


def preset(name: str) -> Preset:
    """Return the size called `name`; an unknown one raises InputError with the nearest match."""
    if not isinstance(name, str) or name not in SIZES:
        raise InputError(f"unknown model size {shown(name)}{nearest(name, SIZES)}")
    return SIZES[name]
