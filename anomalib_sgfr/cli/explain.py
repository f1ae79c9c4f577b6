"""``anomalib-sgfr explain``: figures that explain the images of a folder."""

from collections.abc import Sequence
from pathlib import Path

from anomalib_sgfr.cli.arguments import (
    Parser,
    at_least,
    existing,
    images_in,
    load,
    new_folder,
    take_checkpoint,
)
from anomalib_sgfr.cli.prediction import predict_images, report_damaged

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw figures that explain images; returns 1 if an image could not be read."""
    parser = Parser(
        prog="anomalib-sgfr explain",
        description=__doc__.partition(": ")[2],
        usage="anomalib-sgfr explain [options] CKPT IMAGES ... | IMAGES ... --ckpt_path CKPT",
        epilog=(
            "A figure lies below --out as its image does below the folder that holds all images;"
            " scores.csv beside."
        ),
    )
    add = parser.add_argument
    images = "checkpoint of a fitted Sgfr, and images or folders of images"
    add("images", type=existing, nargs="*", help=images)
    add("--ckpt_path", type=existing, help="the checkpoint, if not among the others")
    add("--out", type=new_folder, default=Path("explanations"), help="folder of the figures")
    add("--regions", type=at_least(1), default=3, help="most regions of an image to explain")
    add("--only_anomalous", action="store_true", help="leave out images that are labelled normal")
    options = parser.parse_intermixed_args(arguments)
    checkpoint = take_checkpoint(parser, options.ckpt_path, options.images)
    if not options.images:
        parser.error("pass images: a file or a folder")

    from anomalib_sgfr.report.figure import ExplanationFigure

    files = list(dict.fromkeys(file for path in options.images for file in images_in(path)))
    model = load(checkpoint, visualizer=False)
    figures = ExplanationFigure(str(options.out), options.regions, options.only_anomalous)
    damaged: dict[Path, str] = {}
    predict_images(model, figures, files, damaged, folder=options.out)
    if len(damaged) < len(files):
        print(f"Figures: {options.out}")
    return report_damaged(damaged)
