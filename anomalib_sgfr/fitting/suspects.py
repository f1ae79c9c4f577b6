"""Training images that may be defective: found by what the atoms of the others leave of them."""

import csv
import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from anomalib_sgfr.bank import BankState
from anomalib_sgfr.core.cover import settle
from anomalib_sgfr.core.provenance import renumbered
from anomalib_sgfr.inspection.calibration import nominal_scores
from anomalib_sgfr.torch_model import Learnt, SgfrModel

__all__ = ["without_suspects", "write_suspects"]

logger = logging.getLogger(__name__)

_ROUNDING = 1e-12  # 7% of 100 images are 7, not 8


def without_suspects(
    model: SgfrModel,
    pre_processor: Any,  # noqa: ANN401
    paths: Sequence[str],
    share: float,
) -> tuple[Learnt | None, list[tuple[str, float]]]:
    """Leave out the atoms of the training images that the atoms of the others rebuild worst.

    What they stood for is accounted to the atoms that stay, so that the certificate still covers all that was seen.

    Args:
        model (SgfrModel): A fitted model; it stays as it is.
        pre_processor (Any): Its pre-processor.
        paths (Sequence[str]): Training images.
        share (float): Share of them to suspect.

    Returns:
        tuple[Learnt | None, list[tuple[str, float]]]: What is left of what the model learnt, ``None`` if nothing would
        be left of a scale, so that all of it is to stay; and the suspects with their raw scores, the worst first.
    """
    scores = nominal_scores(model, pre_processor, paths).scores
    worst = sorted(zip(paths, scores, strict=True), key=lambda item: -item[1])
    suspects = worst[: math.ceil(share * len(paths) * (1.0 - _ROUNDING))]
    suspected = {path for path, _ in suspects}
    learnt = model.learnt
    numbers = torch.tensor([number for number, path in enumerate(learnt.images) if path in suspected])
    left: list[BankState] = []
    for state in learnt.states:
        dropped = torch.isin(state.cover.origin[:, 0], numbers.to(state.cover.origin))
        if bool(dropped.all()):
            logger.warning("Without the suspects there would be no atom: the bank is kept as it is.")
            return None, suspects
        stays = state.rows(~dropped)
        left.append(stays._replace(cover=settle(stays.cover, state.cover.rows(dropped))))
    covers, images = renumbered([state.cover for state in left], dict(enumerate(learnt.images)))
    return Learnt([state._replace(cover=cover) for state, cover in zip(left, covers, strict=True)], images), suspects


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
