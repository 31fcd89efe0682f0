"""`python -m lepton`."""

import sys

from lepton.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
