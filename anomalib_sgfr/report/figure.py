"""The mimic view: a figure of why an image is anomalous, in crops of the nominal images that
rebuilt it.
"""

import logging
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch import Callback, LightningModule, Trainer
from numpy.typing import NDArray
from torch import Tensor

from anomalib_sgfr.core.patch_grid import PatchIndex
from anomalib_sgfr.images.file_pixels import file_peaks
from anomalib_sgfr.report.crops import CONTEXT, Gallery, crop, displayed
from anomalib_sgfr.report.explanation import Explanation, explain
from anomalib_sgfr.run_folder import image_paths
from anomalib_sgfr.run_paths import atomic_write, names_of
from anomalib_sgfr.torch_model import SgfrModel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["MimicView", "draw"]

logger = logging.getLogger(__name__)


def draw(
    model: SgfrModel,
    pre_processor: Any,  # noqa: ANN401
    image: Tensor,
    explanation: Explanation | None = None,
    truth: NDArray[Any] | None = None,
    title: str = "",
    gallery: Gallery | None = None,
) -> "Figure":
    """Draw an image, its map, its truth if known, and for its worst regions the nominal patches
    that rebuilt them.

    Args:
        model (SgfrModel): A fitted model.
        pre_processor (Any): Its pre-processor.
        image (Tensor): Pre-processed, shape ``(3, H, W)``.
        explanation (Explanation | None): Of that image; made if not given.
        truth (NDArray | None): Mask of the defect, shape ``(H, W)``.
        title (str): Heading.
        gallery (Gallery | None): Keeps training images that were read, from one figure to the next.

    Returns:
        Figure: Matplotlib's, not yet shown or saved. Crops whose training images are gone say so.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

    found = explain(model, image) if explanation is None else explanation
    gallery = gallery or Gallery(model, pre_processor)
    shown = displayed(pre_processor, image)
    rebuilt = [
        (number, part)
        for number, region in enumerate(found.regions, 1)
        for part in region.reconstructions
    ]
    across = max(3, 1 + max(len(part.contributions) for _, part in rebuilt))
    figure = Figure(figsize=(1.5 * across, 3.2 + 1.9 * len(rebuilt)), layout="constrained", dpi=110)
    heights = [3.0] + [1.8] * len(rebuilt)
    parts: Any = figure.subfigures(len(heights), 1, height_ratios=heights)
    overview, *rows = parts
    figure.suptitle(title, fontsize="small")

    views: list[Axes] = list(overview.subplots(1, 2 if truth is None else 3))
    views[0].imshow(shown)
    views[1].imshow(shown)
    picture = views[1].imshow(found.anomaly_map.cpu(), cmap="inferno", alpha=0.75, vmin=0.0)
    overview.colorbar(picture, ax=views[1], shrink=0.8, label="residual")
    if truth is not None:
        views[2].imshow(truth, cmap="gray", vmin=0, vmax=1)
        views[2].set_title("truth", fontsize="small")
    for number, region in enumerate(found.regions, 1):
        window = PatchIndex(region.row, region.column, found.grid).window(shown.shape[:2], CONTEXT)
        corner = (window.left, window.top)
        for axis in views[:2]:
            axis.add_patch(
                Rectangle(corner, window.width, window.height, fill=False, color="cyan", lw=1.2)
            )
            axis.text(*corner, str(number), color="cyan", fontsize="small", va="bottom")
    for axis in views:
        axis.set_axis_off()

    for (number, part), row in zip(rebuilt, rows, strict=True):
        axes: list[Axes] = list(np.atleast_1d(row.subplots(1, across)))
        row.suptitle(
            f"{number}, patches of {shown.shape[0] / part.grid[0]:.0f} pixels: residual"
            f" {part.residual:.3g}; nominal ones of its kind leave at most {part.nominal:.3g} on"
            f" average, {part.nominal_largest:.3g} singly",
            fontsize="small",
        )
        axes[0].imshow(crop(shown, PatchIndex(part.row, part.column, part.grid)))
        axes[0].set_title("here", fontsize="x-small")
        for axis, contribution in zip(axes[1:], part.contributions, strict=False):
            seen = gallery.crop(part.scale, contribution.atom)
            if seen is None:
                axis.text(
                    0.5,
                    0.5,
                    "image\nis gone",
                    ha="center",
                    va="center",
                    transform=axis.transAxes,
                    fontsize="x-small",
                )
            else:
                axis.imshow(seen, vmin=0, vmax=1)
            name = "" if contribution.image is None else Path(contribution.image).name
            axis.set_title(f"{contribution.coefficient:+.2f}\n{name[-18:]}", fontsize="x-small")
        for axis in axes:
            axis.set_axis_off()
    return figure


class MimicView(Callback):
    """Draw the mimic view of every image that is predicted or tested; for ``trainer.callbacks``.

    A figure has the image's path below the folder that holds all images of the run; where all are
    in one folder, that folder's name and the image's.

    Args:
        folder (str | None): Where to; ``mimic`` in the run's folder by default.
        regions (int): Most regions of an image to explain.
        only_anomalous (bool): Whether to leave out images that are labelled normal.

    Raises:
        ValueError: If ``regions`` is below one.
    """

    def __init__(
        self, folder: str | None = None, regions: int = 3, only_anomalous: bool = False
    ) -> None:
        super().__init__()
        if regions < 1:
            msg = f"regions must be at least 1, got {regions}."
            raise ValueError(msg)
        self.folder = folder
        self.regions = regions
        self.only_anomalous = only_anomalous
        self._gallery: Gallery | None = None
        self._names: dict[str, Path] = {}
        self._drawn: dict[Path, str] = {}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a model that cannot be explained, and name the figures of a prediction."""
        self._start(trainer, pl_module, "predictions")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """As for prediction."""
        self._start(trainer, pl_module, "tests")

    def _start(self, trainer: Trainer, pl_module: Any, kind: str) -> None:  # noqa: ANN401
        if not isinstance(pl_module.model, SgfrModel):
            msg = f"MimicView explains Sgfr, not {type(pl_module).__name__}."
            raise TypeError(msg)
        self._gallery = Gallery(pl_module.model, pl_module.pre_processor)
        self._names, self._drawn = _names(image_paths(trainer, kind)), {}

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Draw the images of a batch."""
        del batch, batch_idx
        self._draw(
            trainer, pl_module, outputs, file_peaks(trainer, pl_module, outputs, dataloader_idx)[0]
        )

    on_test_batch_end = on_predict_batch_end

    def _draw(
        self,
        trainer: Trainer,
        model: Any,
        batch: Any,
        pixels: Sequence[tuple[int, int] | None],
    ) -> None:
        folder = Path(self.folder) if self.folder else Path(trainer.default_root_dir) / "mimic"
        paths: Sequence[Any] = batch.image_path or [
            f"image{len(self._drawn) + index}" for index in range(len(batch.image))
        ]
        for index, path in enumerate(paths):
            if (
                self.only_anomalous
                and batch.pred_label is not None
                and not bool(batch.pred_label[index])
            ):
                continue
            image = batch.image[index]
            truth = None if batch.gt_mask is None else batch.gt_mask[index].squeeze().cpu().numpy()
            title = (
                str(path)
                if batch.pred_score is None
                else f"{path}, score {float(batch.pred_score[index]):.3g}"
            )
            pixel = pixels[index] if pixels else None
            title += f", raised at row {pixel[0]}, column {pixel[1]} of the file" if pixel else ""
            found = explain(model.model, image, self.regions)
            figure = draw(
                model.model, model.pre_processor, image, found, truth, title, self._gallery
            )
            save(figure, self._target(folder, str(path)))

    def _target(self, folder: Path, path: str) -> Path:
        """A name that no other image of this run has."""
        name = self._names.get(path, Path(Path(path).parent.name, Path(path).stem))
        if self._drawn.get(name, path) != path:  # of a data set that does not tell its files
            name = Path(*Path(path).absolute().parts[1:])
        self._drawn[name] = path
        return folder / name.with_name(f"{name.name}.png")


def _names(paths: Sequence[str]) -> dict[str, Path]:
    """Names of figures: as those of other results, but that images of one folder keep its name."""
    names = names_of(paths)
    if all(len(name.parts) == 1 for name in names.values()):
        names = {
            path: Path(Path(path).absolute().parent.name, name) for path, name in names.items()
        }
    return names


def save(figure: "Figure", path: Path) -> None:
    """Write a figure whole or not at all."""
    with atomic_write(path) as part, warnings.catch_warnings():
        # boxes stand for signs that the font does not have
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(part, format="png")
