"""The model: `Lepton`, its state, and a constructor for each of the eight sizes."""

from lepton.model.factory import (
    create_lepton,
    create_lepton_large,
    create_lepton_medium,
    create_lepton_micro,
    create_lepton_nano,
    create_lepton_small,
    create_lepton_tiny,
    create_lepton_xl,
    create_lepton_xxl,
)
from lepton.model.lepton import Lepton
from lepton.model.output import Output
from lepton.model.state import Memory, State

__all__ = [
    "Lepton",
    "Memory",
    "Output",
    "State",
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
