"""``anomalib-sgfr report``: one page to inspect and share, of folders of images."""

import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from anomalib_sgfr.cli.arguments import (
    Parser,
    at_least,
    existing,
    images_in,
    load,
    new_file,
    require_named_group,
    take_checkpoint,
)
from anomalib_sgfr.cli.prediction import (
    MASKS_HELP,
    MaskFolder,
    Truth,
    predict_images,
    report_damaged,
)
from anomalib_sgfr.cli.watch import read_table
from anomalib_sgfr.monitor import Monitor

if TYPE_CHECKING:
    from anomalib_sgfr.lightning_model import Sgfr
    from anomalib_sgfr.report.contents import ReportContents
    from anomalib_sgfr.report.watched import StreamTable

__all__ = ["main", "truths_in"]

_STDOUT = Path("-")
_GOOD = "good"
_GOOD_TRUTH = Truth(defective=False, kind=_GOOD)
_MASKS = ("ground_truth", "masks")
_MASK_FOLDERS = {*_MASKS, "gt", "mask"}


def main(arguments: Sequence[str] | None = None) -> int:
    """Predict images and write the page; returns 1 if an image or the page failed."""
    parser = _parser()
    options = parser.parse_intermixed_args(arguments)
    given, last = options.checkpoint or options.ckpt_path, [options.json] if options.json else []
    checkpoint = take_checkpoint(parser, given, options.data, options.good, options.bad, last)
    # where nothing is left of --json FILE, the file was the checkpoint
    figures_file = last[0] if last else options.json and _STDOUT
    if ".ckpt" in {options.out.suffix, figures_file.suffix if figures_file else ""}:
        parser.error("--out and --json name new files, not a checkpoint")
    if not (options.data or options.good or options.bad or options.watched):
        parser.error("pass images: --data, --good or --bad FOLDER, or --watched TABLE")
    if options.monitor and not options.watched:
        parser.error("--monitor goes with --watched TABLE")

    from anomalib_sgfr.report.callback import Report

    truths = truths_in(options.data, options.good, options.bad, options.masks)
    if options.masks:
        _require_masks(options.masks, truths)
    require_named_group("--group", options.group, [str(path) for path in truths])
    watched = _read_watched(options.watched, options.monitor) if options.watched else None
    model = load(checkpoint, visualizer=False, evaluator=False)
    tables = _stream_tables(model, *watched) if watched else []
    truths = truths or _shown(options.watched, tables)
    report = Report(options.out, options.group, options.pictures)
    report.checkpoint = str(checkpoint)
    report.watched = tables
    report.kinds = {str(path): truth.kind for path, truth in truths.items() if truth.kind}
    damaged: dict[Path, str] = {}
    report.unreadable = damaged
    predict_images(model, report, list(truths), damaged, truths=truths)
    code = report_damaged(damaged)
    if len(damaged) == len(truths):
        print(f"error: none of {len(truths)} images could be read", file=sys.stderr)
    if figures_file and report.contents:
        code |= _write_figures(report.contents, figures_file)
    if report.written is None:
        reason = report.failed or "no image was inspected: there is no report"
        print(f"error: {reason}", file=sys.stderr)
        return 1
    print(f"Report: {report.written}", file=sys.stderr if figures_file == _STDOUT else sys.stdout)
    return code


def _parser() -> Parser:
    parser = Parser(
        prog="anomalib-sgfr report",
        description=__doc__.partition(": ")[2],
        usage=(
            "anomalib-sgfr report CKPT (--data | --good | --bad) FOLDER ... --out PAGE [options]\n"
            "       anomalib-sgfr report CKPT --watched TABLE --out PAGE [options]"
        ),
    )
    add = parser.add_argument
    add("checkpoint", type=existing, nargs="?", help="checkpoint of a fitted Sgfr")
    add("--ckpt_path", type=existing, help="the checkpoint, if it is not the first argument")
    add(
        "--data",
        type=existing,
        nargs="+",
        default=[],
        help=(
            "folders of images. One that holds a folder 'good' beside others, or holds 'test' with"
            " such, tells kinds of defect by the other folders if each has a folder of masks in"
            " 'ground_truth' or 'masks', as in MVTec AD; else --good and --bad have to name them."
            " Of the images of any other folder the truth is not known"
        ),
    )
    add("--good", type=existing, nargs="+", default=[], help="folders of good images")
    bad = "folders of defective images, one of a kind"
    add("--bad", type=existing, nargs="+", default=[], help=bad)
    add("--masks", type=existing, help=MASKS_HELP)
    watched = (
        "table that `anomalib-sgfr watch` wrote: evidence over time, and what has changed; without"
        " other images the page shows some of the table's"
    )
    add("--watched", type=existing, metavar="TABLE", help=watched)
    state = "state of that watch's monitor (default: TABLE with .json for its ending)"
    add("--monitor", type=existing, metavar="STATE", help=state)
    add("--group", help="regular expression on the path: a row for each product, camera ...")
    most = "most images to show; the page lists the scores of all"
    add("--pictures", type=at_least(0), default=500, help=most)
    add("--out", type=new_file, required=True, help="the page, an HTML file")
    add(
        "--json",
        nargs="?",
        const=_STDOUT,
        type=lambda text: _STDOUT if text == "-" else new_file(text),
        metavar="FILE",
        help=(
            "the figures of the page for programs too: in a file, or without one on the standard"
            " output"
        ),
    )
    return parser


def _require_masks(folder: Path, truths: Mapping[Path, Truth]) -> None:
    """Require that a folder has masks of the defective images, and say if it has not of all.

    Raises:
        ValueError: If it has none.
    """
    defective = [path for path, truth in truths.items() if truth.defective]
    without = [path for path in defective if truths[path].mask is None]
    masks = [truth.mask for truth in truths.values() if truth.mask]
    if not any(folder in {mask, *mask.parents} for mask in masks):
        of = f"of the {len(defective)} defective images" if defective else "as --bad names no image"
        msg = f"--masks: {folder} has no mask {of}{_masks_of(without)}."
        raise ValueError(msg)
    if without:
        some = f"{len(without)} of {len(defective)} defective images have no mask"
        print(f"warning: --masks: {some}{_masks_of(without)}.", file=sys.stderr)


def _masks_of(paths: Sequence[Path]) -> str:
    if not paths:
        return ""
    return f"; that of {paths[0]} is named {paths[0].stem}.png or {paths[0].stem}_mask.png"


def _read_watched(table: Path, state: Path | None) -> tuple[list[dict[str, str]], Monitor]:
    """Scored rows of a watch's table, and its monitor.

    Raises:
        ValueError: If there is none of either.
    """
    state = state or table.with_suffix(".json")
    if not state.is_file():
        msg = f"{state}: no such file; name the state of the watch by --monitor"
        raise ValueError(msg)
    rows = [row for row in read_table(table)[0] if row["score"]]
    if not rows:
        msg = f"{table}: no image was scored"
        raise ValueError(msg)
    return rows, Monitor.read(state)


def _shown(table: Path, streams: Sequence["StreamTable"]) -> dict[Path, Truth]:
    """Images of a watch that its report shows, as far as they are there.

    Raises:
        ValueError: If none is.
    """
    paths = [Path(path) for stream in streams for path in stream.shown]
    found = {path: Truth() for path in paths if path.is_file()}
    if not found:
        msg = (
            f"{table}: no image of it is there, as {paths[0]}: run the command in the folder that"
            " the watch ran in, or name images by --data"
        )
        raise ValueError(msg)
    return found


def _stream_tables(
    model: "Sgfr", rows: Sequence[Mapping[str, str]], monitor: Monitor
) -> list["StreamTable"]:
    """Rows by stream, with what the monitor knows of each.

    Raises:
        ValueError: If the table is of another model than the checkpoint.
    """
    from anomalib_sgfr.report.watched import StreamTable, calibration_images

    threshold = float(getattr(model.post_processor, "image_threshold", math.nan))
    if monitor.threshold and not math.isclose(threshold, monitor.threshold, rel_tol=1e-5):
        msg = (
            f"the watch was of a model with the threshold {monitor.threshold:.6g}, the checkpoint's"
            f" is {threshold:.6g}: name the checkpoint that was watched with."
        )
        raise ValueError(msg)
    by_stream: dict[str, list[Mapping[str, str]]] = {}
    for row in rows:
        by_stream.setdefault(monitor.stream_of(row["image"]), []).append(row)
    calibration = calibration_images(model)
    tables = []
    for name, own in by_stream.items():
        known = monitor.streams.get(name)
        if known is None:  # the watch ended before it wrote its state
            continue
        changed = [row["changed"] for row in own]
        its = [path for path in calibration if monitor.stream_of(path) == name]
        tables.append(
            StreamTable(
                name=name,
                paths=[row["image"] for row in own],
                scores=[float(row["score"]) for row in own],
                p_values=[float(row["p_value"]) for row in own],
                evidence=[float(row["evidence"]) for row in own],
                limit=known.limit,
                changed_at=changed.index("1") + 1 if "1" in changed else None,
                calibration=its or calibration,
            )
        )
    return tables


def _write_figures(contents: "ReportContents", file: Path) -> int:
    """Write the figures of a page; returns the exit code."""
    from anomalib_sgfr.report.contents import as_json
    from anomalib_sgfr.report.page import write_page

    text = json.dumps(as_json(contents), indent=2)
    if file == _STDOUT:
        print(text)
        return 0
    try:
        write_page(f"{text}\n", file)
    except OSError as error:  # the page is there all the same
        print(f"error: the figures {file} could not be written: {error}", file=sys.stderr)
        return 1
    return 0


def truths_in(
    data: Sequence[Path],
    good: Sequence[Path] = (),
    bad: Sequence[Path] = (),
    masks: Path | None = None,
) -> dict[Path, Truth]:
    """Images in folders, with the labels and masks that the folders give.

    Args:
        data (Sequence[Path]): Folders. One that holds ``good`` beside others, or ``test`` with
            such, as MVTec AD's, has kinds of defect in the others, if each of these has a folder of
            masks under ``ground_truth`` or ``masks`` in it or beside it. Of the images of a folder
            without ``good`` nothing is known.
        good (Sequence[Path]): Of good images.
        bad (Sequence[Path]): Of defective images, each of a kind.
        masks (Path | None): Of masks, paired as :class:`~anomalib_sgfr.cli.prediction.MaskFolder`
            does.

    Returns:
        dict[Path, Truth]: What was said last of an image counts.

    Raises:
        ValueError: If there is no image in a folder, or it is not certain which of its folders are
            defective.
    """
    found: dict[Path, Truth] = {}
    own = MaskFolder(masks) if masks else None
    for folder in data:
        inside = folder / "test" if (folder / "test" / _GOOD).is_dir() else folder
        if (inside / _GOOD).is_dir():
            found |= _laid_out(inside, masks)
        else:
            found |= dict.fromkeys(images_in(folder), Truth())
    for folder in good:
        found |= dict.fromkeys(images_in(folder), _GOOD_TRUTH)
    for folder in bad:
        kind = (folder.name if folder.is_dir() else folder.parent.name) or "defect"
        found |= {path: _said(path, kind, own) for path in images_in(folder)}
    # by whatever path it was given last
    once = {path.resolve(): (path, truth) for path, truth in found.items()}
    return dict(once.values())


def _laid_out(inside: Path, masks: Path | None) -> dict[Path, Truth]:
    """Images of a folder that holds ``good`` beside folders of defects, which have masks."""
    beside = [inside / name for name in _MASKS] + [inside.parent / name for name in _MASKS]
    places = [masks, *beside] if masks else beside
    other = {_GOOD, *_MASKS}
    kinds = sorted(path for path in inside.iterdir() if path.is_dir() and path.name not in other)
    where = {
        kind.name: place
        for kind in kinds
        for place in reversed(places)
        if (place / kind.name).is_dir()
    }
    uncertain = [kind for kind in kinds if kind.name not in where]
    every = (path for kind in (inside / _GOOD, *kinds) for path in kind.rglob("*"))
    nested = [path for path in every if path.name in _MASK_FOLDERS]
    if uncertain or any(path.is_dir() for path in nested):
        names = ", ".join(kind.name for kind in kinds) or "no others"
        why = "no masks say which are defective"
        if not uncertain:
            why = f"{nested[0]} holds masks among the images"
        good, bad = (shlex.quote(str(path)) for path in (inside / _GOOD, [*kinds, inside][0]))
        ways = f"--good {good} --bad {bad} ..."
        msg = f"--data {inside}: it holds good beside {names}, and {why}: name them by {ways}"
        raise ValueError(msg)
    found: dict[Path, Truth] = {}
    paired = {place: MaskFolder(place) for place in set(where.values())}
    for path in images_in(inside):
        kind, *below = path.relative_to(inside).parts
        if not below:
            found[path] = Truth()
        elif kind == _GOOD:
            found[path] = _GOOD_TRUTH
        elif kind not in _MASKS:
            found[path] = _said(path, kind, paired[where[kind]])
    return found


def _said(path: Path, kind: str, masks: MaskFolder | None) -> Truth:
    """What is known of an image of a kind of defect."""
    return Truth(defective=True, kind=kind, mask=masks.mask_of(path) if masks else None)
