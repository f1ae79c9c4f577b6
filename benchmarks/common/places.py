"""The command of a study that asks one thing of each data set and seed, and goes on where it stopped."""

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common.records import write_text

__all__ = ["study_places"]

Evaluate = Callable[[str, str | None, int, Path | None], list[dict[str, Any]]]


def study_places(
    module: str,
    about: str,
    places: Sequence[str],
    evaluate: Evaluate,
    report: Callable[[Path], None],
    arguments: Sequence[str] | None = None,
) -> int:
    """Evaluate each data set and seed that is not there yet, write every result at once, then report.

    Args:
        module (str): Name of the module; results are in ``benchmarks/results/NAME/NAME.json`` unless ``--out`` says
            else.
        about (str): What the command is for.
        places (Sequence[str]): Data sets by default, with a colon before the split.
        evaluate (Evaluate): From data set, split, seed and root to rows; ``dataset``, ``split`` and ``seed`` are added.
        report (Callable[[Path], None]): Writes ``README.md`` and plots into a folder that holds the results.
        arguments (Sequence[str] | None): Of the command; the process's own by default.

    Returns:
        int: Exit code.
    """
    name = module.replace("_", "-")
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=about)
    parser.add_argument("--root", type=Path, help="folder of the MTD images")
    parser.add_argument("--data", default=",".join(places))
    parser.add_argument("--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results") / name)
    options = parser.parse_args(arguments)
    wanted = [
        (dataset, split or None) for dataset, _, split in (item.partition(":") for item in options.data.split(","))
    ]
    if options.root is None and any(dataset == "mtd" for dataset, _ in wanted):
        parser.error("--root is needed for mtd; or leave it out with --data elpv-mono,elpv-poly")
    results = options.out / f"{name}.json"
    found: list[dict[str, Any]] = json.loads(results.read_text(encoding="utf-8")) if results.exists() else []
    for seed in options.seeds:
        for dataset, split in wanted:
            if any((row["dataset"], row["split"], row["seed"]) == (dataset, split, seed) for row in found):
                continue
            print(f"{dataset} {split or ''} seed {seed}", flush=True)
            rows = evaluate(dataset, split, seed, None if dataset.startswith("elpv") else options.root)
            found += [{"dataset": dataset, "split": split, "seed": seed, **row} for row in rows]
            write_text(results, "[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n")
    report(options.out)
    print((options.out / "README.md").read_text(encoding="utf-8"))
    return 0
