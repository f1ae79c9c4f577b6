"""Cases of a study (data set, split, seed) and the loop over them, which can be resumed."""

import argparse
import json
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.common.records import write_text

__all__ = [
    "DATA",
    "DRAWN",
    "Case",
    "add_options",
    "alike",
    "chosen",
    "median",
    "run_cases",
    "seeds",
    "title",
]

DATA = (
    "mtd:canonical",
    "mtd:tile",
    "elpv-mono",
    "elpv-poly",
    "mvtec:bottle",
    "mvtec:grid",
    "kolektor",
)
DRAWN = "drawn"  # made by the command itself
_WITHOUT_FOLDER = ("elpv", DRAWN)
Row = dict[str, Any]


class Case(NamedTuple):
    """A data set, its split, a seed, and the folder of the images where it is needed."""

    dataset: str
    split: str | None
    seed: int
    root: Path | None

    def __str__(self) -> str:
        """For people, without the folder."""
        return f"{title(self.dataset, self.split)} seed {self.seed}"


def title(dataset: str, split: str | None) -> str:
    """A data set and its split, for people."""
    return f"{dataset} {split}" if split else dataset


def add_options(parser: argparse.ArgumentParser, data: Sequence[str], out: Path) -> None:
    """Give a command the options that :func:`chosen` reads, and ``--out``.

    Args:
        parser (argparse.ArgumentParser): Of the command.
        data (Sequence[str]): Data sets by default, with a colon before the split.
        out (Path): Output folder by default.
    """
    parser.add_argument(
        "--root",
        action="append",
        default=[],
        metavar="DIR | NAME=DIR",
        help=(
            "folder of images: of a data set, or of all that have none of their own; again for"
            " another"
        ),
    )
    parser.add_argument(
        "--data",
        help=(
            f"data sets; default: of {','.join(data)} those whose folder is given or that need none"
        ),
    )
    parser.set_defaults(known=tuple(data))
    parser.add_argument(
        "--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2]
    )
    parser.add_argument("--out", type=Path, default=out)


def chosen(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Case]:
    """Cases that a command was asked for; ends the command if a folder is missing."""
    roots = {
        name if equals else "": Path(folder if equals else name)
        for name, equals, folder in _named(options.root)
    }
    names = list(options.known) if options.data is None else options.data.split(",")
    data = [
        (dataset, split or None) for dataset, _, split in (item.partition(":") for item in names)
    ]
    if options.data is None:
        given = {*roots, *(["mtd"] if "" in roots else [])}
        data = [
            (dataset, split)
            for dataset, split in data
            if dataset in given or dataset.startswith(_WITHOUT_FOLDER)
        ]
    missing = sorted(
        {dataset for dataset, _ in data if not dataset.startswith(_WITHOUT_FOLDER)} - set(roots)
    )
    if missing and "" not in roots:
        parser.error(f"--root {missing[0]}=DIR is needed; or leave {missing[0]} out of --data")
    return [
        Case(
            dataset,
            split,
            seed,
            None if dataset.startswith(_WITHOUT_FOLDER) else roots.get(dataset, roots.get("")),
        )
        for seed in options.seeds
        for dataset, split in data
    ]


def _named(roots: Sequence[str]) -> list[tuple[str, str, str]]:
    return [item.partition("=") for item in roots]


def run_cases(
    module: str,
    about: str,
    data: Sequence[str],
    evaluate: Callable[[Case], list[Row]],
    report: Callable[[Path], None],
    arguments: Sequence[str] | None = None,
) -> int:
    """Evaluate each case that is not there yet, write every result at once, then report.

    Args:
        module (str): Name of the module; results are in ``benchmarks/results/NAME/NAME.json``
            unless ``--out`` says else.
        about (str): What the command is for.
        data (Sequence[str]): Data sets by default, with a colon before the split.
        evaluate (Callable[[Case], list[Row]]): Gives rows; ``dataset``, ``split`` and
            ``seed`` are added.
        report (Callable[[Path], None]): Writes ``README.md`` and plots into a folder that holds the
            results.
        arguments (Sequence[str] | None): Of the command; the process's own by default.

    Returns:
        int: Exit code.
    """
    name = module.replace("_", "-")
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{module}", description=about)
    add_options(parser, data, Path("benchmarks/results") / name)
    options = parser.parse_args(arguments)
    results = options.out / f"{name}.json"
    found: list[Row] = json.loads(results.read_text(encoding="utf-8")) if results.exists() else []
    for case in chosen(parser, options):
        where = {"dataset": case.dataset, "split": case.split, "seed": case.seed}
        if alike(found, **where):
            continue
        print(case, flush=True)
        found += [{**where, **row} for row in evaluate(case)]
        write_text(results, "[\n" + ",\n".join(map(json.dumps, found)) + "\n]\n")
    report(options.out)
    print((options.out / "README.md").read_text(encoding="utf-8"))
    return 0


def alike(rows: Iterable[Row], **values: object) -> list[Row]:
    """The rows that have these values."""
    return [row for row in rows if all(row[name] == value for name, value in values.items())]


def median(rows: Iterable[Row], name: str, **values: object) -> float:
    """Median of what :func:`alike` rows have under a name."""
    return statistics.median(row[name] for row in alike(rows, **values))


def seeds(rows: Iterable[Row]) -> str:
    """The seeds of rows, for people."""
    return ", ".join(str(seed) for seed in sorted({row["seed"] for row in rows}))
