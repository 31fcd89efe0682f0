"""LEPTON: a small language model that one person trains, runs and trusts on one GPU."""

__version__ = "0.1.0"
