"""Callback that writes a report of a test or a prediction."""

import logging
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path, PurePath
from typing import Any

import numpy as np
from lightning.pytorch import LightningModule, Trainer
from numpy.typing import NDArray

from anomalib_sgfr.console import bar_is_on, progress
from anomalib_sgfr.core.patch_grid import PatchIndex
from anomalib_sgfr.core.processes import gathered
from anomalib_sgfr.images.file_pixels import file_peaks
from anomalib_sgfr.images.pre_processor import geometric_steps, read_prepared
from anomalib_sgfr.post_processing.calibration import Split, ThresholdState, require_group
from anomalib_sgfr.report.contents import (
    AtomCrop,
    ExplanationRow,
    ImageExplanation,
    ImageMedia,
    ImageRow,
    ReportContents,
    most_important,
    with_most_media,
)
from anomalib_sgfr.report.crops import CONTEXT, TrainingCrops, crop_around, displayable
from anomalib_sgfr.report.explanation import Reconstruction, explain
from anomalib_sgfr.report.media import BUDGET, aspect_ratio, outline, small_map, webp
from anomalib_sgfr.report.model_facts import facts_of, known_images
from anomalib_sgfr.report.page import render, write_page
from anomalib_sgfr.report.score_table import (
    ScoreRow,
    each_once,
    is_normalised,
    normalised_threshold,
    score_rows,
)
from anomalib_sgfr.report.statistics import RegionOverlap
from anomalib_sgfr.report.watched import StreamTable, describe_streams
from anomalib_sgfr.run_folder import AfterPostProcessor, unreadable_images
from anomalib_sgfr.torch_model import SgfrModel

__all__ = ["Report"]

logger = logging.getLogger(__name__)

_EXPLAINED = 24  # images with an explanation
_REGIONS, _ATOMS = 2, 4  # of an explanation
_CROP_SIDE = 56  # pixels
_SIDE, _SIDE_OF_FEW, _FEW = 256, 384, 120  # pixels of an image; larger where the page shows few


class Report(AfterPostProcessor):
    """Write ``report.html``, a page that shows a test or a prediction; for ``trainer.callbacks``.

    The page is one file and opens anywhere without a network. Several processes write one page.

    Args:
        file (str | Path | None): The page; ``None`` for ``report.html`` in the run's folder.
        group (str | None): Regular expression for the product, camera ... in an image's path. A
            table has a row for each of these groups.
        pictures (int): Most images to show; the page lists the scores of all. Defaults to ``500``.

    Attributes:
        images (list[ImageRow]): Images that this process has seen in the run.
        checkpoint (str): Path of the model's checkpoint; found by the trainer if empty.
        kinds (Mapping[str, str]): Kind of defect by path, where it is not the name of the folder.
        watched (Sequence[StreamTable]): Watched streams to describe.
        unreadable (Mapping[Any, str]): Reason by path of each image that could not be read, beside
            those that a prediction leaves out. Read at the end of the run.
        contents (ReportContents | None): Contents of the latest report.
        written (Path | None): Page of the latest run, once it is written.
        failed (str): Why it is not.

    Raises:
        ValueError: If ``pictures`` is negative, or ``group`` is not a regular expression.

    Examples:
        >>> from anomalib.engine import Engine
        >>> from anomalib_sgfr import Report
        >>> report = Report(folder / "report.html", pictures=20)
        >>> engine = Engine(callbacks=[report], logger=False, enable_progress_bar=False)
        >>> _ = engine.test(model, datamodule=datamodule, verbose=False)
        >>> report.written.name
        'report.html'
    """

    def __init__(
        self, file: str | Path | None = None, group: str | None = None, pictures: int = 500
    ) -> None:
        super().__init__()
        if pictures < 0:
            msg = f"pictures must be at least 0, got {pictures}."
            raise ValueError(msg)
        require_group(group)
        self.file = file
        self.group = group
        self.pictures = pictures
        self.images: list[ImageRow] = []
        self.checkpoint = ""
        self.kinds: Mapping[str, str] = {}
        self.watched: Sequence[StreamTable] = ()
        self.unreadable: Mapping[Any, str] = {}
        self.contents: ReportContents | None = None
        self.written: Path | None = None
        self.failed = ""
        self._with_media = 0
        self._overlap = RegionOverlap()
        self._media_error = ""

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a report.

        Raises:
            TypeError: If the model is not Sgfr.
        """
        del trainer
        if not isinstance(getattr(pl_module, "model", None), SgfrModel):
            msg = f"Report needs Sgfr, not {type(pl_module).__name__}."
            raise TypeError(msg)
        self.images, self._with_media, self._media_error = [], 0, ""
        self._overlap = RegionOverlap()
        self.written, self.failed, self.contents = None, "", None

    on_test_start = on_predict_start

    def add_batch(self, trainer: Trainer, module: Any, outputs: Any, loader: int) -> None:  # noqa: ANN401
        """Add the images of a batch."""
        pixels, _ = file_peaks(trainer, module, outputs, loader)
        peaks = _relative_peaks(module.peak, outputs.anomaly_map)
        for index, row in enumerate(score_rows(outputs, module.post_processor, pixels)):
            media = self._media(module, outputs, index, row.image) if self.pictures else None
            self._with_media += media is not None
            self.images.append(ImageRow(row, "", peaks[index] if peaks else None, media))
        if self._with_media > 2 * self.pictures + 64:
            threshold = normalised_threshold(module.post_processor)
            self.images = with_most_media(self.images, threshold, self.pictures)
            self._with_media = sum(image.media is not None for image in self.images)
        self._overlap.add(outputs.anomaly_map, outputs.gt_mask)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the page."""
        of_all = gathered(self.images)
        if not trainer.is_global_zero:
            return
        default = Path(trainer.default_root_dir) / "report.html"
        file = default if self.file is None else Path(self.file)
        try:
            self.contents = self._contents(trainer, pl_module, of_all)
            write_page(render(self.contents), file)
        except Exception as error:  # noqa: BLE001  # the run's results are not lost
            self.failed = f"The report {file} could not be written: {error}"
            logger.warning(self.failed)
        else:
            self.written = file
            logger.info("Report: %s", file)

    on_test_end = on_predict_end

    def _media(self, module: Any, outputs: Any, index: int, path: str) -> ImageMedia | None:  # noqa: ANN401
        """Image and map of an image of a batch; ``None``, noting the error, if that fails."""
        mask = outputs.gt_mask
        side = _SIDE_OF_FEW if self.pictures <= _FEW else _SIDE
        try:
            image = displayable(module.pre_processor, outputs.image[index])
            values = outputs.anomaly_map[index].squeeze().float().cpu().numpy()
            level = normalised_threshold(module.post_processor, "pixel")
            truth = None if mask is None else mask[index].squeeze().float().cpu().numpy()
            return ImageMedia(
                image=webp(image, side, BUDGET // max(self.pictures, 1)),
                anomaly_map=small_map(values),
                outline="" if level is None else outline(values, level),
                mask_outline="" if truth is None else outline(truth, 0.5),
                aspect=_aspect_ratio(module.pre_processor, path, *image.shape[:2]),
            )
        except (AttributeError, OSError, RuntimeError, TypeError, ValueError) as error:
            self._media_error = f"Some images could not be drawn: {error}"
            return None

    def _contents(
        self,
        trainer: Trainer,
        module: Any,  # noqa: ANN401
        of_all: Sequence[Sequence[ImageRow]],
    ) -> ReportContents:
        """Contents of the report from the images of all processes."""
        processor = module.post_processor
        threshold = normalised_threshold(processor)
        state = getattr(processor, "state", ThresholdState())
        images = with_most_media(
            each_once(of_all, lambda image: image.result.image), threshold, self.pictures
        )
        images = _with_kinds(images, self.kinds)
        images, known_by_name = _with_known(images, state, module.model.images)
        notes = [self._media_error] if self._media_error else []
        group = self.group
        try:
            paths = {image.result.image for image in images if image.result.image}
            require_group(group, sorted(paths))
        except ValueError as error:
            notes.append(str(error))
            group = None
        overlap, region_note = (
            self._overlap.curve()
            if len(of_all) == 1
            else (None, "There is no per-region overlap of a run of several processes.")
        )
        unreadable = {**unreadable_images(trainer), **self.unreadable}
        return ReportContents(
            images=images,
            threshold=threshold,
            normalised=is_normalised(processor),
            basis=getattr(processor, "basis", "anomalib's post-processor"),
            independent_images=state.independent_images,
            model=facts_of(module, self.checkpoint or _checkpoint(trainer)),
            made=datetime.now(UTC).astimezone().strftime("%Y-%m-%d %H:%M"),
            explanations=_explanations(trainer, module, images, threshold),
            group=group,
            region_overlap=overlap,
            region_note=region_note,
            warning=getattr(processor, "warning", None),
            known_by_name=known_by_name,
            unreadable=[(str(path), reason) for path, reason in unreadable.items()],
            notes=notes,
            streams=describe_streams(module, self.watched, shown=bar_is_on(trainer)),
        )


def _relative_peaks(peaks: Any, anomaly_map: Any) -> list[tuple[float, float]] | None:  # noqa: ANN401
    """Peaks of a batch as shares of width and height of the model's input."""
    if peaks is None or anomaly_map is None:
        return None
    height, width = anomaly_map.shape[-2:]
    return [((column + 0.5) / width, (row + 0.5) / height) for row, column in peaks.tolist()]


def _explanations(
    trainer: Trainer,
    module: Any,  # noqa: ANN401
    images: Sequence[ImageRow],
    threshold: float | None,
) -> dict[int, ImageExplanation]:
    """Explanations of the most important images, by index."""
    crops = TrainingCrops(module.model, module.pre_processor)
    first = most_important(images, threshold, _EXPLAINED)
    chosen = [index for index in first if images[index].media is not None]
    bar = progress(chosen, len(chosen), "Explanations", shown=bar_is_on(trainer))
    return {index: _explanation(module, images[index].result.image, crops) for index in bar}


def _explanation(module: Any, path: str, crops: TrainingCrops) -> ImageExplanation:  # noqa: ANN401
    """Explanation of an image, which is read again from its file."""
    model, pre_processor = module.model, module.pre_processor
    if not path or not Path(path).is_file():
        return ImageExplanation([], "The image is not explained, because its file is gone.")
    try:
        image = read_prepared(path, pre_processor, model.bit_depth).to(next(model.parameters()))
        found = explain(model, image, _REGIONS)
    except (OSError, ValueError, RuntimeError, SyntaxError) as error:
        return ImageExplanation([], f"The image is not explained: {error}")
    shown = displayable(pre_processor, image)
    height, width = shown.shape[:2]
    rows = []
    for number, region in enumerate(found.regions, 1):
        window = PatchIndex(region.row, region.column, found.grid).window((height, width), CONTEXT)
        left, top = window.left / width, window.top / height
        box = (left, top, window.width / width, window.height / height)
        rows += [_row(number, box, part, shown, crops) for part in region.reconstructions]
    return ImageExplanation(rows)


def _row(
    number: int,
    box: tuple[float, float, float, float],
    part: Reconstruction,
    shown: NDArray[np.float32],
    crops: TrainingCrops,
) -> ExplanationRow:
    atoms = []
    for contribution in part.contributions[:_ATOMS]:
        crop = crops.crop(part.scale, contribution.atom)
        image = None if crop is None else webp(np.asarray(crop, np.float32), _CROP_SIDE)
        atoms.append(AtomCrop(image, contribution.coefficient, contribution.image or ""))
    patch = PatchIndex(part.row, part.column, part.grid)
    return ExplanationRow(
        number=number,
        box=box,
        pixels=round(shown.shape[0] / part.grid[0]),
        residual=part.residual_text,
        nominal=part.nominal,
        crop=webp(crop_around(shown, patch), _CROP_SIDE),
        atoms=atoms,
    )


def _with_known(
    images: Sequence[ImageRow], state: ThresholdState, trained_on: Sequence[str]
) -> tuple[list[ImageRow], int]:
    """Images with ``trained_on`` and ``chose_threshold``, and how many are known by name alone."""
    paths = [image.result.image for image in images]
    training = [*trained_on, *state.scores.of_split(Split.TRAINING).paths]
    trained, by_name = known_images(paths, training)
    chose, also_by_name = known_images(paths, state.threshold_images)
    found = [
        image._replace(trained_on=was_trained_on, chose_threshold=did_choose)
        for image, was_trained_on, did_choose in zip(images, trained, chose, strict=True)
    ]
    return found, max(by_name, also_by_name)


def _aspect_ratio(pre_processor: Any, path: str, height: int, width: int) -> float:  # noqa: ANN401
    """Width over height of the file if the model sees all of it, else of the model's input."""
    try:
        steps = geometric_steps(getattr(pre_processor, "transform", None))
    except ValueError:
        return width / height
    whole = all(step[0] in {"resize", "aspect"} for step in steps)
    return aspect_ratio(path, height, width) if whole and path else width / height


def _checkpoint(trainer: Any) -> str:  # noqa: ANN401
    """Path of the model's checkpoint as far as the trainer knows it; else empty."""
    callback = getattr(trainer, "checkpoint_callback", None)
    found = getattr(trainer, "ckpt_path", None) or getattr(callback, "best_model_path", "") or ""
    return str(found) if found and Path(str(found)).is_file() else ""


def _with_kinds(images: Sequence[ImageRow], kinds: Mapping[str, str]) -> list[ImageRow]:
    """Images with their kind of defect: the folder's name, unless it holds good images too."""

    def parent(row: ScoreRow) -> PurePath:
        return PurePath(row.image).parent

    good_folders = {parent(image.result) for image in images if image.result.truth == 0}

    def kind(row: ScoreRow) -> str:
        if row.image in kinds:
            return kinds[row.image]
        if not row.truth:
            return "" if row.truth is None else "good"
        return "defect" if parent(row) in good_folders else parent(row).name or "defect"

    return [image._replace(kind=kind(image.result)) for image in images]
