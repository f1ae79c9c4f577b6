"""The command: ``python -m benchmarks.study``."""

import sys

from benchmarks.study.command import main

if __name__ == "__main__":
    sys.exit(main())
