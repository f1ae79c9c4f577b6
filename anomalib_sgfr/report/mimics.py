"""The mimic view as the page shows it: small crops of the nominal patches that rebuilt an image's worst places."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from anomalib_sgfr.core.geometry import Place
from anomalib_sgfr.features.pre_processing import read_prepared
from anomalib_sgfr.inspection.explanation import Reconstruction, explain
from anomalib_sgfr.inspection.gallery import CONTEXT, Gallery, crop, displayed
from anomalib_sgfr.report.digest import Crop, Mimic, MimicRow
from anomalib_sgfr.report.thumbnails import webp
from anomalib_sgfr.torch_model import SgfrModel

__all__ = ["mimic_of", "training_picture"]

_REGIONS, _CROPS, _SIDE = 2, 4, 56


def mimic_of(model: SgfrModel, pre_processor: Any, path: str, gallery: Gallery) -> Mimic:  # noqa: ANN401
    """Explain an image, read anew from its file.

    Args:
        model (SgfrModel): A fitted model.
        pre_processor (Any): Its pre-processor.
        path (str): The image.
        gallery (Gallery): Keeps training images that were read.

    Returns:
        Mimic: Or why there is none.
    """
    if not path or not Path(path).is_file():
        return Mimic([], "The image's file is gone, so it is not explained.")
    try:
        image = read_prepared(path, pre_processor, model.bit_depth).to(next(model.parameters()))
        found = explain(model, image, _REGIONS)
    except (OSError, ValueError, RuntimeError, SyntaxError) as error:
        return Mimic([], f"The image is not explained: {error}")
    shown = displayed(pre_processor, image)
    rows = []
    for number, region in enumerate(found.regions, 1):
        window = Place(region.row, region.column, found.grid).window(shown.shape[:2], CONTEXT)
        height, width = shown.shape[:2]
        box = (window.left / width, window.top / height, window.width / width, window.height / height)
        rows += [_row(number, box, part, shown, gallery) for part in region.reconstructions]
    return Mimic(rows)


def _row(
    number: int,
    box: tuple[float, float, float, float],
    part: Reconstruction,
    shown: NDArray[np.float32],
    gallery: Gallery,
) -> MimicRow:
    crops = []
    for contribution in part.contributions[:_CROPS]:
        seen = gallery.crop(part.scale, contribution.atom)
        picture = None if seen is None else webp(np.asarray(seen, np.float32), _SIDE)
        crops.append(Crop(picture, contribution.coefficient, contribution.image or ""))
    return MimicRow(
        number=number,
        box=box,
        pixels=round(shown.shape[0] / part.grid[0]),
        residual=part.residual,
        nominal=part.nominal,
        here=webp(crop(shown, Place(part.row, part.column, part.grid)), _SIDE),
        crops=crops,
    )


def training_picture(path: str, pre_processor: Any, bit_depth: int, side: int = 160) -> bytes | None:  # noqa: ANN401
    """A training image as the model saw it, WebP; ``None`` if it is gone."""
    try:
        with torch.no_grad():
            return webp(displayed(pre_processor, read_prepared(path, pre_processor, bit_depth)), side)
    except (OSError, ValueError, SyntaxError):
        return None
