"""Training images that may be defective: found by what the atoms of the others leave of them."""

import csv
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from anomalib_sgfr.core.cover import Cover, settle
from anomalib_sgfr.core.provenance import renumbered
from anomalib_sgfr.inspection.calibration import nominal_scores
from anomalib_sgfr.torch_model import SgfrModel

__all__ = ["drop_suspects", "write_suspects"]

logger = logging.getLogger(__name__)


def drop_suspects(
    model: SgfrModel,
    pre_processor: Any,  # noqa: ANN401
    paths: Sequence[str],
    share: float,
) -> list[tuple[str, float]]:
    """Take from the bank the atoms of the training images that the atoms of the others rebuild worst.

    What they stood for is accounted to the atoms that stay, so that the certificate still covers all that was seen.

    Args:
        model (SgfrModel): A fitted model.
        pre_processor (Any): Its pre-processor.
        paths (Sequence[str]): Training images.
        share (float): Share of them to suspect.

    Returns:
        list[tuple[str, float]]: Suspects and their raw scores, the worst first.
    """
    scores = nominal_scores(model, pre_processor, paths, leave_out=True)
    worst = sorted(zip(paths, scores, strict=True), key=lambda item: -item[1])
    suspects = worst[: math.ceil(share * len(paths))]
    suspected = {path for path, _ in suspects}
    numbers = [number for number, path in enumerate(model.images) if path in suspected]
    covers: list[Cover] = []
    for bank in model.banks:
        dropped = torch.isin(bank.origin[:, 0], torch.tensor(numbers, device=bank.origin.device))
        if bool(dropped.all()):
            logger.warning("Without the suspects there would be no atom: the bank is kept as it is.")
            return suspects
        covers.append(settle(bank.cover.rows(~dropped), bank.cover.rows(dropped)))
    covers, images = renumbered(covers, dict(enumerate(model.images)))
    for bank, cover in zip(model.banks, covers, strict=True):
        bank.set(cover, float(bank.threshold))
    model.images = images
    return suspects


def write_suspects(suspects: Sequence[tuple[str, float]], table: Path) -> None:
    """Write suspects as CSV, whole or not at all, and to the log."""
    logger.info("Suspected of being defective, the worst first:")
    for path, score in suspects:
        logger.info("  %.4g  %s", score, path)
    table.parent.mkdir(parents=True, exist_ok=True)
    part = table.with_suffix(".part")
    with part.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file).writerows([("image", "score"), *suspects])
    part.replace(table)
