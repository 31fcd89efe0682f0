"""Constructors of the eight sizes, and of the dense baseline beside each."""

from typing import Any

import torch

from lepton.config import IDEAS, LeptonConfig
from lepton.errors import InputError, shown
from lepton.model import ideas as _ideas  # noqa: F401  (registers them)
from lepton.model.lepton import Lepton
from lepton.presets import preset

# A matrix width that is no multiple of 8 numbers halves the speed of a matrix unit.
WIDTH_STEP = 8

DENSE: dict[str, Any] = {"ideas": (), "window": None, "slot_bias": False}
"""What turns a configuration into that of the dense baseline: no ideas, and full attention."""


def size_config(size: str, *, dense: bool = False, **overrides: Any) -> LeptonConfig:
    """Return the configuration of a size with `overrides`, which `LeptonConfig.replace` takes.

    ``dense=True`` gives the baseline of equal parameters: no ideas, full attention, and an MLP that is widened
    until its parameters agree with those of the complete model within 1 % (unless `ffn` is given as well).

    Raises:
        InputError: an unknown size or field (the nearest match is named), or values that do not fit together.
    """
    if not isinstance(dense, bool):
        raise InputError(f"dense={shown(dense)}: must be True or False")
    complete = preset(size).config(IDEAS)
    if not dense:
        window = overrides.get("window", complete.window)
        if isinstance(window, int) and window < complete.segment:
            overrides = {"segment": window, **overrides}
        return complete.replace(**overrides)
    shape = {name: value for name, value in overrides.items() if name not in DENSE}
    baseline = complete.replace(**shape).replace(**DENSE).replace(**overrides)
    return baseline if "ffn" in overrides else widened(baseline, count_params(complete.replace(**shape)))


def widened(config: LeptonConfig, params: int) -> LeptonConfig:
    """Return `config` with the MLP widened to about `params` parameters, in steps that matrix units like."""
    missing = params - count_params(config)
    return config.replace(
        ffn=config.ffn + WIDTH_STEP * round(missing / (2 * config.width * config.layers * WIDTH_STEP))
    )


def count_params(config: LeptonConfig) -> int:
    """Parameters of the model that `config` describes, counted on the built model without allocating it."""
    with torch.device("meta"):
        return Lepton(config).num_params()


def create_lepton(size: str, **overrides: Any) -> Lepton:
    """Build the model of a size; `overrides` are fields of `LeptonConfig`, e.g. ``create_lepton("nano", window=16)``.

    Raises:
        InputError: see `size_config`.
    """
    return Lepton(size_config(size, **overrides))


def create_lepton_nano(**overrides: Any) -> Lepton:
    """NANO, 10 M parameters, for debugging."""
    return create_lepton("nano", **overrides)


def create_lepton_micro(**overrides: Any) -> Lepton:
    """MICRO, 25 M parameters, for quick experiments."""
    return create_lepton("micro", **overrides)


def create_lepton_tiny(**overrides: Any) -> Lepton:
    """TINY, 112 M parameters, for development."""
    return create_lepton("tiny", **overrides)


def create_lepton_small(**overrides: Any) -> Lepton:
    """SMALL, 160 M parameters, for overnight runs."""
    return create_lepton("small", **overrides)


def create_lepton_medium(**overrides: Any) -> Lepton:
    """MEDIUM, 350 M parameters, for real training."""
    return create_lepton("medium", **overrides)


def create_lepton_large(**overrides: Any) -> Lepton:
    """LARGE, 760 M parameters, full scale."""
    return create_lepton("large", **overrides)


def create_lepton_xl(**overrides: Any) -> Lepton:
    """XL, 1.5 B parameters, for a big GPU."""
    return create_lepton("xl", **overrides)


def create_lepton_xxl(**overrides: Any) -> Lepton:
    """XXL, 3 B parameters: go big or go home."""
    return create_lepton("xxl", **overrides)
