"""Figure that explains an image by the nominal patches that reconstruct its worst regions."""

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from numpy.typing import NDArray
from torch import Tensor

from anomalib_sgfr.core.patch_grid import PatchIndex
from anomalib_sgfr.images.file_pixels import file_peaks
from anomalib_sgfr.report.crops import CONTEXT, TrainingCrops, crop_around, displayable
from anomalib_sgfr.report.explanation import Explanation, Reconstruction, explain
from anomalib_sgfr.run_folder import BatchCallback, image_paths
from anomalib_sgfr.run_paths import atomic_write, names_of
from anomalib_sgfr.torch_model import SgfrModel

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

__all__ = ["ExplanationFigure", "draw", "save"]


def draw(
    model: SgfrModel,
    pre_processor: Any,  # noqa: ANN401
    image: Tensor,
    explanation: Explanation | None = None,
    truth: NDArray[Any] | None = None,
    title: str = "",
    training_crops: TrainingCrops | None = None,
) -> "Figure":
    """Draw an image, its anomaly map, and the nominal patches that reconstruct its worst regions.

    Args:
        model (SgfrModel): A fitted model.
        pre_processor (Any): The model's pre-processor.
        image (Tensor): Pre-processed image, shape ``(3, H, W)``.
        explanation (Explanation | None): Explanation of that image; computed if ``None``.
        truth (NDArray | None): Mask of the defect, shape ``(H, W)``.
        title (str): Heading.
        training_crops (TrainingCrops | None): Crops to share between figures, which caches
            training images.

    Returns:
        Figure: A matplotlib figure, not saved. A crop whose training image is gone says so.
    """
    from matplotlib.figure import Figure

    found = explain(model, image) if explanation is None else explanation
    crops = training_crops or TrainingCrops(model, pre_processor)
    shown = displayable(pre_processor, image)
    numbered = [
        (number, part)
        for number, region in enumerate(found.regions, 1)
        for part in region.reconstructions
    ]
    columns = max(3, 1 + max(len(part.contributions) for _, part in numbered))
    heights = [3.0] + [1.8] * len(numbered)
    size = (1.5 * columns, 3.2 + 1.9 * len(numbered))
    figure = Figure(figsize=size, layout="constrained", dpi=110)
    subfigures: Any = figure.subfigures(len(heights), 1, height_ratios=heights)
    figure.suptitle(title, fontsize="small")
    _draw_overview(subfigures[0], found, shown, truth)
    for (number, part), row in zip(numbered, subfigures[1:], strict=True):
        _draw_reconstruction(row, columns, number, part, shown, crops)
    return figure


def _draw_overview(
    subfigure: "SubFigure",
    explanation: Explanation,
    shown: NDArray[np.float32],
    truth: NDArray[Any] | None,
) -> None:
    """Draw the image and its anomaly map with the regions, and the mask of the defect."""
    from matplotlib.patches import Rectangle

    axes: list[Axes] = list(subfigure.subplots(1, 2 if truth is None else 3))
    axes[0].imshow(shown)
    axes[1].imshow(shown)
    overlay = axes[1].imshow(explanation.anomaly_map.cpu(), cmap="inferno", alpha=0.75, vmin=0.0)
    subfigure.colorbar(overlay, ax=axes[1], shrink=0.8, label="residual")
    if truth is not None:
        axes[2].imshow(truth, cmap="gray", vmin=0, vmax=1)
        axes[2].set_title("truth", fontsize="small")
    for number, region in enumerate(explanation.regions, 1):
        patch = PatchIndex(region.row, region.column, explanation.grid)
        window = patch.window(shown.shape[:2], CONTEXT)
        corner = (window.left, window.top)
        for axis in axes[:2]:
            axis.add_patch(
                Rectangle(corner, window.width, window.height, fill=False, color="cyan", lw=1.2)
            )
            axis.text(*corner, str(number), color="cyan", fontsize="small", va="bottom")
    for axis in axes:
        axis.set_axis_off()


def _draw_reconstruction(
    subfigure: "SubFigure",
    columns: int,
    number: int,
    part: Reconstruction,
    shown: NDArray[np.float32],
    crops: TrainingCrops,
) -> None:
    """Draw a patch of a region beside the nominal patches that reconstruct it."""
    axes: list[Axes] = list(np.atleast_1d(subfigure.subplots(1, columns)))
    apart = "\n" if part.resembles else "; "
    subfigure.suptitle(
        f"region {number}, patches of {shown.shape[0] / part.grid[0]:.0f} pixels: residual"
        f" {part.residual_text}{apart}similar nominal patches: at most"
        f" {part.nominal:.3g} on average,"
        f" {part.nominal_largest:.3g} each",
        fontsize="small",
    )
    axes[0].imshow(crop_around(shown, PatchIndex(part.row, part.column, part.grid)))
    axes[0].set_title("inspected", fontsize="x-small")
    for axis, contribution in zip(axes[1:], part.contributions, strict=False):
        crop = crops.crop(part.scale, contribution.atom)
        if crop is None:
            axis.set(xlim=(0, 1), ylim=(0, 1))
            axis.text(0.5, 0.5, "image\nis gone", fontsize="x-small", ha="center", va="center")
        else:
            axis.imshow(crop, vmin=0, vmax=1)
        name = "" if contribution.image is None else Path(contribution.image).name
        axis.set_title(f"{contribution.coefficient:+.2f}\n{name[-18:]}", fontsize="x-small")
    for axis in axes:
        axis.set_axis_off()


class ExplanationFigure(BatchCallback):
    """Draw an explanation of every image that is predicted or tested; for ``trainer.callbacks``.

    The folder repeats the folders of the images below the one that holds them all; if they are in
    one folder, the figures are in a folder of its name.

    Args:
        folder (str | None): Folder of the figures; ``explanations`` in the run's folder by default.
        regions (int): Most regions of an image to explain.
        only_anomalous (bool): Whether to leave out images that are labelled normal.

    Raises:
        ValueError: If ``regions`` is below one.

    Examples:
        >>> from anomalib.engine import Engine
        >>> from anomalib_sgfr import ExplanationFigure
        >>> figures = ExplanationFigure(str(folder / "figures"), regions=1, only_anomalous=True)
        >>> engine = Engine(callbacks=[figures], logger=False, enable_progress_bar=False)
        >>> _ = engine.predict(model, datamodule=datamodule, return_predictions=False)
        >>> any((folder / "figures").rglob("*.png"))
        True
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
        self._crops: TrainingCrops | None = None
        self._names: dict[str, Path] = {}
        self._drawn: dict[Path, str] = {}

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Name the figures of a prediction.

        Raises:
            TypeError: If the model is not Sgfr.
        """
        self._start(trainer, pl_module, "predictions")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Name the figures of a test; raises as for a prediction."""
        self._start(trainer, pl_module, "tests")

    def _start(self, trainer: Trainer, pl_module: Any, kind: str) -> None:  # noqa: ANN401
        if not isinstance(pl_module.model, SgfrModel):
            msg = f"ExplanationFigure explains Sgfr, not {type(pl_module).__name__}."
            raise TypeError(msg)
        self._crops = TrainingCrops(pl_module.model, pl_module.pre_processor)
        self._names, self._drawn = _figure_names(image_paths(trainer, kind)), {}

    def add_batch(self, trainer: Trainer, module: Any, outputs: Any, loader: int) -> None:  # noqa: ANN401
        """Draw the images of a batch."""
        peaks, _ = file_peaks(trainer, module, outputs, loader)
        folder = (
            Path(self.folder) if self.folder else Path(trainer.default_root_dir) / "explanations"
        )
        paths: Sequence[Any] = outputs.image_path or [
            f"image{len(self._drawn) + index}" for index in range(len(outputs.image))
        ]
        labels = outputs.pred_label
        for index, path in enumerate(paths):
            if self.only_anomalous and labels is not None and not bool(labels[index]):
                continue
            figure = self._figure(module, outputs, index, path, peaks[index] if peaks else None)
            save(figure, self._file(folder, str(path)))

    def _figure(
        self,
        module: Any,  # noqa: ANN401
        outputs: Any,  # noqa: ANN401
        index: int,
        path: object,
        peak: tuple[int, int] | None,
    ) -> "Figure":
        """Figure of an image of a batch."""
        mask, score = outputs.gt_mask, outputs.pred_score
        truth = None if mask is None else mask[index].squeeze().cpu().numpy()
        title = str(path) if score is None else f"{path}, score {float(score[index]):.3g}"
        title += f", peak at row {peak[0]}, column {peak[1]} of the file" if peak else ""
        image = outputs.image[index]
        found = explain(module.model, image, self.regions)
        return draw(module.model, module.pre_processor, image, found, truth, title, self._crops)

    def _file(self, folder: Path, path: str) -> Path:
        """File that no other image of this run has."""
        name = self._names.get(path, Path(Path(path).parent.name, Path(path).stem))
        if self._drawn.get(name, path) != path:  # the data set did not list its files
            name = Path(*Path(path).absolute().parts[1:])
        self._drawn[name] = path
        return folder / name.with_name(f"{name.name}.png")


def _figure_names(paths: Sequence[str]) -> dict[str, Path]:
    """Names of figures, below the name of their folder if all images are in one folder."""
    names = names_of(paths)
    if all(len(name.parts) == 1 for name in names.values()):
        names = {
            path: Path(Path(path).absolute().parent.name, name) for path, name in names.items()
        }
    return names


def save(figure: "Figure", path: Path) -> None:
    """Write a figure as PNG, whole or not at all."""
    with atomic_write(path) as part, warnings.catch_warnings():
        # the font shows boxes for characters that it lacks
        warnings.filterwarnings("ignore", "Glyph .* missing")
        figure.savefig(part, format="png")
