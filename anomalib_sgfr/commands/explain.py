"""``anomalib-sgfr explain``: the mimic view of a folder of images."""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from anomalib_sgfr.commands.inputs import Parser, at_least, existing, images_in, load, quiet, readable

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw; returns the exit code, 1 if an image could not be read."""
    parser = Parser(prog="anomalib-sgfr explain", description=__doc__.partition(": ")[2])
    parser.add_argument("images", type=existing, help="an image or a folder of images")
    parser.add_argument("--ckpt_path", type=existing, required=True, help="checkpoint of a fitted Sgfr")
    parser.add_argument("--out", type=Path, default=Path("mimic"), help="folder of the figures")
    parser.add_argument("--regions", type=at_least(1), default=3, help="most regions of an image to explain")
    parser.add_argument("--only_anomalous", action="store_true", help="leave out images that are labelled normal")
    options = parser.parse_args(arguments)

    from anomalib.engine import Engine

    from anomalib_sgfr.inspection.mimic_view import MimicView

    quiet()
    images = images_in(options.images)
    model = load(options.ckpt_path, visualizer=False)
    view = MimicView(str(options.out), options.regions, options.only_anomalous)
    damaged: dict[Path, str] = {}
    with tempfile.TemporaryDirectory() as scratch:
        engine = Engine(default_root_dir=scratch, logger=False, devices=1, callbacks=[view])
        engine.predict(model, dataloaders=readable(images, damaged, model.model.bit_depth), return_predictions=False)
    if len(damaged) < len(images):
        print(f"Figures: {options.out}")
    for path, reason in damaged.items():
        print(f"error: {path} cannot be read: {reason}", file=sys.stderr)
    return 1 if damaged else 0
