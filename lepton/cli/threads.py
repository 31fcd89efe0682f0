"""How the CPU threads of a command wait for each other. Only the environment is touched, and torch is not imported."""

import os

SPINS = "2000"
"""How often a CPU thread of GNU's OpenMP looks for work before it sleeps."""


def share_the_cores() -> None:
    """Let threads that wait sleep soon. To be called before torch is imported, which is when it is read.

    By default CPU threads spin for long while they wait for each other. Everything is then several times slower as soon
    as another program wants one of the cores. If they slept at once, waking them would take a third of a training step.
    So they spin for a moment (docs/log.md, 2026-11-22).
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", SPINS)
