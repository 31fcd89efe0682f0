"""Thin entry point for scripts: `from model import create_lepton_tiny`."""

from lepton.requirements import check as _check

_check()

from lepton.api import *  # noqa: E402, F403
