"""``python -m anomalib_sgfr explain``: the mimic view of a folder of images."""

import argparse
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path

from anomalib.data import PredictDataset
from anomalib.engine import Engine

from anomalib_sgfr.inspection.mimic_view import MimicView
from anomalib_sgfr.lightning_model import Sgfr

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m anomalib_sgfr explain", description=__doc__.partition(": ")[2])
    parser.add_argument("images", type=Path, help="an image or a folder of images")
    parser.add_argument("--ckpt_path", type=Path, required=True, help="checkpoint of a fitted Sgfr")
    parser.add_argument("--out", type=Path, default=Path("mimic"), help="folder of the figures")
    parser.add_argument("--regions", type=int, default=3, help="most regions of an image to explain")
    parser.add_argument("--only_anomalous", action="store_true", help="leave out images that are labelled normal")
    options = parser.parse_args(arguments)
    for path in (options.images, options.ckpt_path):
        if not path.exists():
            parser.error(f"{path}: no such file or folder")
    if options.regions < 1:
        parser.error(f"--regions must be at least 1, got {options.regions}")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    view = MimicView(str(options.out), options.regions, options.only_anomalous)
    with tempfile.TemporaryDirectory() as scratch:
        engine = Engine(default_root_dir=scratch, logger=False, devices=1, callbacks=[view])
        model = Sgfr.load_from_checkpoint(options.ckpt_path, map_location="cpu", visualizer=False)
        engine.predict(model, dataset=PredictDataset(options.images), return_predictions=False)
    print(f"Figures: {options.out}")  # noqa: T201
    return 0
