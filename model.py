"""Thin entry point for scripts: `from model import create_lepton_tiny`."""

from lepton.model import *  # noqa: F403
