"""Statistics of a report: counts at a threshold, confidence intervals, and curves."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from anomalib.metrics.aupro import _AUPRO
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score, roc_curve
from torch import Tensor

__all__ = ["Counts", "Curve", "RegionOverlap", "auroc", "interval", "roc", "subsampled"]

_Z = 1.959963984540054  # quantile of the normal distribution for a two-sided interval of 95%
_POINTS = 400  # drawn points of a curve
_PIXELS = 2**26  # kept for the region overlap: 256 MiB of maps, a thousand of 256 x 256


class Counts(NamedTuple):
    """Images on both sides of a threshold.

    Attributes:
        good (int): Images labelled good.
        false_alarms (int): Good images above the threshold.
        defective (int): Images labelled defective.
        missed (int): Defective images not above the threshold.
        unlabelled (int): Images without a label.
        called (int): Unlabelled images above the threshold.
    """

    good: int
    false_alarms: int
    defective: int
    missed: int
    unlabelled: int
    called: int

    @classmethod
    def at(
        cls, threshold: float, scores: Sequence[float], truths: Sequence[int | None]
    ) -> "Counts":
        """Count images at a threshold.

        Args:
            threshold (float): Larger scores are anomalous.
            scores (Sequence[float]): Score of each image.
            truths (Sequence[int | None]): 1 for a defective image, 0 for a good one, ``None``
                without a label.

        Returns:
            Counts: The counts.
        """
        above = np.asarray(scores, float) > threshold
        truth = np.array([-1 if value is None else value for value in truths], int)
        good, bad, unknown = truth == 0, truth == 1, truth == -1
        found = (good, good & above, bad, bad & ~above, unknown, unknown & above)
        return cls(*(int(chosen.sum()) for chosen in found))

    @property
    def rates(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """False alarms, misses and unlabelled alarms, each with the number of images."""
        return (
            (self.false_alarms, self.good),
            (self.missed, self.defective),
            (self.called, self.unlabelled),
        )


class Curve(NamedTuple):
    """A curve to draw.

    Attributes:
        x (list[float]): Abscissas, ascending.
        y (list[float]): Ordinates.
        area (float): Area under the whole curve, as a share of the largest possible.
    """

    x: list[float]
    y: list[float]
    area: float


def interval(hits: int, number: int) -> tuple[float, float]:
    """Confidence interval of 95% for a share (Wilson 1927).

    Args:
        hits (int): Number of hits.
        number (int): Number of trials.

    Returns:
        tuple[float, float]: Lower and upper bound; 0 and 1 without trials.
    """
    if not number:
        return 0.0, 1.0
    share, spread = hits / number, _Z * _Z / number
    middle = (share + spread / 2) / (1 + spread)
    half = (_Z / (1 + spread)) * float(
        np.sqrt(share * (1 - share) / number + spread / (4 * number))
    )
    return (0.0 if hits == 0 else middle - half), (1.0 if hits == number else middle + half)


def auroc(good: Sequence[float], defective: Sequence[float]) -> float | None:
    """Area under the ROC curve of scores; ``None`` without scores of both kinds."""
    if not (len(good) and len(defective)):
        return None
    return float(roc_auc_score([0] * len(good) + [1] * len(defective), [*good, *defective]))


def roc(good: Sequence[float], defective: Sequence[float]) -> Curve | None:
    """ROC curve of scores; ``None`` without scores of both kinds."""
    area = auroc(good, defective)
    if area is None:
        return None
    labels = [0] * len(good) + [1] * len(defective)
    false_rate, true_rate, _ = roc_curve(labels, [*good, *defective])
    return subsampled(false_rate, true_rate, area)


def subsampled(x: NDArray[np.floating], y: NDArray[np.floating], area: float) -> Curve:
    """Curve of at most 402 points: its ends, and points evenly spaced along it.

    Args:
        x (NDArray[np.floating]): Abscissas, shape ``(N,)``, ascending.
        y (NDArray[np.floating]): Ordinates, shape ``(N,)``.
        area (float): Area under the whole curve.

    Returns:
        Curve: The points, rounded to five decimals.
    """
    if len(x) > _POINTS:
        steps = np.abs(np.diff(x)) / (np.ptp(x) or 1.0) + np.abs(np.diff(y))
        length = np.concatenate(([0.0], np.cumsum(steps)))
        nearest = np.searchsorted(length, np.linspace(0.0, length[-1], _POINTS))
        chosen = np.unique(np.concatenate(([0], nearest.clip(0, len(x) - 1), [len(x) - 1])))
        x, y = x[chosen], y[chosen]
    return Curve(np.round(x, 5).tolist(), np.round(y, 5).tolist(), area)


class RegionOverlap:
    """Per-region overlap of a run, by anomalib's AUPRO metric, as far as memory suffices.

    Attributes:
        left_out (int): Images with a mask that are not kept.
    """

    def __init__(self) -> None:
        self._maps: list[Tensor] = []
        self._masks: list[Tensor] = []
        self._pixels = 0
        self.left_out = 0

    def add(self, maps: Tensor | None, masks: Tensor | None) -> None:
        """Keep the maps and masks of a batch, if there are masks.

        Args:
            maps (Tensor | None): Anomaly maps, shape ``(B, 1, H, W)`` or ``(B, H, W)``.
            masks (Tensor | None): Masks of defects, of the same shape but for the channel.
        """
        if maps is None or masks is None:
            return
        scores, truth = (
            part.detach().reshape(len(part), *part.shape[-2:]).cpu() for part in (maps, masks)
        )
        full = self._pixels + scores.numel() > _PIXELS
        other_size = bool(self._maps) and self._maps[0].shape[1:] != scores.shape[1:]
        if scores.shape != truth.shape or full or other_size:
            self.left_out += len(scores)
            return
        self._pixels += scores.numel()
        self._maps.append(scores.float())
        self._masks.append(truth > 0)

    def curve(self) -> tuple[Curve | None, str]:
        """Curve of overlap against false pixels, up to 30% of them.

        Returns:
            tuple[Curve | None, str]: The curve, ``None`` without a marked defect; and a note on
            what it leaves out or why it is missing.
        """
        if not any(bool(mask.any()) for mask in self._masks):
            return None, "No mask marks a defect, so there is no per-region overlap."
        metric = _AUPRO()
        metric.update(torch.cat(self._maps), torch.cat(self._masks).int())
        false_pixels, overlap = metric._compute()  # noqa: SLF001  # what its own figure draws
        note = (
            f"The curve leaves out {self.left_out} images: memory does not suffice for them, or"
            " their maps have another size."
            if self.left_out
            else ""
        )
        area = float(metric.compute())
        return subsampled(false_pixels.cpu().numpy(), overlap.cpu().numpy(), area), note
