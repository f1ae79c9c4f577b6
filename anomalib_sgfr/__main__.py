"""``python -m anomalib_sgfr``: the same as ``anomalib-sgfr``, where scripts are not installed."""

import sys

from anomalib_sgfr.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
