"""The model: `Network`, its output and its state. `lepton.Lepton` adds files and generation to it."""

from lepton.model.network import Network
from lepton.model.output import Output
from lepton.model.state import Memory, State

__all__ = ["Memory", "Network", "Output", "State"]
