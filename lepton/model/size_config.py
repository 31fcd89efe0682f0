"""The configurations of the eight sizes, and of the dense baseline beside each."""

from typing import Any

from lepton.config import IDEAS, LeptonConfig
from lepton.errors import InputError, shown
from lepton.model import ideas as _ideas  # noqa: F401  (registers them)
from lepton.model.modules import Modules
from lepton.model.weights import on_meta_device
from lepton.presets import preset

# A matrix width that is not a multiple of 8 numbers halves the speed of a matrix unit.
WIDTH_STEP = 8

WIDER = 2
"""How many times the window the wide one is, where only the window is given."""

DENSE: dict[str, Any] = {"ideas": (), "window": None, "wide_window": None, "slot_bias": False}
"""What turns a configuration into that of the dense baseline: no ideas, and full attention."""


def size_config(size: str, *, dense: bool = False, **overrides: Any) -> LeptonConfig:
    """Return the configuration of a size with `overrides`, which `LeptonConfig.replace` takes.

    ``dense=True`` gives the baseline of equal parameters: no ideas, full attention, and an MLP that is widened
    until its parameters agree with those of the complete model within 1 % (unless `ffn` is given as well).
    A `window` without a `wide_window` has a wide one of twice as many tokens.

    Raises:
        InputError: an unknown size or field (the nearest match is named), or values that do not fit together.
    """
    if not isinstance(dense, bool):
        raise InputError(f"dense={shown(dense)}: must be True or False")
    complete = preset(size).config(IDEAS)
    if "window" in overrides and "wide_window" not in overrides:
        window = overrides["window"]
        overrides["wide_window"] = WIDER * window if isinstance(window, int) else None
    if not dense:
        window = overrides.get("window", complete.window)
        if isinstance(window, int) and 1 <= window < complete.segment:
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
    with on_meta_device():
        return Modules(config).num_params()
