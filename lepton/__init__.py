"""LEPTON: a small language model that one person trains, runs and trusts on one GPU."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lepton.data.tokenizer import Tokenizer as Tokenizer
    from lepton.model import Lepton as Lepton

__version__ = "0.1.0"

_HOMES = {"Lepton": "lepton.model", "Tokenizer": "lepton.data.tokenizer"}
"""Names that are imported when they are asked for: `import lepton` alone is quick, and needs no torch."""


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
