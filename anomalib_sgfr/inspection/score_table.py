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
from anomalib_sgfr.inspection.afterwards import Afterwards
from anomalib_sgfr.inspection.run_folder import results_folder

__all__ = ["ScoreTable", "Scored", "scored_in", "write_scores"]

logger = logging.getLogger(__name__)


class Scored(NamedTuple):
    """An image and what came of it; a line of the table.

    Attributes:
        image (str): Its file; empty if that is not known.
        score (float): As it is reported.
        threshold (float | None): Of reported scores: larger ones are anomalous. ``None`` if there is none.
        label (int | None): 1 for anomalous, 0 for good.
        truth (int | None): What the data set says of it.
        row (int | None): Of the pixel of the anomaly map that raised the score, if that is known.
        column (int | None): Of that pixel.
    """

    image: str
    score: float
    threshold: float | None = None
    label: int | None = None
    truth: int | None = None
    row: int | None = None
    column: int | None = None


class ScoreTable(Afterwards):
    """Write a table of scores when a prediction or a test has ended, and say where it is.

    Sgfr attaches one by itself: ``scores.csv`` of a prediction, ``test_scores.csv`` of a test, in the folder of the
    run's results (:class:`~anomalib_sgfr.inspection.run_folder.RunFolder`). To have it elsewhere, add your own under
    ``trainer.callbacks``. Several processes write one table.

    Args:
        file (str | Path | None): The table; ``None`` for the one in the folder of the run's results.

    Attributes:
        rows (list[Scored]): Images that this process has seen in the run.
    """

    def __init__(self, file: str | Path | None = None) -> None:
        super().__init__()
        self.file = file
        self.rows: list[Scored] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin a table."""
        del trainer, pl_module
        self.rows = []

    on_test_start = on_predict_start

    def on_predict_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        *args: object,
        **kwargs: object,
    ) -> None:
        """Note the scores of a batch."""
        del trainer, args, kwargs
        self.rows += scored_in(outputs, getattr(pl_module, "post_processor", None), getattr(pl_module, "places", None))

    on_test_batch_end = on_predict_batch_end

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table."""
        del pl_module
        self._end(trainer, "scores.csv")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table."""
        del pl_module
        self._end(trainer, "test_scores.csv")

    def _end(self, trainer: Trainer, name: str) -> None:
        rows = _of_all_processes(self.rows)
        self.rows = []
        if not rows or not trainer.is_global_zero:
            return
        file = results_folder(trainer) / name if self.file is None else Path(self.file)
        labelled = [row.label for row in rows if row.label is not None]
        said = f"{sum(labelled)} of {len(rows)} labelled anomalous" if labelled else f"{len(rows)} images, no labels"
        try:
            write_scores(rows, file)
        except OSError as error:  # what was predicted is not lost for it
            logger.warning("The table of scores could not be written: %s", error)
        else:
            logger.info("Scores: %s (%s)", file, said)
        for visualizer in trainer.callbacks:  # type: ignore[attr-defined]  # Lightning sets it when it runs
            folder = getattr(visualizer, "output_dir", None) if isinstance(visualizer, Visualizer) else None
            if folder is not None and Path(folder).is_dir():
                logger.info("Pictures: %s", folder)


def scored_in(outputs: Any, post_processor: Any, places: torch.Tensor | None) -> list[Scored]:  # noqa: ANN401
    """Lines of a batch.

    Args:
        outputs (Any): The batch, after the post-processor.
        post_processor (Any): That gave labels.
        places (Tensor | None): Row and column of the pixel that raised each score, shape ``(B, 2)``.
    """
    if getattr(outputs, "pred_score", None) is None:
        return []
    scores = outputs.pred_score.flatten().tolist()
    paths = [str(path) for path in outputs.image_path or [""] * len(scores)]
    threshold = getattr(post_processor, "normalized_image_threshold", None)
    value = None if threshold is None else float(threshold)
    if value is not None and (math.isnan(value) or not getattr(post_processor, "is_set", True)):
        value = None
    columns = [_whole(labels, len(scores)) for labels in (outputs.pred_label, outputs.gt_label)]
    where = (None, None) if places is None or len(places) != len(scores) else places.T
    columns += [_whole(part, len(scores)) for part in where]
    return [Scored(path, score, value, *rest) for path, score, *rest in zip(paths, scores, *columns, strict=True)]


def _whole(values: torch.Tensor | None, number: int) -> list[int | None]:
    return [None] * number if values is None else [int(value) for value in values.flatten().tolist()]


def _of_all_processes(rows: Sequence[Scored]) -> list[Scored]:
    """What all processes of a run have seen, by file; what several were given, to have equally many, counts once."""
    parts = gathered(list(rows))
    if len(parts) == 1:
        return list(rows)
    every = [row for part in parts for row in part]
    once = {row.image: row for row in every if row.image}
    return sorted(once.values()) + [row for row in every if not row.image]


def write_scores(rows: Sequence[Scored], file: Path) -> None:
    """Write a table as CSV, whole or not at all.

    Args:
        rows (Sequence[Scored]): Its lines.
        file (Path): The table; its folder is made.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    try:
        with part.open("w", newline="", encoding="utf-8", errors="surrogateescape") as table:
            csv.writer(table).writerows([Scored._fields, *rows])
        part.replace(file)
    finally:
        part.unlink(missing_ok=True)
