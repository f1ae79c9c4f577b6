"""What large pages do to Patchcore's coreset selection, for one round of it.

    python -m benchmarks.pages

Each setting of the C library in a process of its own, in turn, repeatedly; prints medians and their
ratio.
"""

import argparse
import os
import statistics
import subprocess
import sys
from time import perf_counter

__all__ = ["main"]

_SETTINGS = {
    "large blocks given back": {"MALLOC_MMAP_THRESHOLD_": "1048576"},
    "and backed by large pages": {
        "MALLOC_MMAP_THRESHOLD_": "1048576",
        "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    },
}
_PATCHES, _WIDTH, _ROUNDS, _REPEATS = (
    200_000,
    335,
    12,
    3,
)  # 195 images of 256 px, as wide as they are projected


def _rounds() -> float:
    """Median seconds of a round of anomalib's selection: distances from the latest atom, and the
    farthest patch.
    """
    import torch
    from anomalib.models.components.sampling import KCenterGreedy

    selection = KCenterGreedy(torch.randn(_PATCHES, _WIDTH), sampling_ratio=0.01)
    selection.features = selection.embedding
    seconds = []
    for _ in range(_ROUNDS):
        start = perf_counter()
        selection.update_distances(torch.tensor(0))
        selection.get_new_idx()
        seconds.append(perf_counter() - start)
    return statistics.median(seconds)


def main() -> int:
    """Measure and print; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pages", description=__doc__.splitlines()[0]
    )
    parser.add_argument(
        "--rounds", action="store_true", help="measure in this process and print seconds alone"
    )
    if parser.parse_args().rounds:
        print(_rounds())
        return 0
    found: dict[str, list[float]] = {name: [] for name in _SETTINGS}
    for _ in range(_REPEATS):
        for name, environment in _SETTINGS.items():
            command = [sys.executable, "-W", "ignore", "-m", "benchmarks.pages", "--rounds"]
            output = subprocess.run(  # noqa: S603  # our own module
                command,
                env={**os.environ, **environment},
                check=True,
                capture_output=True,
                text=True,
            ).stdout
            found[name].append(float(output.split()[-1]))
    medians = {name: statistics.median(values) for name, values in found.items()}
    for name, seconds in medians.items():
        print(f"{name}: {1e3 * seconds:.0f} ms a round of {_PATCHES:,} patches, {_WIDTH} wide")
    before, after = medians.values()
    print(f"ratio: {before / after:.1f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
