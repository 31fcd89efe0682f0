"""Generation: sampling and acceptance as arithmetic on probabilities, and the cycles that carry the state."""

from lepton.generate.engine import (
    generate,
    generate_stream,
    generate_with_state,
    generate_with_stats,
    generate_with_uncertainty,
)
from lepton.generate.generation import Generation, Options
from lepton.generate.stats import Stats
from lepton.generate.stream import Stream

__all__ = [
    "Generation",
    "Options",
    "Stats",
    "Stream",
    "generate",
    "generate_stream",
    "generate_with_state",
    "generate_with_stats",
    "generate_with_uncertainty",
]
