"""What the plugin adds to the start of an interpreter that does not use anomalib.

    python -m benchmarks.startup

Times the plugin's start-up line in many fresh interpreters, in turns with an empty one.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]
RUNS = 200


def measure(line: str) -> float:
    """Milliseconds that one line takes in a fresh interpreter after an ordinary start."""
    code = (
        f"import os, sys, time; sys.path.insert(0, {str(REPOSITORY)!r}); line = {line!r}\n"
        "start = time.perf_counter(); exec(line); print(1000 * (time.perf_counter() - start))"
    )
    command = [sys.executable, "-I", "-S", "-c", code]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)  # noqa: S603


def main() -> None:
    """Measure and print."""
    argparse.ArgumentParser(
        prog="python -m benchmarks.startup", description=__doc__.splitlines()[0]
    ).parse_args()
    line = (REPOSITORY / "anomalib_sgfr.pth").read_text(encoding="utf-8").strip()
    empty, plugin = [], []
    for _ in range(RUNS):
        empty.append(measure("pass"))
        plugin.append(measure(line))
    cost = statistics.median(plugin) - statistics.median(empty)
    slow = sorted(plugin)[int(0.95 * RUNS)]
    sys.stdout.write(
        f"the plugin adds {cost:.2f} ms to an interpreter's start (median of {RUNS}; 95%:"
        f" {slow:.2f} ms)\n"
    )


if __name__ == "__main__":
    main()
