"""``anomalib-sgfr watch``: score images as they arrive in a folder, tell when conditions change."""

import argparse
import csv
import hashlib
import io
import math
import os
import re
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING

from anomalib_sgfr.cli.arguments import Parser, existing, new_file
from anomalib_sgfr.monitor import Monitor
from anomalib_sgfr.run_paths import atomic_write

if TYPE_CHECKING:
    from anomalib_sgfr.inspector import Inspector

__all__ = ["CHANGED", "main", "read_table"]

CHANGED = 3  # exit code
# a row that is cut off lacks the last column, so that no part of another passes for the whole
_COLUMNS = ("image", "score", "label", "p_value", "evidence", "changed", "model", "error")
_EARLIER_COLUMNS = tuple(name for name in _COLUMNS if name != "model")
_HEADER = ",".join(_COLUMNS).encode() + b"\r\n"
_DIGITS = 12  # of the hash that names a model


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
    about = "regular expression on the path: a stream for each camera, product ..."
    add("--by", type=_expression, help=about)
    about = "of an alarm over the whole life of the monitor, where nothing changes (default: 0.01)"
    add("--false_alarm_probability", type=float, help=about)
    add(
        "--every",
        type=float,
        default=1.0,
        help="seconds between two scans of the folder (default: 1)",
    )
    add("--once", action="store_true", help="score what is there, and end")
    about = f"end, with exit code {CHANGED}, when conditions have changed"
    add("--stop", action="store_true", help=about)
    about = (
        "command to run when conditions have changed, once for each stream, with the image as last"
        " argument"
    )
    add("--run", help=about)
    options = parser.parse_args(arguments)
    if not options.folder.is_dir():
        parser.error(f"{options.folder} is a file: name the folder that it is in")
    if not options.every > 0.0:
        parser.error(f"--every must be a positive number of seconds, got {options.every}")

    from anomalib_sgfr.inspector import Inspector

    state = options.monitor or options.out.with_suffix(".json")
    if state.absolute() == options.out.absolute():
        parser.error(
            f"{state} cannot be both the table (--out) and the state of the monitor (--monitor):"
            " name a table that ends in .csv"
        )
    rows = _intact(options.out)
    monitor = _monitor(parser, state, options)
    inspector = Inspector.load(options.model, monitor=monitor)
    told = False
    try:
        told = _watch(options, state, rows, monitor, inspector)
    except KeyboardInterrupt:  # the end of a watch that has no other
        if options.once:
            raise
    print(f"{monitor.images} images; table: {options.out}")
    return CHANGED if told and (options.stop or options.once) else 0


def _watch(
    options: argparse.Namespace,
    state: Path,
    rows: Sequence[Mapping[str, str]],
    monitor: Monitor,
    inspector: "Inspector",
) -> bool:
    """Score images as they arrive; returns whether conditions have changed."""
    if monitor.by is None:
        _introduce(monitor)
    introduced, told = set(monitor.streams), _changed(monitor)

    def tell(path: str) -> None:
        if set(monitor.streams) - introduced:
            introduced.update(monitor.streams)
            _introduce(monitor)
        if _changed(monitor) - told:
            told.update(_changed(monitor))
            _tell(monitor, options.model, options.out, state)
            if options.run:
                _run(options.run, path)

    # what the table has and the monitor has not: the process ended in between
    scored = [row for row in rows if row["score"]]
    if monitor.images > len(scored):
        print(
            f"warning: {state} has taken {monitor.images} images, and {options.out} has"
            f" {len(scored)} of them: the others count twice where they are in the folder still."
            " For a new watch remove both files.",
            file=sys.stderr,
        )
    for row in scored[monitor.images :]:
        monitor.update(float(row["score"]), row["image"])
        tell(row["image"])
    known = {_place(row["image"]) for row in rows}
    model = _name_of(options.model)
    for path in _arriving(options.folder, known, options.every, once=options.once):
        _append(options.out, _row(inspector, monitor, path, model))
        monitor.save(state)
        tell(path)
        if told and options.stop:
            break
    return bool(told)


def _expression(text: str) -> str:
    try:
        re.compile(text)
    except re.error as error:
        msg = f"'{text}' is not a regular expression: {error}"
        raise argparse.ArgumentTypeError(msg) from error
    return text


def _name_of(model: Path) -> str:
    """First digits of the SHA-256 of a model's file, and of the weights that lie beside it."""
    found = hashlib.sha256(model.read_bytes())
    weights = model.with_suffix(".bin")
    if model.suffix == ".xml" and weights.is_file():
        found.update(weights.read_bytes())
    return found.hexdigest()[:_DIGITS]


def _changed(monitor: Monitor) -> set[str]:
    """Streams whose conditions have changed."""
    return {name for name, its in monitor.streams.items() if its.changed_at is not None}


def _introduce(monitor: Monitor) -> None:
    """Say what the stream of the latest image is compared with."""
    name, fastest = monitor.reading.stream, monitor.fastest
    stream = monitor.streams[name]
    least = f"an alarm takes {fastest} images at least." if fastest else "no alarm is possible."
    about = f"Monitor of {stream.parts} calibration images"
    if monitor.by is not None:
        which = "all" if len(stream.calibration) == len(monitor.calibration) else "its own"
        about = f"Stream '{name}', compared with {which} {stream.parts} calibration images"
    print(f"{about}: {least}", file=sys.stderr)


def read_table(table: Path) -> tuple[list[dict[str, str]], bytes]:
    """Read the table of a watch, but for a last row whose write was cut off.

    Args:
        table (Path): The file.

    Returns:
        tuple[list[dict[str, str]], bytes]: The rows, and the content of the file without the
        incomplete one. In an earlier table no row names its model.

    Raises:
        OSError: If it cannot be read.
        ValueError: If it is another table, or a row has another number of columns.
    """
    content = table.read_bytes()
    if len(content) < len(_HEADER) and _HEADER.startswith(content):
        return [], _HEADER
    lines = content.splitlines(keepends=True)
    ends = [0, *accumulate(map(len, lines))]
    # paths need not be text
    reader = csv.reader(line.decode("utf-8", "surrogateescape") for line in lines)
    columns = tuple(next(reader, ()))
    if columns not in {_COLUMNS, _EARLIER_COLUMNS}:
        msg = f"{table} is another table, whose columns are not {', '.join(_COLUMNS)}."
        raise ValueError(msg)
    rows, end = [], ends[reader.line_num]
    for values in reader:
        last = ends[reader.line_num]
        if len(values) == len(columns):
            rows.append({"model": "", **dict(zip(columns, values, strict=True))})
            _require_numbers(rows[-1], f"{table}, line {reader.line_num}")
            end = last
        elif values and b"\n" in content[end:last]:  # more than what a write has left
            msg = (
                f"{table}, line {reader.line_num}: {len(values)} columns in place of"
                f" {len(columns)}. Correct or remove the line."
            )
            raise ValueError(msg)
    whole = content[:end]
    return rows, whole if whole.endswith(b"\n") else whole.rstrip(b"\r") + b"\r\n"


def _require_numbers(row: Mapping[str, str], where: str) -> None:
    """Require that a row with a score has numbers."""
    for name in ("score", "p_value", "evidence") if row["score"] else ():
        try:
            is_number = math.isfinite(float(row[name]))
        except ValueError:
            is_number = False
        if not is_number:
            msg = (
                f"{where}: {name} must be a number, got '{row[name]}'. Correct or remove the line."
            )
            raise ValueError(msg)


def _intact(table: Path) -> list[dict[str, str]]:
    """Rows of the table, which is made or repaired if need be."""
    rows: list[dict[str, str]] = []
    content, whole = b"", _HEADER
    if table.exists():
        content = table.read_bytes()
        rows, whole = read_table(table)
    is_cut = len(whole) < len(content)
    if not whole.startswith(_HEADER):  # an earlier table
        text = io.StringIO(newline="")
        csv.writer(text).writerows([_COLUMNS, *([row[name] for name in _COLUMNS] for row in rows)])
        whole = text.getvalue().encode("utf-8", "surrogateescape")
    if whole != content:
        with atomic_write(table) as part:
            part.write_bytes(whole)
    if is_cut:
        print(
            f"warning: the last row of {table} was cut off and is removed: its image is scored"
            " again.",
            file=sys.stderr,
        )
    return rows


def _append(table: Path, row: Sequence[object]) -> None:
    """Append a row, which is on the disk before the monitor's state is."""
    with table.open("a", newline="", encoding="utf-8", errors="surrogateescape") as file:
        csv.writer(file).writerow(row)
        file.flush()
        os.fsync(file.fileno())


def _monitor(parser: Parser, state: Path, options: argparse.Namespace) -> Monitor:
    names = ("by", "false_alarm_probability")
    given = {name: getattr(options, name) for name in names}
    given = {name: value for name, value in given.items() if value is not None}
    model: Path = options.model
    if state.exists():
        monitor = Monitor.read(state)
        for name, value in given.items():
            own = getattr(monitor, name)
            if value != own:
                kept = f"without --{name}" if own is None else f"with --{name} '{own}'"
                parser.error(
                    f"--{name} '{value}': {state} was made {kept}; for a new monitor name another"
                    " state and table by --monitor and --out"
                )
        if model.suffix == ".ckpt" and not _is_of(monitor, model):
            parser.error(
                f"{state} was made of another checkpoint than {model}, whose calibration scores"
                f" differ: for a new monitor remove {state} and {options.out}, or name others by"
                " --monitor and --out"
            )
        return monitor
    if model.suffix != ".ckpt":
        parser.error(
            f"{state}: no such file, and {model.name} has no calibration scores to make it of: run"
            " the command once on the checkpoint, or save Monitor.of_checkpoint(CKPT) there"
        )
    monitor = Monitor.of_checkpoint(model, **given)
    monitor.save(state)
    return monitor


def _is_of(monitor: Monitor, checkpoint: Path) -> bool:
    """Whether a monitor can be the checkpoint's; one that names no threshold is the user's own."""
    if monitor.threshold is None:
        return True
    arguments = {name: getattr(monitor, name) for name in ("false_alarm_probability", "by")}
    its = Monitor.of_checkpoint(checkpoint, **arguments)
    return len(its.calibration) == len(monitor.calibration) and all(
        math.isclose(*pair, rel_tol=1e-5)
        for pair in zip(its.calibration, monitor.calibration, strict=True)
    )


def _place(path: str) -> str:
    """Where an image lies, by whatever path its folder was named."""
    folder, name = os.path.split(path)
    return os.path.join(os.path.realpath(folder), name)  # noqa: PTH118  # a name need not be text


def _arriving(folder: Path, known: set[str], every: float, *, once: bool) -> Iterator[str]:
    """Images whose place is not known, the oldest first, each when it is no longer written to."""
    from PIL import Image
    from tqdm.auto import tqdm

    formats = Image.registered_extensions().items()
    endings = {ending for ending, name in formats if name in Image.OPEN}
    sizes: dict[str, tuple[int, int]] = {}
    while True:
        there = {}
        for path in folder.rglob("*"):
            name = str(path)
            if _place(name) in known or path.suffix.lower() not in endings or path.is_dir():
                continue
            with suppress(FileNotFoundError):  # moved away in between
                status = path.stat()
                there[name] = (status.st_mtime_ns, status.st_size)
        found = sorted(there, key=lambda name: (there[name], name))
        # a bar where there is an end
        for name in tqdm(found, "Images", leave=False, disable=None if once else True):
            if once or sizes.get(name) == there[name]:
                known.add(_place(name))
                yield name
        sizes = there
        if once:
            return
        time.sleep(every)


def _row(inspector: "Inspector", monitor: Monitor, path: str, model: str) -> list[object]:
    """Score an image; what cannot be read is a row that says why."""
    try:
        found = inspector(path)
    except (OSError, ValueError) as error:
        print(f"warning: {path} is left out: {error}", file=sys.stderr)
        return [path, *[""] * (len(_COLUMNS) - 3), model, " ".join(str(error).split())]
    reading = monitor.reading
    label = "" if found.label is None else int(found.label)
    numbers = [repr(found.score), label, f"{reading.p_value:.4g}", f"{reading.evidence:.4g}"]
    return [path, *numbers, int(reading.changed), model, ""]


def _tell(monitor: Monitor, model: Path, table: Path, state: Path) -> None:
    """Say what has happened to the stream of the latest image, and what to do."""
    name, stream = monitor.reading.stream, monitor.streams[monitor.reading.stream]
    of = f" of the stream '{name}'" if monitor.by is not None else ""
    checkpoint = shlex.quote(str(model)) if model.suffix == ".ckpt" else "CKPT"
    watched, page = (shlex.quote(str(path)) for path in (table, table.with_suffix(".html")))
    if state != table.with_suffix(".json"):
        watched += f" --monitor {shlex.quote(str(state))}"
    print(
        f"Conditions{of} have changed: scores are {stream.direction} than those of the calibration"
        f" images (after {stream.images} images; evidence {stream.evidence:.4g}, alarm at"
        f" {stream.limit:g}). See what has changed, and the latest images of {table}:\n"
        f"  anomalib-sgfr report {checkpoint} --watched {watched} --out {page}\n"
        f"If they are good:\n"
        f"  anomalib-sgfr adapt {checkpoint} GOOD_IMAGES    # light or camera has changed\n"
        f"  anomalib-sgfr accept {checkpoint} GOOD_IMAGES   # some parts look otherwise\n"
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
