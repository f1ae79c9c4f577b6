"""``anomalib-sgfr watch``: score images as they arrive in a folder, tell when conditions change."""

import csv
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from anomalib_sgfr.cli.arguments import Parser, existing, new_file
from anomalib_sgfr.monitor import Monitor

if TYPE_CHECKING:
    from anomalib_sgfr.inspector import Inspector

__all__ = ["CHANGED", "main"]

CHANGED = 3  # exit code
_COLUMNS = ("image", "score", "label", "p_value", "evidence", "changed", "error")


def main(arguments: Sequence[str] | None = None) -> int:
    """Watch a folder; returns the exit code."""
    parser = Parser(prog="anomalib-sgfr watch", description=__doc__.partition(": ")[2])
    add = parser.add_argument
    about = "checkpoint, or a file that `anomalib export` wrote (.xml, .onnx, .pt)"
    add("model", type=existing, help=about)
    add("folder", type=existing, help="where a camera writes images, also in folders below")
    about = "table of all images, which is appended to (default: watch.csv)"
    add("--out", type=new_file, default=Path("watch.csv"), help=about)
    about = "state of the monitor; a checkpoint makes it (default: OUT with .json for its ending)"
    add("--monitor", type=new_file, help=about)
    add("--every", type=float, default=1.0, help="seconds from look to look (default: 1)")
    add("--once", action="store_true", help="score what is there, and end")
    about = f"end, with exit code {CHANGED}, when conditions have changed"
    add("--stop", action="store_true", help=about)
    about = "command to run once when conditions have changed, with the image as last argument"
    add("--run", help=about)
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is a file: name the folder that it is in")
    if not options.every > 0.0:
        parser.error(f"--every must be a positive number of seconds, got {options.every}")

    from anomalib_sgfr.inspector import Inspector

    state = options.monitor or options.out.with_suffix(".json")
    rows = _read(options.out)
    monitor = _monitor(parser, state, options.model)
    inspector = Inspector.load(options.model, monitor=monitor)
    _replay(monitor, rows)
    print(
        f"Monitor of {monitor.parts} calibration images: an alarm takes {monitor.fastest} images at"
        " least.",
        file=sys.stderr,
    )
    told = monitor.changed_at is not None
    known = {row["image"] for row in rows}
    for path in _arriving(options.folder, known, options.every, once=options.once):
        with options.out.open("a", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(_row(inspector, monitor, path))
        monitor.save(state)
        if monitor.changed_at is not None and not told:
            told = True
            _tell(monitor, options.model, options.out, state)
            if options.run:
                _run(options.run, path)
        if told and options.stop:
            break
    print(f"{monitor.images} images; table: {options.out}")
    return CHANGED if told and (options.stop or options.once) else 0


def _read(table: Path) -> list[dict[str, str]]:
    """Rows of the table, which is made if it is not there.

    Raises:
        ValueError: If it is another table.
    """
    if not table.exists():
        with table.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(_COLUMNS)
    with table.open(newline="", encoding="utf-8") as file:
        reader = csv.DictReader(file)
        if tuple(reader.fieldnames or ()) != _COLUMNS:
            msg = f"{table} is another table, whose columns are not {', '.join(_COLUMNS)}."
            raise ValueError(msg)
        return list(reader)


def _monitor(parser: Parser, state: Path, model: Path) -> Monitor:
    if state.exists():
        return Monitor.read(state)
    if model.suffix != ".ckpt":
        parser.error(
            f"{state}: no such file, and {model.name} has no calibration scores to make it of: run"
            " the command once on the checkpoint, or save Monitor.of_checkpoint(CKPT) there"
        )
    monitor = Monitor.of_checkpoint(model)
    monitor.save(state)
    return monitor


def _replay(monitor: Monitor, rows: Sequence[Mapping[str, str]]) -> None:
    """Take what the table has and the monitor has not: the process ended in between."""
    scored = [row for row in rows if row["score"]]
    for row in scored[monitor.images :]:
        monitor.update(float(row["score"]), row["image"])


def _arriving(folder: Path, known: set[str], every: float, *, once: bool) -> Iterator[str]:
    """Images that are not known, the oldest first, each when it is no longer being written."""
    from PIL import Image

    formats = Image.registered_extensions().items()
    endings = {ending for ending, name in formats if name in Image.OPEN}
    sizes: dict[str, tuple[int, int]] = {}
    while True:
        there = {}
        for path in folder.rglob("*"):
            name = str(path)
            if name in known or path.suffix.lower() not in endings or path.is_dir():
                continue
            with suppress(FileNotFoundError):  # moved away in between
                found = path.stat()
                there[name] = (found.st_mtime_ns, found.st_size)
        for name in sorted(there, key=lambda name: (there[name], name)):
            if once or sizes.get(name) == there[name]:
                known.add(name)
                yield name
        sizes = there
        if once:
            return
        time.sleep(every)


def _row(inspector: "Inspector", monitor: Monitor, path: str) -> list[object]:
    """Score an image; what cannot be read is a row that says why."""
    try:
        found = inspector(path)
    except (OSError, ValueError) as error:
        print(f"warning: {path} is left out: {error}", file=sys.stderr)
        return [path, *[""] * (len(_COLUMNS) - 2), " ".join(str(error).split())]
    reading = monitor.reading
    label = "" if found.label is None else int(found.label)
    numbers = [repr(found.score), label, f"{reading.p_value:.4g}", f"{reading.evidence:.4g}"]
    return [path, *numbers, int(reading.changed), ""]


def _tell(monitor: Monitor, model: Path, table: Path, state: Path) -> None:
    """Say what has happened and what to do."""
    print(
        f"Conditions have changed: scores are {monitor.reading.direction} than those of the"
        f" calibration images (after {monitor.images} images; evidence {monitor.evidence:.4g},"
        f" alarm at {2.0 / monitor.false_alarm_probability:g}). Look at the latest images of"
        f" {table}. If they are good:\n"
        f"  anomalib-sgfr adapt {model} GOOD_IMAGES    # light or camera has changed\n"
        f"  anomalib-sgfr accept {model} GOOD_IMAGES   # some parts look otherwise\n"
        f"and then, for a new monitor of the new checkpoint, remove {state} and {table}.",
        file=sys.stderr,
        flush=True,
    )


def _run(command: str, path: str) -> None:
    """Run the user's command; its failure does not end the watch."""
    try:
        status = subprocess.run([*shlex.split(command), path], check=False).returncode  # noqa: S603
    except (OSError, ValueError) as error:
        print(f"warning: --run failed: {error}", file=sys.stderr)
        return
    if status:
        print(f"warning: --run ended with exit code {status}", file=sys.stderr)
