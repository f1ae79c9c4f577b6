"""``anomalib-sgfr report``: one page to look at, judge and share, of any checkpoint and any folder of images."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from anomalib_sgfr.commands.inputs import Parser, Truth, at_least, existing, images_in, load, new_file, quiet, readable

__all__ = ["main", "truths_in"]

_GOOD = "good"
_MASKS = ("ground_truth", "masks")


def main(arguments: Sequence[str] | None = None) -> int:
    """Inspect and write; returns the exit code, 1 if an image could not be read or the page not be written."""
    parser = Parser(prog="anomalib-sgfr report", description=__doc__.partition(": ")[2])
    parser.add_argument("ckpt_path", type=existing, help="checkpoint of a fitted Sgfr")
    parser.add_argument(
        "--data",
        type=existing,
        nargs="+",
        default=[],
        help="folders of images: one that holds a folder 'good' tells kinds of defect by its other folders, as MVTec "
        "AD does; of the images of any other the truth is not known",
    )
    parser.add_argument("--good", type=existing, nargs="+", default=[], help="folders of good images")
    parser.add_argument(
        "--bad", type=existing, nargs="+", default=[], help="folders of defective images, one of a kind"
    )
    parser.add_argument("--masks", type=existing, help="folder of masks, named as the images or NAME_mask")
    parser.add_argument("--group", help="regular expression on the path: a line for each product, camera ...")
    parser.add_argument("--pictures", type=at_least(0), default=500, help="most images to show with pictures")
    parser.add_argument("--out", type=new_file, required=True, help="the page, an HTML file")
    options = parser.parse_args(arguments)
    if not (options.data or options.good or options.bad):
        parser.error("pass images: --data, --good or --bad FOLDER")

    from anomalib.engine import Engine

    from anomalib_sgfr.inspection.evidence import require_group
    from anomalib_sgfr.report.callback import Report

    quiet()
    truths = truths_in(options.data, options.good, options.bad, options.masks)
    require_group(options.group, [str(path) for path in truths])
    model = load(options.ckpt_path, visualizer=False, evaluator=False)
    report = Report(options.out, options.group, options.pictures)
    report.checkpoint = str(options.ckpt_path)
    report.kinds = {str(path): truth.kind for path, truth in truths.items() if truth.kind}
    damaged: dict[Path, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        engine = Engine(default_root_dir=scratch, logger=False, devices=1, callbacks=[report])
        loader = readable(list(truths), damaged, model.model.bit_depth, truths)
        engine.predict(model, dataloaders=loader, return_predictions=False)
    for path, reason in damaged.items():
        print(f"error: {path} cannot be read: {reason}", file=sys.stderr)
    if report.written is None:
        print(f"error: {report.failed or 'no image was inspected: there is no report'}", file=sys.stderr)
        return 1
    print(f"Report: {report.written}")
    return 1 if damaged else 0


def truths_in(
    data: Sequence[Path], good: Sequence[Path] = (), bad: Sequence[Path] = (), masks: Path | None = None
) -> dict[Path, Truth]:
    """Images in folders, and what the folders say of them.

    Args:
        data (Sequence[Path]): One that holds ``good`` has kinds of defect in its other folders, with masks under
            ``ground_truth`` or ``masks`` in it or beside it; one that holds ``test`` with such, as MVTec AD's, means
            that. Of the images of others nothing is known.
        good (Sequence[Path]): Of good images.
        bad (Sequence[Path]): Of defective images, each of a kind.
        masks (Path | None): Of masks.

    Returns:
        dict[Path, Truth]: What was said last of an image counts.

    Raises:
        ValueError: If there is no image in a folder.
    """
    found: dict[Path, Truth] = {}
    for folder in data:
        inside = folder / "test" if (folder / "test" / _GOOD).is_dir() else folder
        if not (inside / _GOOD).is_dir():
            found |= dict.fromkeys(images_in(folder), Truth())
            continue
        beside = [inside / name for name in _MASKS] + [inside.parent / name for name in _MASKS]
        where = masks or next((place for place in beside if place.is_dir()), None)
        for path in images_in(inside):
            parts = path.relative_to(inside).parts
            if len(parts) > 1 and parts[0] not in _MASKS:
                found[path] = _said(path, parts[0], where)
            elif len(parts) == 1:
                found[path] = Truth()
    for folder in good:
        found |= dict.fromkeys(images_in(folder), Truth(defective=False, kind=_GOOD))
    for folder in bad:
        kind = folder.name if folder.is_dir() else folder.parent.name
        found |= {path: _said(path, kind or "defect", masks, bad=True) for path in images_in(folder)}
    return found


def _said(path: Path, kind: str, masks: Path | None, *, bad: bool = False) -> Truth:
    if kind == _GOOD and not bad:
        return Truth(defective=False, kind=_GOOD)
    stems = (path.stem, f"{path.stem}_mask")
    names = [f"{stem}{suffix}" for stem in stems for suffix in dict.fromkeys((".png", path.suffix, ".bmp", ".tif"))]
    places = [folder / name for folder in ([masks / kind, masks] if masks else []) for name in names]
    return Truth(defective=True, kind=kind, mask=next((place for place in places if place.is_file()), None))
