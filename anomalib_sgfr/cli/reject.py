"""``anomalib-sgfr reject``: learn from missed defects, or take that back."""

import argparse
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from anomalib_sgfr.cli.arguments import (
    Parser,
    existing,
    image_files,
    load,
    post_processor_of,
    require_images,
)
from anomalib_sgfr.cli.prediction import MASKS_HELP, MaskFolder

if TYPE_CHECKING:
    from torch import Tensor

    from anomalib_sgfr.lightning_model import Sgfr

__all__ = ["main"]

_SUFFIX = "_rejected"
_MOST_IMAGES = 10  # of one command
_Box = tuple[int, int, int, int]  # left, top, width and height in pixels of the file


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
    where.add_argument("--masks", type=existing, help=MASKS_HELP)
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
    require_images(parser, options, "masks", "region", "yes", "good")
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
        from anomalib_sgfr.training.reject import check_images

        check_images(model, files)
        if not (options.masks or options.region or options.yes):
            _show(model, files, out.with_name(f"{out.stem}_regions"))
            return 0
        masks = MaskFolder(options.masks) if options.masks else None
        regions = {path: _region(path, masks, options.region) for path in files}
        if not _reject(model, regions, options.good):
            print("Nothing was added.")
            return 0
    else:
        print(_listed(model))
        return 0
    model.save_checkpoint(out)
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


def _region(path: str, masks: MaskFolder | None, box: _Box | None) -> "Tensor | None":
    """Mask of the defect in pixels of the file; ``None`` for the worst region."""
    import torch

    from anomalib_sgfr.images.reading import upright_size
    from anomalib_sgfr.images.roi import read_defect_mask

    if masks is not None:
        file = masks.mask_of(Path(path))
        if file is None:
            stem = Path(path).stem
            msg = f"--masks: {path}: there is no mask for it, named {stem} or {stem}_mask."
            raise ValueError(msg)
        inside, size = read_defect_mask(file), upright_size(path)
        if tuple(inside.shape) != size:
            height, width = inside.shape
            msg = f"mask '{file}' is {height} x {width} pixels, its image {size[0]} x {size[1]}."
            raise ValueError(msg)
        return inside
    if box is None:
        return None
    (left, top, width, height), size = box, upright_size(path)
    if left + width > size[1] or top + height > size[0]:
        msg = (
            f"--region: the box does not lie within {path}, which is {size[1]} pixels wide and"
            f" {size[0]} high."
        )
        raise ValueError(msg)
    inside = torch.zeros(size, dtype=torch.bool)
    inside[top : top + height, left : left + width] = True
    return inside


def _worst_box(model: "Sgfr", path: str) -> _Box:
    """Box around the worst region of an image, in pixels of the file."""
    import numpy as np
    import torch

    from anomalib_sgfr.images.frame_geometry import frame_transform
    from anomalib_sgfr.images.pre_processor import geometric_steps, read_prepared
    from anomalib_sgfr.images.reading import upright_size
    from anomalib_sgfr.training.reject import worst_region

    image = read_prepared(path, model.pre_processor, model.model.bit_depth)
    with torch.no_grad():
        region = worst_region(model.eval().model.score_maps(image[None]).score_map[0, 0])
    frame = frame_transform(geometric_steps(model.pre_processor.transform), upright_size(path))
    rows, columns = np.nonzero(region.cpu().numpy())
    top, left = frame.frame_pixel((rows.min(), columns.min()), region.shape)
    bottom, right = frame.frame_pixel((rows.max(), columns.max()), region.shape)
    return left, top, right - left + 1, bottom - top + 1


def _show(model: "Sgfr", files: Sequence[str], folder: Path) -> None:
    """Show the worst region of each image, and how to take it or another."""
    import numpy as np
    from PIL import Image, ImageDraw

    from anomalib_sgfr.images.reading import read_image
    from anomalib_sgfr.run_paths import atomic_write

    folder.mkdir(parents=True, exist_ok=True)
    for number, path in enumerate(files, 1):
        left, top, width, height = box = _worst_box(model, path)
        pixels = np.asarray(read_image(path, model.model.bit_depth))
        drawn = Image.fromarray((255 * pixels).round().astype(np.uint8))
        stroke = max(1, round(max(drawn.size) / 300))
        corners = (
            left - stroke,
            top - stroke,
            left + width - 1 + stroke,
            top + height - 1 + stroke,
        )
        ImageDraw.Draw(drawn).rectangle(corners, outline=(0, 255, 255), width=stroke)
        file = folder / f"{number}_{Path(path).stem}.png"
        with atomic_write(file) as part:
            drawn.save(part, format="PNG")
        print(f"{path}: worst region --region {','.join(map(str, box))}, drawn in {file}")
    print(
        "Nothing was learned yet: --yes takes these regions; --region or --masks name others, which"
        " are needed where a region misses the defect."
    )


def _reject(model: "Sgfr", regions: "Mapping[str, Tensor | None]", more: Path | None) -> bool:
    """Reject images, and print what becomes of each; returns whether anything was added."""
    from anomalib_sgfr.training.reject import reject

    found = reject(model, regions, image_files([more]) if more else [])
    processor = post_processor_of(model)
    threshold, known = processor.label_threshold, len(processor.calibration_scores.good.paths)
    for image, learnt, before, now, known_since in found.images:
        if known_since:
            print(
                f"{image}: was rejected already, {known_since}: nothing to add. --region or --masks"
                " mark more of it; --undo takes back what was rejected last."
            )
            continue
        verb = "was found before" if before > threshold else "was missed"
        still = "is found now" if now > threshold else "is still missed"
        print(
            f"{image}: {' + '.join(map(str, learnt))} patches, raw score {before:.4g} before,"
            f" {now:.4g} now, threshold {threshold:.4g}: {verb}, {still}"
        )
    if not any(sum(image.patches) for image in found.images):
        return False
    print(f"Good images most like the defects: {', '.join(found.most_alike)}")
    print(f"The scores of {found.good} known good images stay, and so does the threshold.")
    if found.gone:
        print(
            f"warning: {found.gone} of the {known} images that the threshold is calibrated on are"
            " not there: their scores may rise. --good DIR names others.",
            file=sys.stderr,
        )
    return True
