"""Table of scores: a row for each image of a prediction or a test."""

import csv
import logging
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from anomalib.visualization import Visualizer
from lightning.pytorch import LightningModule, Trainer

from anomalib_sgfr.core.processes import gathered
from anomalib_sgfr.images.file_pixels import file_peaks
from anomalib_sgfr.run_folder import AfterPostProcessor, results_folder
from anomalib_sgfr.run_paths import atomic_write

__all__ = [
    "ScoreRow",
    "ScoreTable",
    "each_once",
    "is_normalised",
    "normalised_threshold",
    "score_rows",
    "write_scores",
]

_T = TypeVar("_T")

logger = logging.getLogger(__name__)


class ScoreRow(NamedTuple):
    """Row of the table: an image and its results.

    Attributes:
        image (str): Path of the file; empty if unknown.
        score (float): Image score, as the post-processor normalises it.
        threshold (float | None): Threshold of such scores: larger ones are anomalous. ``None``
            without a threshold.
        label (int | None): Predicted label: 1 for anomalous, 0 for good.
        truth (int | None): Label in the data set.
        row (int | None): Row of the peak, the pixel with the largest score, in the upright image
            file, from zero; ``None`` if unknown.
        column (int | None): Column of the peak.
    """

    image: str
    score: float
    threshold: float | None = None
    label: int | None = None
    truth: int | None = None
    row: int | None = None
    column: int | None = None


class ScoreTable(AfterPostProcessor):
    """Callback that writes a table of scores after a prediction or a test, and logs its path.

    ``row`` and ``column`` are pixels of the image file itself, whatever the pre-processor resizes
    or crops; they are empty where the transforms cannot be followed back to the file. The column
    ``warning`` exists if the threshold is calibrated on too few images.

    Sgfr attaches a table by itself: ``scores.csv`` of a prediction, ``test_scores.csv`` of a test,
    in the folder of the run's results (:class:`~anomalib_sgfr.run_folder.RunFolder`). Pass your own
    under ``trainer.callbacks`` to write it elsewhere. Several processes write one table.

    Args:
        file (str | Path | None): The table; ``None`` for the one in the folder of the run's
            results.

    Attributes:
        rows (list[ScoreRow]): Images that this process has seen in the run.

    Examples:
        >>> from anomalib.engine import Engine
        >>> from anomalib_sgfr import ScoreTable
        >>> table = ScoreTable(folder / "table.csv")
        >>> engine = Engine(callbacks=[table], logger=False, enable_progress_bar=False)
        >>> _ = engine.predict(model, datamodule=datamodule, return_predictions=False)
        >>> (folder / "table.csv").read_text().split(",")[:4]
        ['image', 'score', 'threshold', 'label']
    """

    def __init__(self, file: str | Path | None = None) -> None:
        super().__init__()
        self.file = file
        self.rows: list[ScoreRow] = []
        self._why_no_pixels = ""

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a table."""
        del trainer, pl_module
        self.rows, self._why_no_pixels = [], ""

    on_test_start = on_predict_start

    def add_batch(self, trainer: Trainer, module: Any, outputs: Any, loader: int) -> None:  # noqa: ANN401
        """Add the rows of a batch."""
        peaks, why_not = file_peaks(trainer, module, outputs, loader)
        self._why_no_pixels = self._why_no_pixels or why_not
        self.rows += score_rows(outputs, getattr(module, "post_processor", None), peaks)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table."""
        self._write(trainer, "scores.csv", pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table."""
        self._write(trainer, "test_scores.csv", pl_module)

    def _write(self, trainer: Trainer, name: str, module: LightningModule) -> None:
        rows, self.rows = each_once(gathered(self.rows), lambda row: row.image), []
        if not rows or not trainer.is_global_zero:
            return
        file = results_folder(trainer) / name if self.file is None else Path(self.file)
        labels = [row.label for row in rows if row.label is not None]
        summary = (
            f"{sum(labels)} of {len(rows)} labelled anomalous"
            if labels
            else f"{len(rows)} images, no labels"
        )
        warning = getattr(getattr(module, "post_processor", None), "warning", None)
        try:
            write_scores(rows, file, warning)
        except OSError as error:  # the predictions are not lost
            logger.warning("The table of scores could not be written: %s", error)
        else:
            logger.info("Scores: %s (%s)", file, summary)
            if self._why_no_pixels:
                logger.warning(
                    "%s: row and column are empty for some images: %s.", file, self._why_no_pixels
                )
        for callback in trainer.callbacks:  # type: ignore[attr-defined]  # set by Lightning
            folder = getattr(callback, "output_dir", None)
            if isinstance(callback, Visualizer) and folder and Path(folder).is_dir():
                logger.info("Images: %s", folder)


def score_rows(
    outputs: Any,  # noqa: ANN401
    post_processor: Any,  # noqa: ANN401
    peaks: Sequence[tuple[int, int] | None] | None,
) -> list[ScoreRow]:
    """Rows of a batch.

    Args:
        outputs (Any): The batch, after the post-processor.
        post_processor (Any): The post-processor.
        peaks (Sequence[tuple[int, int] | None] | None): Row and column of each peak in pixels of
            the image file, as :func:`~anomalib_sgfr.images.file_pixels.file_peaks` gives them.

    Returns:
        list[ScoreRow]: A row for each image; none without scores.
    """
    if getattr(outputs, "pred_score", None) is None:
        return []
    scores = outputs.pred_score.flatten().tolist()
    paths = [str(path) for path in outputs.image_path or [""] * len(scores)]
    labels, truths = (
        _integers(values, len(scores)) for values in (outputs.pred_label, outputs.gt_label)
    )
    pixels = [peak or (None, None) for peak in peaks or [None] * len(scores)]
    threshold = normalised_threshold(post_processor)
    return [
        ScoreRow(path, score, threshold, label, truth, *pixel)
        for path, score, label, truth, pixel in zip(
            paths, scores, labels, truths, pixels, strict=True
        )
    ]


def normalised_threshold(post_processor: Any, level: str = "image") -> float | None:  # noqa: ANN401
    """Current threshold of normalised scores, at the level of images or pixels; else ``None``."""
    value = float(getattr(post_processor, f"normalized_{level}_threshold", math.nan))
    return None if math.isnan(value) or not getattr(post_processor, "is_set", True) else value


def is_normalised(post_processor: Any) -> bool:  # noqa: ANN401
    """Whether predictions hold normalised scores."""
    normalises = getattr(post_processor, "enable_normalization", True)
    return bool(getattr(post_processor, "is_set", True) and normalises)


def _integers(values: torch.Tensor | None, number: int) -> list[int | None]:
    return [None] * number if values is None else [int(v) for v in values.flatten().tolist()]


def each_once(of_all: Sequence[Sequence[_T]], path_of: Callable[[_T], str]) -> list[_T]:
    """Items of all processes, by path; an image that several processes were given counts once.

    Args:
        of_all (Sequence[Sequence[T]]): Items of each process.
        path_of (Callable[[T], str]): Gives the path of an item's image; empty if unknown.

    Returns:
        list[T]: The items; as they are if there is one process.
    """
    if len(of_all) == 1:
        return list(of_all[0])
    every = [item for items in of_all for item in items]
    by_path = {path_of(item): item for item in every}
    unknown = [item for item in every if not path_of(item)]
    return [by_path[path] for path in sorted(by_path) if path] + unknown


def write_scores(rows: Sequence[ScoreRow], file: Path, warning: str | None = None) -> None:
    """Write a table as CSV, whole or not at all.

    Args:
        rows (Sequence[ScoreRow]): The rows.
        file (Path): The table; its folder is made.
        warning (str | None): Warning about the threshold, for a last column.
    """
    head, last = (("warning",), (warning,)) if warning else ((), ())
    with (
        atomic_write(file) as part,
        part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as table,
    ):
        csv.writer(table).writerows([(*ScoreRow._fields, *head), *((*row, *last) for row in rows)])
