"""A table of what each image of a run scored, and a word on where it is and where the pictures are."""

import csv
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from anomalib.visualization import Visualizer
from lightning.pytorch import LightningModule, Trainer

from anomalib_sgfr.core.processes import gathered
from anomalib_sgfr.images.file_pixels import file_peaks
from anomalib_sgfr.run_folder import AfterPostProcessor, results_folder
from anomalib_sgfr.run_paths import atomic_write

__all__ = ["ScoreTable", "Scored", "scored_in", "threshold_of", "write_scores"]

logger = logging.getLogger(__name__)


class Scored(NamedTuple):
    """An image and what came of it; a line of the table.

    Attributes:
        image (str): Its file; empty if that is not known.
        score (float): As it is reported.
        threshold (float | None): Of reported scores: larger ones are anomalous. ``None`` if there
            is none.
        label (int | None): 1 for anomalous, 0 for good.
        truth (int | None): What the data set says of it.
        row (int | None): Of the pixel that raised the score, in the image file's own pixels,
            upright, counted from zero; ``None`` where that is not known.
        column (int | None): Of that pixel.
    """

    image: str
    score: float
    threshold: float | None = None
    label: int | None = None
    truth: int | None = None
    row: int | None = None
    column: int | None = None


class ScoreTable(AfterPostProcessor):
    """Write a table of scores when a prediction or a test has ended, and say where it is.

    ``row`` and ``column`` are pixels of the image file itself, whatever the pre-processor resizes
    or crops; they are empty where pixels cannot be followed back to the file. A column ``warning``
    is there where the threshold is calibrated on too few images.

    Sgfr attaches one by itself: ``scores.csv`` of a prediction, ``test_scores.csv`` of a test, in
    the folder of the run's results (:class:`~anomalib_sgfr.run_folder.RunFolder`). To have it
    elsewhere, add your own under ``trainer.callbacks``. Several processes write one table.

    Args:
        file (str | Path | None): The table; ``None`` for the one in the folder of the run's
            results.

    Attributes:
        rows (list[Scored]): Images that this process has seen in the run.
    """

    def __init__(self, file: str | Path | None = None) -> None:
        super().__init__()
        self.file = file
        self.rows: list[Scored] = []
        self._why_not = ""

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a table."""
        del trainer, pl_module
        self.rows, self._why_not = [], ""

    on_test_start = on_predict_start

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Note the scores of a batch."""
        del batch, batch_idx
        pixels, why_not = file_peaks(trainer, pl_module, outputs, dataloader_idx)
        self._why_not = self._why_not or why_not
        self.rows += scored_in(outputs, getattr(pl_module, "post_processor", None), pixels)

    on_test_batch_end = on_predict_batch_end

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table."""
        self._end(trainer, "scores.csv", pl_module)

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table."""
        self._end(trainer, "test_scores.csv", pl_module)

    def _end(self, trainer: Trainer, name: str, module: Any) -> None:  # noqa: ANN401
        rows = _of_all_processes(self.rows)
        self.rows = []
        if not rows or not trainer.is_global_zero:
            return
        file = results_folder(trainer) / name if self.file is None else Path(self.file)
        labelled = [row.label for row in rows if row.label is not None]
        said = (
            f"{sum(labelled)} of {len(rows)} labelled anomalous"
            if labelled
            else f"{len(rows)} images, no labels"
        )
        try:
            write_scores(
                rows, file, getattr(getattr(module, "post_processor", None), "warning", None)
            )
        except OSError as error:  # what was predicted is not lost for it
            logger.warning("The table of scores could not be written: %s", error)
        else:
            logger.info("Scores: %s (%s)", file, said)
            if self._why_not:
                logger.warning(
                    "%s: row and column are empty for some images: %s.", file, self._why_not
                )
        # Lightning sets it when it runs
        for visualizer in trainer.callbacks:  # type: ignore[attr-defined]
            folder = (
                getattr(visualizer, "output_dir", None)
                if isinstance(visualizer, Visualizer)
                else None
            )
            if folder is not None and Path(folder).is_dir():
                logger.info("Pictures: %s", folder)


def scored_in(
    outputs: Any,  # noqa: ANN401
    post_processor: Any,  # noqa: ANN401
    pixels: Sequence[tuple[int, int] | None] | None,
) -> list[Scored]:
    """Lines of a batch.

    Args:
        outputs (Any): The batch, after the post-processor.
        post_processor (Any): That gave labels.
        pixels (Sequence[tuple[int, int] | None] | None): Row and column of what raised each score,
            in pixels of the image file, as :func:`~anomalib_sgfr.images.file_pixels.file_peaks` gives
            them.
    """
    if getattr(outputs, "pred_score", None) is None:
        return []
    scores = outputs.pred_score.flatten().tolist()
    paths = [str(path) for path in outputs.image_path or [""] * len(scores)]
    labels, truths = (
        _whole(values, len(scores)) for values in (outputs.pred_label, outputs.gt_label)
    )
    places = [place or (None, None) for place in pixels or [None] * len(scores)]
    threshold = threshold_of(post_processor)
    return [
        Scored(path, score, threshold, label, truth, *place)
        for path, score, label, truth, place in zip(
            paths, scores, labels, truths, places, strict=True
        )
    ]


def threshold_of(post_processor: Any) -> float | None:  # noqa: ANN401
    """Threshold of scores as they are reported; ``None`` if there is none."""
    value = float(getattr(post_processor, "normalized_image_threshold", math.nan))
    return None if math.isnan(value) or not getattr(post_processor, "is_set", True) else value


def _whole(values: torch.Tensor | None, number: int) -> list[int | None]:
    return (
        [None] * number if values is None else [int(value) for value in values.flatten().tolist()]
    )


def _of_all_processes(rows: Sequence[Scored]) -> list[Scored]:
    """What all processes of a run have seen, by file; what several were given, to have equally
    many, counts once.
    """
    parts = gathered(list(rows))
    if len(parts) == 1:
        return list(rows)
    every = [row for part in parts for row in part]
    once = {row.image: row for row in every if row.image}
    return sorted(once.values()) + [row for row in every if not row.image]


def write_scores(rows: Sequence[Scored], file: Path, warning: str | None = None) -> None:
    """Write a table as CSV, whole or not at all.

    Args:
        rows (Sequence[Scored]): Its lines.
        file (Path): The table; its folder is made.
        warning (str | None): About the threshold; the last column of every line, if there is one.
    """
    head, last = (("warning",), (warning,)) if warning else ((), ())
    with (
        atomic_write(file) as part,
        part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as table,
    ):
        csv.writer(table).writerows([(*Scored._fields, *head), *((*row, *last) for row in rows)])
