"""``anomalib-sgfr explain``: figures that explain the images of a folder."""

import sys
from collections.abc import Sequence
from pathlib import Path

from anomalib_sgfr.cli.arguments import (
    Parser,
    at_least,
    existing,
    images_in,
    load,
    new_folder,
    quiet,
    take_checkpoint,
)
from anomalib_sgfr.cli.prediction import predict_images

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw figures that explain images.

    Args:
        arguments (Sequence[str] | None): Arguments of the command; ``None`` for the process's own.

    Returns:
        int: Exit code, 1 if an image could not be read.
    """
    parser = Parser(
        prog="anomalib-sgfr explain",
        description=__doc__.partition(": ")[2],
        usage="anomalib-sgfr explain [options] CKPT IMAGES ... | IMAGES ... --ckpt_path CKPT",
        epilog=(
            "A figure lies below --out as its image does below the folder that holds all images;"
            " scores.csv beside."
        ),
    )
    parser.add_argument(
        "images",
        type=existing,
        nargs="*",
        help="checkpoint of a fitted Sgfr, and images or folders of images",
    )
    parser.add_argument(
        "--ckpt_path", type=existing, help="the checkpoint, if not among the others"
    )
    parser.add_argument(
        "--out", type=new_folder, default=Path("mimic"), help="folder of the figures"
    )
    parser.add_argument(
        "--regions", type=at_least(1), default=3, help="most regions of an image to explain"
    )
    parser.add_argument(
        "--only_anomalous", action="store_true", help="leave out images that are labelled normal"
    )
    options = parser.parse_intermixed_args(arguments)
    checkpoint = take_checkpoint(parser, options.ckpt_path, options.images)
    if not options.images:
        parser.error("pass images: a file or a folder")

    from anomalib_sgfr.report.figure import ExplanationFigure

    quiet()
    images = list(dict.fromkeys(file for path in options.images for file in images_in(path)))
    model = load(checkpoint, visualizer=False)
    figures = ExplanationFigure(str(options.out), options.regions, options.only_anomalous)
    damaged: dict[Path, str] = {}
    predict_images(model, figures, images, damaged, folder=options.out)
    if len(damaged) < len(images):
        print(f"Figures: {options.out}")
    for path, reason in damaged.items():
        print(f"error: {path} cannot be read: {reason}", file=sys.stderr)
    return 1 if damaged else 0
