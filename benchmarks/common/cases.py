"""Cases of a study (data set, split, seed) and the loop over them, which can be resumed."""

import argparse
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from benchmarks.common.records import Row, read_rows, write_rows

__all__ = [
    "DATA",
    "Case",
    "add_options",
    "alike",
    "chosen",
    "median",
    "run_cases",
    "seeds",
    "show_page",
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
_WITHOUT_FOLDER = "elpv"


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
    """Give a command ``--out`` and the options that :func:`chosen` reads.

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
        help="folder of images: of a data set, or of all that have none of their own; repeatable",
    )
    parser.add_argument(
        "--data",
        help=f"data sets; default: of {','.join(data)} those with a folder or that need none",
    )
    parser.set_defaults(known=tuple(data))
    parser.add_argument(
        "--seeds", type=lambda text: [int(seed) for seed in text.split(",")], default=[0, 1, 2]
    )
    parser.add_argument("--out", type=Path, default=out)


def chosen(parser: argparse.ArgumentParser, options: argparse.Namespace) -> list[Case]:
    """What a command was asked to measure, one seed after the other.

    Ends the command if a folder is missing.
    """
    folders = {}
    for item in options.root:
        name, equals, folder = item.partition("=")
        folders[name if equals else ""] = Path(folder if equals else name)
    names = options.known if options.data is None else options.data.split(",")
    data = [
        (dataset, split or None) for dataset, _, split in (name.partition(":") for name in names)
    ]
    if options.data is None:
        given = {*folders, *(["mtd"] if "" in folders else [])}
        data = [each for each in data if each[0] in given or each[0].startswith(_WITHOUT_FOLDER)]
    cases = []
    for seed in options.seeds:
        for dataset, split in data:
            found = None
            if not dataset.startswith(_WITHOUT_FOLDER):
                found = folders.get(dataset, folders.get(""))
                if found is None:
                    parser.error(
                        f"--root {dataset}=DIR is needed; or leave {dataset} out of --data"
                    )
            cases.append(Case(dataset, split, seed, found))
    return cases


def run_cases(
    module: str,
    about: str | None,
    data: Sequence[str],
    evaluate: Callable[[Case], list[Row]],
    report: Callable[[Path], None],
    arguments: Sequence[str] | None = None,
) -> int:
    """Evaluate each case that is not there yet, write every result at once, then report.

    Args:
        module (str): Name of the module; results are in ``benchmarks/results/NAME/NAME.json``
            unless ``--out`` says else.
        about (str | None): Its docstring.
        data (Sequence[str]): Data sets by default, with a colon before the split.
        evaluate (Callable[[Case], list[Row]]): Gives rows; ``dataset``, ``split`` and ``seed`` are
            added.
        report (Callable[[Path], None]): Writes ``README.md`` and plots into a folder that holds the
            results.
        arguments (Sequence[str] | None): Of the command; the process's own by default.

    Returns:
        int: Exit code.
    """
    name = module.replace("_", "-")
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{module}", description=(about or "").splitlines()[0]
    )
    add_options(parser, data, Path("benchmarks/results") / name)
    options = parser.parse_args(arguments)
    results = options.out / f"{name}.json"
    found = read_rows(results)
    for case in chosen(parser, options):
        where = {"dataset": case.dataset, "split": case.split, "seed": case.seed}
        if alike(found, **where):
            continue
        print(case, flush=True)
        found += [{**where, **row} for row in evaluate(case)]
        write_rows(results, found)
    return show_page(report, options.out)


def show_page(report: Callable[[Path], None], folder: Path) -> int:
    """Write the page of a folder's results, print it, and return a command's exit code."""
    report(folder)
    print((folder / "README.md").read_text(encoding="utf-8"))
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
