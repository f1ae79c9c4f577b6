"""What each choice in Sgfr does to its accuracy, over data sets and seeds.

    python -m benchmarks.study k --root DIR

Embeddings are computed once and kept; everything after them is the product's own code. Results are
records as in :mod:`benchmarks.common.records`, with what was varied in ``arguments``; an
interrupted study goes on where it stopped.
"""

import argparse
import time
from collections.abc import Sequence
from pathlib import Path

from benchmarks.common.cases import DATA, Case, add_options, chosen
from benchmarks.common.records import Spec, merge, read
from benchmarks.study.evaluation import evaluate
from benchmarks.study.report import report
from benchmarks.study.variants import STUDIES, specs_of

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run studies; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.study", description=__doc__.splitlines()[0]
    )
    parser.add_argument("studies", nargs="+", choices=[*STUDIES, "all"])
    add_options(parser, DATA, Path("benchmarks/results/studies"))
    parser.add_argument("--cache", type=Path, default=Path("runs/embeddings"))
    options = parser.parse_args(arguments)
    names = list(STUDIES) if "all" in options.studies else options.studies
    files = {name: options.out / name / "results.json" for name in names}
    for case in chosen(parser, options):
        left = {name: _left(name, files[name], case) for name in names}
        # one spec for what several studies share, such as the default
        specs = list(
            {key: spec for of_study in left.values() for key, spec in of_study.items()}.values()
        )
        if not specs:
            continue
        start = time.monotonic()
        for done, record in enumerate(evaluate(specs, case.root, options.cache), 1):
            for name in names:
                if record.key in left[name]:
                    merge(files[name], [record])
            print(f"{case}: {done} of {len(specs)}, {time.monotonic() - start:.0f} s", flush=True)
    for name in names:
        report(name, options.out / name)
        print((options.out / name / "README.md").read_text(encoding="utf-8"))
    return 0


def _left(name: str, results: Path, case: Case) -> dict[str, Spec]:
    """What a study has yet to run on one data set, split and seed, by its key."""
    done = {record.key for record in read(results)}
    return {
        key: spec
        for key, spec in specs_of(name, case.dataset, case.split, case.seed).items()
        if key not in done
    }
