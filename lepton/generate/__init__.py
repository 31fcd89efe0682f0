"""Generation: sampling as arithmetic on probabilities, and the engine that carries the state."""

from lepton.generate.engine import generate, generate_stream, generate_with_uncertainty

__all__ = ["generate", "generate_stream", "generate_with_uncertainty"]
