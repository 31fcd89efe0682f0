"""LEPTON: a small language model that one person trains, runs and trusts on one GPU."""

# ruff: noqa: F403, F405
import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lepton.api import *

__version__ = "0.1.0"

__all__ = [
    "GenerationOptions",
    "Lepton",
    "Memory",
    "Output",
    "State",
    "Stats",
    "Stream",
    "Tokenizer",
    "create_lepton",
    "create_lepton_large",
    "create_lepton_medium",
    "create_lepton_micro",
    "create_lepton_nano",
    "create_lepton_small",
    "create_lepton_tiny",
    "create_lepton_xl",
    "create_lepton_xxl",
]
"""Names of `lepton.api`. It is imported when one is asked for: `import lepton` alone is quick, and needs no torch."""


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module("lepton.api"), name)


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
