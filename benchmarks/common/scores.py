"""Accuracy from raw scores, all pixel metrics from one sort.

The definitions are anomalib's (the tests compare them), but anomalib's metrics cannot take raw
scores: torchmetrics, beneath them, puts every batch with a score outside [0, 1] through a sigmoid,
which ties high scores and mixes batches.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy import ndimage
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from benchmarks.common.records import METRICS

__all__ = [
    "Curve",
    "PixelScores",
    "accuracy",
    "image_metrics",
    "label_regions",
    "per_defect",
    "pixel_scores",
    "scores_of_sizes",
]

_FPR_LIMIT = 0.3
_CURVE_POINTS = 200


class Curve(NamedTuple):
    """Points of a curve, both of the same length."""

    x: list[float]
    y: list[float]


class PixelScores(NamedTuple):
    """Pixel metrics, fractions of one, and the per-region-overlap curve up to its limit."""

    auroc: float
    average_precision: float
    aupro: float
    pro: Curve


def label_regions(masks: NDArray[np.bool_]) -> NDArray[np.int32]:
    """Number the 8-connected regions of masks ``(N, H, W)``; 0 is background."""
    regions = np.zeros(masks.shape, np.int32)
    found = 0
    for mask, out in zip(masks, regions, strict=True):
        if mask.any():
            labelled, number = ndimage.label(mask, np.ones((3, 3)))
            out[mask] = labelled[mask] + found
            found += number
    return regions


def scores_of_sizes(
    maps: Sequence[NDArray[np.float32]], masks: Sequence[NDArray[np.bool_]]
) -> PixelScores:
    """As :func:`pixel_scores`, of maps and masks ``(H, W)`` of several sizes."""
    regions: list[NDArray[np.int32]] = []
    found = 0
    for mask in masks:
        labelled = label_regions(mask[None]).reshape(-1)
        regions.append(np.where(labelled > 0, labelled + found, 0).astype(np.int32))
        found += int(labelled.max())
    return pixel_scores(
        np.concatenate([part.reshape(-1) for part in maps]), np.concatenate(regions)
    )


def pixel_scores(maps: NDArray[np.float32], regions: NDArray[np.int32]) -> PixelScores:
    """Score anomaly maps against ground truth.

    Args:
        maps (NDArray[np.float32]): Values of anomaly maps, not negative, of any shape.
        regions (NDArray[np.int32]): Defective regions as :func:`label_regions` numbers them, of the
            same shape.

    Returns:
        PixelScores: AUROC, average precision, AUPRO (Bergmann et al., IJCV 2021) and its curve.

    Raises:
        ValueError: If a map is negative or not finite, or there is no defective or no good pixel.
    """
    if not np.isfinite(maps).all() or maps.min() < 0:
        msg = "maps must be finite and not negative."
        raise ValueError(msg)
    sizes = np.bincount(regions.reshape(-1))
    if len(sizes) < 2 or sizes[0] == 0:  # noqa: PLR2004
        msg = "pixel metrics need defective and good pixels."
        raise ValueError(msg)
    # floats of at least zero order like their bits, so score and region sort as one integer
    packed = maps.astype(np.float32).reshape(-1).view(np.uint32).astype(np.uint64) << np.uint64(32)
    packed |= regions.reshape(-1).astype(np.uint64)
    packed.sort()
    packed = packed[::-1]
    score, region = (packed >> np.uint64(32)).astype(np.uint32), packed.astype(np.uint32)
    last = np.flatnonzero(np.append(score[1:] != score[:-1], True))  # ends of runs of equal scores
    weight = np.append(0.0, 1.0 / sizes[1:]) / (len(sizes) - 1)
    overlap = np.append(0.0, np.cumsum(weight[region])[last])
    hits = np.append(0, np.cumsum(region > 0)[last])
    seen = np.append(0, last + 1)
    recall, fpr = hits / hits[-1], (seen - hits) / sizes[0]
    precision = hits[1:] / seen[1:]
    inside = fpr <= _FPR_LIMIT
    limited_x = np.append(fpr[inside], _FPR_LIMIT)
    limited_y = np.append(overlap[inside], np.interp(_FPR_LIMIT, fpr, overlap))
    grid = np.linspace(0, _FPR_LIMIT, _CURVE_POINTS)
    return PixelScores(
        auroc=float(np.trapezoid(recall, fpr)),
        average_precision=float(np.sum(np.diff(recall) * precision)),
        aupro=float(np.trapezoid(limited_y, limited_x) / _FPR_LIMIT),
        pro=Curve(grid.round(5).tolist(), np.interp(grid, limited_x, limited_y).round(5).tolist()),
    )


def image_metrics(scores: NDArray[np.float64], labels: NDArray[np.bool_]) -> dict[str, float]:
    """Image AUROC, best F1 and average precision; ``labels`` is 1 for a defect."""
    precision, recall, _ = precision_recall_curve(labels, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    return {
        "image_AUROC": float(roc_auc_score(labels, scores)),
        "image_F1Max": float(f1.max()),
        "image_AP": float(average_precision_score(labels, scores)),
    }


def per_defect(scores: NDArray[np.float64], kinds: NDArray[np.str_]) -> dict[str, float]:
    """Image AUROC of each kind of defect against all images of kind ``"good"``."""
    return {
        str(kind): float(
            roc_auc_score(
                (kinds != "good")[(kinds == kind) | (kinds == "good")],
                scores[(kinds == kind) | (kinds == "good")],
            )
        )
        for kind in sorted(set(kinds.tolist()) - {"good"})
    }


def accuracy(
    scores: NDArray[Any], kinds: NDArray[np.str_], pixels: PixelScores | None = None
) -> dict[str, Any]:
    """What a record says of accuracy, rounded.

    Args:
        scores (NDArray[Any]): Of the images, shape ``(N,)``.
        kinds (NDArray[np.str_]): Kind of defect of each, ``"good"`` for none.
        pixels (PixelScores | None): Of the maps, where there are masks.

    Returns:
        dict[str, Any]: ``metrics`` and ``per_defect``, as in
            :class:`~benchmarks.common.records.Record`.
    """
    found = image_metrics(scores, kinds != "good")
    if pixels is not None:
        found |= {
            "pixel_AUROC": pixels.auroc,
            "pixel_AP": pixels.average_precision,
            "AUPRO": pixels.aupro,
        }
    return {
        "metrics": {name: round(found[name], 5) if name in found else None for name in METRICS},
        "per_defect": {kind: round(value, 5) for kind, value in per_defect(scores, kinds).items()},
    }
