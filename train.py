"""Thin entry point: `python train.py` is `python -m lepton train`."""

import sys

from lepton.cli.train import main

if __name__ == "__main__":
    sys.exit(main())
