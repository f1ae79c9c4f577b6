"""Numbers of a report: counts at a threshold and how sure they are, curves and the areas under them."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from sklearn.metrics import roc_auc_score, roc_curve

__all__ = ["Counts", "Curve", "Line", "area_under", "interval", "lines", "roc", "thinned"]

_Z = 1.959963984540054  # of 95%, both sides
_POINTS = 400  # of a curve, to draw


class Counts(NamedTuple):
    """What a threshold makes of images.

    Attributes:
        good (int): Images known to be good.
        alarms (int): Of those, above the threshold.
        bad (int): Images known to be defective.
        missed (int): Of those, not above it.
        unknown (int): Images of which the truth is not known.
        called (int): Of those, above it.
    """

    good: int
    alarms: int
    bad: int
    missed: int
    unknown: int
    called: int

    @classmethod
    def at(cls, threshold: float, scores: Sequence[float], truths: Sequence[int | None]) -> "Counts":
        """Count.

        Args:
            threshold (float): Larger scores are anomalous.
            scores (Sequence[float]): Of images.
            truths (Sequence[int | None]): 1 for a defect, 0 for a good image, ``None`` for one that is not known.
        """
        above = np.asarray(scores, float) > threshold
        truth = np.array([-1 if value is None else value for value in truths], int)
        good, bad, unknown = truth == 0, truth == 1, truth == -1
        found = (good, good & above, bad, bad & ~above, unknown, unknown & above)
        return cls(*(int(chosen.sum()) for chosen in found))


class Curve(NamedTuple):
    """A curve to draw.

    Attributes:
        x (list[float]): From the left.
        y (list[float]): Of each.
        area (float): Under it, of all that there could be.
    """

    x: list[float]
    y: list[float]
    area: float


class Line(NamedTuple):
    """A line of a table by kind or by group.

    Attributes:
        name (str): Of the kind or group.
        counts (Counts): Of its new images, at the threshold in force.
        auroc (float | None): Of all its images; ``None`` without good and defective ones.
        left_out (int): Its images that are not new.
    """

    name: str
    counts: Counts
    auroc: float | None
    left_out: int = 0


def interval(hits: int, number: int) -> tuple[float, float]:
    """Interval of 95% for a share (Wilson 1927).

    Args:
        hits (int): How many.
        number (int): Of how many.

    Returns:
        tuple[float, float]: From and to; all from 0 to 1 of none.
    """
    if not number:
        return 0.0, 1.0
    share, spread = hits / number, _Z * _Z / number
    middle = (share + spread / 2) / (1 + spread)
    half = (_Z / (1 + spread)) * float(np.sqrt(share * (1 - share) / number + spread / (4 * number)))
    return (0.0 if hits == 0 else middle - half), (1.0 if hits == number else middle + half)


def area_under(good: Sequence[float], bad: Sequence[float]) -> float | None:
    """Area under the ROC curve; ``None`` without images of both."""
    if not (len(good) and len(bad)):
        return None
    return float(roc_auc_score([0] * len(good) + [1] * len(bad), [*good, *bad]))


def roc(good: Sequence[float], bad: Sequence[float]) -> Curve | None:
    """False alarms against defects found; ``None`` without images of both."""
    area = area_under(good, bad)
    if area is None:
        return None
    alarms, found, _ = roc_curve([0] * len(good) + [1] * len(bad), [*good, *bad])
    return thinned(alarms, found, area)


def thinned(x: NDArray[np.floating], y: NDArray[np.floating], area: float) -> Curve:
    """A curve of so many points as can be seen: its ends, and those evenly spread along it."""
    walked = np.concatenate(([0.0], np.cumsum(np.abs(np.diff(x)) / (np.ptp(x) or 1.0) + np.abs(np.diff(y)))))
    if len(x) > _POINTS:
        places = np.searchsorted(walked, np.linspace(0.0, walked[-1], _POINTS)).clip(0, len(x) - 1)
        chosen = np.unique(np.concatenate(([0], places, [len(x) - 1])))
        x, y = x[chosen], y[chosen]
    return Curve(np.round(x, 5).tolist(), np.round(y, 5).tolist(), area)


def lines(
    names: Sequence[str],
    scores: Sequence[float],
    truths: Sequence[int | None],
    threshold: float,
    *,
    against_all_good: bool,
    new: Sequence[bool],
) -> list[Line]:
    """A table by kind or by group.

    Args:
        names (Sequence[str]): Of the kind or group of each image.
        scores (Sequence[float]): Of each.
        truths (Sequence[int | None]): Of each.
        threshold (float): Larger scores are anomalous.
        against_all_good (bool): Whether defects are told from the good images of all names, as those of a kind are, and
            not from those of their own.
        new (Sequence[bool]): Whether each image is counted: not one that chose the threshold or was trained on.

    Returns:
        list[Line]: By name.
    """
    every_good = [score for score, truth in zip(scores, truths, strict=True) if truth == 0]
    found = []
    for name in sorted(set(names)):
        own = [row[1:] for row in zip(names, scores, truths, new, strict=True) if row[0] == name]
        counted = [(score, truth) for score, truth, is_new in own if is_new]
        good = every_good if against_all_good else [score for score, truth, _ in own if truth == 0]
        counts = Counts.at(threshold, [score for score, _ in counted], [truth for _, truth in counted])
        area = area_under(good, [score for score, truth, _ in own if truth == 1])
        found.append(Line(name, counts, area, len(own) - len(counted)))
    return found
