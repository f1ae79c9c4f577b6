"""The command: ``python -m benchmarks.edge``."""

import sys

from benchmarks.edge.command import main

if __name__ == "__main__":
    sys.exit(main())
