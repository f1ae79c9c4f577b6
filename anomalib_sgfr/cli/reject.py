"""``anomalib-sgfr reject``: learn from missed defects, or take that back."""

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from anomalib_sgfr.cli.arguments import (
    Parser,
    existing,
    image_files,
    images_in,
    load,
    post_processor_of,
    rewrite,
)

if TYPE_CHECKING:
    from torch import Tensor

    from anomalib_sgfr.lightning_model import Sgfr
    from anomalib_sgfr.training.reject import Defect, Limits

__all__ = ["main"]

_SUFFIX = "_rejected"
_MOST_IMAGES = 10  # of one command
_Box = tuple[int, int, int, int]  # left, top, width and height in pixels of the file


class _Rejected(NamedTuple):
    """Image of a missed defect, its region at the model's input, and its raw score before."""

    path: str
    image: "Tensor"
    region: "Tensor"
    before: float
    box: _Box | None = None


def main(arguments: Sequence[str] | None = None) -> int:
    """Reject images, take them back, or list them; returns 1 if nothing could be learned."""
    parser = Parser(prog="anomalib-sgfr reject", description=__doc__.partition(": ")[2])
    add = parser.add_argument
    parser.add_checkpoint()
    about = (
        "images of a missed defect, at most 10, or folders of such; none: list what was rejected"
    )
    add("images", nargs="*", type=existing, help=about)
    where = parser.add_mutually_exclusive_group()
    about = "folder of masks, white on the defect, with the images' names"
    where.add_argument("--masks", type=existing, help=about)
    about = "box around the defect in pixels of the one image: left, top, width, height"
    where.add_argument("--region", type=_box, metavar="X,Y,W,H", help=about)
    about = "take the worst region of each image, which is shown without this option"
    where.add_argument("--yes", action="store_true", help=about)
    add("--good", type=existing, help="folder of more good images, none of which may score higher")
    add("--undo", action="store_true", help="take back what was rejected last")
    parser.add_out(_SUFFIX)
    options = parser.parse_args(arguments)
    if options.undo and options.images:
        parser.error("--undo takes back what was rejected last: pass no images with it")
    files = image_files(options.images)
    if len(files) > _MOST_IMAGES:
        parser.error(f"{len(files)} images: reject at most {_MOST_IMAGES} at a time, the clearest")
    if options.region and len(files) != 1:
        parser.error(f"--region is of one image, there are {len(files)}: use --masks for several")

    model = load(options.ckpt_path, visualizer=False, evaluator=False)
    own = options.ckpt_path if options.ckpt_path.stem.endswith(_SUFFIX) else None
    out = options.out or own or options.ckpt_path.with_stem(options.ckpt_path.stem + _SUFFIX)
    if options.undo:
        print(_undo(model))
    elif files:
        if not post_processor_of(model).is_set:
            msg = (
                "the checkpoint has no threshold, so nothing was missed: `anomalib-sgfr threshold`"
                " sets one."
            )
            raise ValueError(msg)
        _refuse_known_good(model, files)
        rejected = [_read(model, path, options.masks, options.region) for path in files]
        if not (options.masks or options.region or options.yes):
            _show(rejected, out.with_name(f"{out.stem}_regions"), model.model.bit_depth)
            return 0
        if not _reject(model, rejected, options.good):
            return 1
    else:
        print(_listed(model))
        return 0
    rewrite(options.ckpt_path, out, model)
    print(f"Checkpoint: {out}")
    return 0


def _box(text: str) -> _Box:
    try:
        left, top, width, height = map(int, text.split(","))
    except ValueError:
        left = top = width = height = -1
    if min(left, top) < 0 or min(width, height) < 1:
        msg = f"must be four integers X,Y,W,H, left and top from 0, got '{text}'"
        raise argparse.ArgumentTypeError(msg)
    return left, top, width, height


def _listed(model: "Sgfr") -> str:
    """Images that were rejected, as text."""
    torch_model = model.model
    if not torch_model.rejected:
        return "No image was rejected."
    lines = []
    for number, image in enumerate(torch_model.rejected):
        patches = [
            int((bank.defects.origin[:, 0] == number).sum()) if bank.defects.size else 0
            for bank in torch_model.banks
        ]
        date, _, path = image.partition(" ")
        lines.append(f"{number + 1}. {date}: {path}, patches {' + '.join(map(str, patches))}")
    return "\n".join(lines)


def _undo(model: "Sgfr") -> str:
    """Take back what was rejected last; returns a sentence about it."""
    from anomalib_sgfr.training.reject import without_last

    before = model.model.fitted_state
    if not before.rejected:
        msg = "no image was rejected: there is nothing to take back."
        raise ValueError(msg)
    model.model.load_defects(without_last(before))
    number = len(before.rejected) - len(model.model.rejected)
    return f"Taken back: {number} images, rejected {before.rejected[-1].partition(' ')[0]}."


def _refuse_known_good(model: "Sgfr", files: Sequence[str]) -> None:
    """Refuse images that the checkpoint knows as good ones."""
    from anomalib_sgfr.report.model_facts import known_images

    good = [*model.model.images, *post_processor_of(model).calibration_scores.good.paths]
    found, _ = known_images(files, good)
    for path, is_known in zip(files, found, strict=True):
        if is_known:
            msg = (
                f"{path}: the checkpoint was fitted to it or calibrated on it as a good image; if"
                " it shows a defect, fit again without it."
            )
            raise ValueError(msg)


def _read(model: "Sgfr", path: str, masks: Path | None, box: _Box | None) -> _Rejected:
    """Read an image and the region of its defect."""
    import torch

    from anomalib_sgfr.images.pre_processor import geometric_steps, read_prepared
    from anomalib_sgfr.images.reading import upright_size
    from anomalib_sgfr.images.roi import mask_at_input, read_defect_mask
    from anomalib_sgfr.training.reject import worst_region

    model.eval()
    image = read_prepared(path, model.pre_processor, model.model.bit_depth)
    with torch.no_grad():
        found = model.model.score_maps(image[None])
    before, size = float(found.pred_score), upright_size(path)
    if masks is None and box is None:
        region = worst_region(found.score_map[0, 0])
        box = _box_of(region, geometric_steps(model.pre_processor.transform), size)
        return _Rejected(path, image, region, before, box)
    if masks is not None:
        file = _mask_of(path, masks)
        inside = read_defect_mask(file)
        if tuple(inside.shape) != size:
            height, width = inside.shape
            msg = f"mask '{file}' is {height} x {width} pixels, its image {size[0]} x {size[1]}."
            raise ValueError(msg)
    elif box is not None:
        left, top, width, height = box
        if left + width > size[1] or top + height > size[0]:
            msg = (
                f"--region: the box does not lie within {path}, which is {size[1]} pixels wide and"
                f" {size[0]} high."
            )
            raise ValueError(msg)
        inside = torch.zeros(size, dtype=torch.bool)
        inside[top : top + height, left : left + width] = True
    region = mask_at_input(inside, model.pre_processor)
    return _Rejected(path, image, region, before, box)


def _mask_of(path: str, folder: Path) -> Path:
    """Mask of an image: the file of its name, or of its name and ``_mask`` or the like."""
    stem = Path(path).stem
    masks = [folder] if folder.is_file() else images_in(folder)
    found = [mask for mask in masks if mask.stem == stem] or [
        mask for mask in masks if mask.stem.startswith(f"{stem}_")
    ]
    if len(found) == 1:
        return found[0]
    several = f"{len(found)} masks are named like it" if found else "there is no mask for it"
    msg = f"--masks: {path}: {several} in {folder}; its name is {stem} or {stem}_mask."
    raise ValueError(msg)


def _box_of(region: "Tensor", steps: Sequence[tuple], size: tuple[int, int]) -> _Box:  # type: ignore[type-arg]
    """Box around a region, in pixels of the file."""
    import numpy as np

    from anomalib_sgfr.images.frame_geometry import frame_transform

    frame = frame_transform(steps, size)
    rows, columns = np.nonzero(region.cpu().numpy())
    shape = region.shape
    top, left = frame.frame_pixel((rows.min(), columns.min()), shape)
    bottom, right = frame.frame_pixel((rows.max(), columns.max()), shape)
    return left, top, right - left + 1, bottom - top + 1


def _show(rejected: Sequence[_Rejected], folder: Path, bit_depth: int) -> None:
    """Show the worst region of each image, and how to take it or another."""
    import numpy as np
    from PIL import Image, ImageDraw

    from anomalib_sgfr.images.reading import read_image
    from anomalib_sgfr.run_paths import atomic_write

    folder.mkdir(parents=True, exist_ok=True)
    for number, item in enumerate(rejected, 1):
        if item.box is None:
            continue
        left, top, width, height = item.box
        box = ",".join(map(str, item.box))
        pixels = np.asarray(read_image(item.path, bit_depth))
        drawn = Image.fromarray((255 * pixels).round().astype(np.uint8))
        stroke = max(1, round(max(drawn.size) / 300))
        corners = (
            left - stroke,
            top - stroke,
            left + width - 1 + stroke,
            top + height - 1 + stroke,
        )
        ImageDraw.Draw(drawn).rectangle(corners, outline=(0, 255, 255), width=stroke)
        file = folder / f"{number}_{Path(item.path).stem}.png"
        with atomic_write(file) as part:
            drawn.save(part, format="PNG")
        print(f"{item.path}: worst region --region {box}, drawn in {file}")
    print(
        "Nothing was learned yet: --yes takes these regions; --region or --masks name others, which"
        " are needed where a region misses the defect."
    )


def _reject(model: "Sgfr", rejected: Sequence[_Rejected], more: Path | None) -> bool:
    """Reject images, and print what becomes of each; returns whether anything was learned."""
    import torch

    from anomalib_sgfr.training.reject import MOST, add_defects, find_defect, find_limits

    processor = post_processor_of(model)
    own, threshold = model.model, processor.label_threshold
    date = datetime.now(UTC).isoformat(timespec="seconds")
    defects = [
        find_defect(own, item.image, f"{date} {item.path}", item.region) for item in rejected
    ]
    for item, defect in zip(rejected, defects, strict=True):
        if not defect.number:
            msg = (
                f"{item.path}: the banks rebuild every patch of the region as well as those of good"
                " images: at this image size the defect leaves no trace to learn from."
            )
            raise ValueError(msg)
    known = processor.calibration_scores.good.paths
    good = [path for path in known if Path(path or ".").is_file()]
    gone = len(known) - len(good)
    good += [path for path in (image_files([more]) if more else []) if path not in good]
    if not good:
        msg = (
            "none of the images that the checkpoint was calibrated on is there: pass good ones by"
            " --good DIR."
        )
        raise ValueError(msg)
    limits = find_limits(own, model.pre_processor, good, defects, processor.state.group)
    tried = own.with_banks(add_defects(own.fitted_state, defects, limits.values))
    size = max(bank.defects.size for bank in tried.banks)
    if size > MOST:
        msg = (
            f"the defect bank of a scale would hold {size} patches, more than {MOST}: take earlier"
            " ones back by --undo, or reject fewer images."
        )
        raise ValueError(msg)
    with torch.no_grad():
        now = [float(tried.score_maps(item.image[None]).pred_score) for item in rejected]
    if all(score <= item.before for score, item in zip(now, rejected, strict=True)):
        _print_most_alike(limits, sys.stderr)
        print(
            "error: nothing was learned: good images resemble the defect as much as the rejected"
            " ones do.",
            file=sys.stderr,
        )
        return False
    own.load_defects(tried.fitted_state)
    for item, defect, score in zip(rejected, defects, now, strict=True):
        print(_sentence(item, defect, score, threshold))
    _print_most_alike(limits, sys.stdout)
    print(f"The scores of {len(good)} known good images stay, and so does the threshold.")
    if gone:
        print(
            f"warning: {gone} of the {len(known)} images that the threshold is calibrated on are"
            " not there: their scores may rise. --good DIR names others.",
            file=sys.stderr,
        )
    return True


def _sentence(item: _Rejected, defect: "Defect", score: float, threshold: float) -> str:
    """What became of an image."""
    verb = "was found before" if item.before > threshold else "was missed"
    still = "is found now" if score > threshold else "is still missed"
    patches = " + ".join(str(len(atoms)) for atoms in defect.atoms)
    return (
        f"{item.path}: {patches} patches, raw score {item.before:.4g} before, {score:.4g} now,"
        f" threshold {threshold:.4g}: {verb}, {still}"
    )


def _print_most_alike(limits: "Limits", file: object) -> None:
    """Name the good images that set the limits."""
    names = dict.fromkeys(filter(None, limits.images))
    print(f"Good images most like the defects: {', '.join(names)}", file=file)  # type: ignore[call-overload]
