"""Thresholds: from scores of good parts alone at a chosen rate of false alarms, or between good and defective ones."""

import math
from collections.abc import Hashable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

__all__ = [
    "CONFIDENCE",
    "LEAST_RATE",
    "LEAST_UNITS",
    "Decision",
    "alarm_threshold",
    "combined_threshold",
    "dividing_threshold",
    "few_units_warning",
    "require_rate",
    "supported_rate",
    "units_needed",
]

CONFIDENCE = 0.95
LEAST_RATE = 1e-6  # of false alarms: no number of images that anybody has supports a smaller one
LEAST_UNITS = 30  # below it a threshold from good images alone is uncertain at any rate
_TAIL = 0.25  # share of the largest scores that a tail is fitted to
_ROUNDING = 1e-9  # of sums of shares; far below the least rate
_LARGEST = float(np.finfo(np.float32).max)


def alarm_threshold(scores: Sequence[float], rate: float, units: Sequence[Hashable] | None = None) -> float:
    """Threshold that a new nominal score exceeds with a given probability, at most.

    With enough scores the order statistic of split conformal prediction (Vovk et al. 2005): exceeded with a probability
    of no more than ``rate``, whatever the distribution, by a score exchangeable with these. Where several scores are of
    one unit, units are what is exchangeable: each has the same weight, shared by its scores (Dunn, Wasserman & Ramdas
    2022, pooling CDFs). With fewer than ``1 / rate - 1`` units no such statistic exists, and an exponential tail
    through the largest quarter is extrapolated, from the largest score up, and rounded up.

    Args:
        scores (Sequence[float]): Of nominal images, in any order; taken as 32-bit numbers.
        rate (float): Probability of a false alarm, from :data:`LEAST_RATE` up, below one.
        units (Sequence[Hashable] | None): What each is a score of; ``None`` for a unit each.

    Returns:
        float: The threshold, a 32-bit number; an alarm is what exceeds it.

    Raises:
        ValueError: If there is no score, one is not finite in 32 bits, ``rate`` is out of range, or units and scores
            differ in number.
    """
    require_rate(rate)
    values = _finite("alarm_threshold", scores).astype(np.float64)
    labels = range(len(values)) if units is None else units
    if len(labels) != len(values):
        msg = f"alarm_threshold needs a unit for each score, got {len(labels)} for {len(values)}."
        raise ValueError(msg)
    numbers = {unit: number for number, unit in enumerate(dict.fromkeys(labels))}
    unit = np.array([numbers[label] for label in labels])
    order = values.argsort(kind="stable")
    ordered = values[order]
    weight = 1.0 / (np.bincount(unit)[unit[order]] * (len(numbers) + 1))
    below = weight.cumsum()
    enough = np.flatnonzero(below >= 1.0 - rate - _ROUNDING)
    if len(enough):
        return float(ordered[enough[0]])
    # too few units: the tail is the uppermost quarter of them, by weight, and one at least
    exceeding = max(round(_TAIL * len(numbers)), 1) / (len(numbers) + 1)
    tail = below[-1] - below < exceeding - _ROUNDING
    base = ordered[~tail][-1] if not tail.all() else ordered[0]
    share = weight[tail].sum()
    excess = (weight[tail] * (ordered[tail] - base)).sum() / share
    # not below the largest score: no larger rate has a threshold above it
    return _rounded_up(max(float(base + excess * math.log(share / rate)), float(ordered[-1])))


def dividing_threshold(good: Sequence[float], bad: Sequence[float]) -> float:
    """Threshold between nominal and defective scores.

    Half-way between the highest nominal and the lowest defective score where these are apart. Where they are not, at
    the largest F1 score, as anomalib chooses, but half-way to the next lower score: what exceeds it is anomalous, the
    score that it was chosen for included.

    Scores are 32-bit numbers wherever they are compared, so that both the choice and the threshold are of 32 bits.

    Args:
        good (Sequence[float]): Scores of nominal images, in any order; taken as 32-bit numbers.
        bad (Sequence[float]): Scores of defective images.

    Returns:
        float: The threshold, a 32-bit number; an alarm is what exceeds it.

    Raises:
        ValueError: If there is none of either, or one is not finite in 32 bits.
    """
    nominal, defective = _finite("dividing_threshold", good), _finite("dividing_threshold", bad)
    values = np.unique(np.concatenate((nominal, defective)))
    found = len(defective) - np.searchsorted(np.sort(defective), values)
    alarms = len(nominal) - np.searchsorted(np.sort(nominal), values)
    f1 = 2 * found / (found + alarms + len(defective))
    best = int(np.flatnonzero(f1 == f1.max())[-1])  # of equals the one with the fewest alarms
    if best == 0:
        return float(np.nextafter(values[0], np.float32(-np.inf)))
    return _between(values[best - 1], values[best])


class Decision(NamedTuple):
    """A threshold and what decided it.

    Attributes:
        threshold (float): A 32-bit number; an alarm is what exceeds it.
        by (Literal["good", "labels"]): ``"good"`` for good images at a rate of false alarms, ``"labels"`` for good and
            defective validation images.
    """

    threshold: float
    by: Literal["good", "labels"]


def combined_threshold(
    *,
    good: Sequence[float],
    bad: Sequence[float],
    calibration: Sequence[float],
    rate: float,
    units: Sequence[Hashable] | None = None,
) -> Decision:
    """Threshold from good images, which labelled images replace where they show that it makes more errors.

    Good images give the threshold of :func:`alarm_threshold`. That of :func:`dividing_threshold` takes its place only
    if it makes fewer errors among the labelled images by an exact one-sided sign test at 5% (McNemar 1947): of the
    images on which the two differ, it must be right on so many that a fair coin would rarely do as well. At least five
    such images are needed.

    Args:
        good (Sequence[float]): Scores of good validation images, which were not trained on; may be empty.
        bad (Sequence[float]): Scores of defective validation images; may be empty.
        calibration (Sequence[float]): Scores of all good images: training images, each scored without its own atoms,
            and those in ``good``.
        rate (float): Rate of false alarms, see :func:`alarm_threshold`.
        units (Sequence[Hashable] | None): What each score in ``calibration`` is of; ``None`` for a unit each.

    Returns:
        Decision: The threshold and what decided it.

    Raises:
        ValueError: If ``calibration`` is empty, a score is not finite in 32 bits, ``rate`` is out of range, or units
            and scores differ in number.
    """
    default = Decision(alarm_threshold(calibration, rate, units), "good")
    if len(good) == 0 or len(bad) == 0:
        return default
    divided = dividing_threshold(good, bad)
    scores = np.concatenate((_finite("combined_threshold", good), _finite("combined_threshold", bad)))
    truth = np.repeat((False, True), (len(good), len(bad)))
    ours, theirs = ((scores > threshold) == truth for threshold in (divided, default.threshold))
    better, worse = int((ours & ~theirs).sum()), int((theirs & ~ours).sum())
    return Decision(divided, "labels") if _sign_test(better, worse) else default


def supported_rate(units: int) -> float:
    """Rate of false alarms that so many nominal units, none of them an alarm, support at 95% confidence.

    Exact and binomial: units with a higher rate would all pass with a probability of less than 5%.

    Args:
        units (int): Number of independent units.

    Returns:
        float: The rate; 1 for none.
    """
    return 1.0 - (1.0 - CONFIDENCE) ** (1.0 / units) if units else 1.0


def units_needed(rate: float) -> int:
    """Number of independent nominal units that support a rate of false alarms at 95% confidence.

    Args:
        rate (float): The rate, from :data:`LEAST_RATE` up, below one.

    Raises:
        ValueError: If it is out of range.
    """
    require_rate(rate)
    return math.ceil(math.log(1.0 - CONFIDENCE) / math.log1p(-rate))


def few_units_warning(units: int, rate: float) -> str | None:
    """Warning that good images are too few for a threshold at a rate of false alarms.

    Below :data:`LEAST_UNITS` units a warning is always due. Above, it is due where the threshold has to be extrapolated
    beyond the largest score, see :func:`alarm_threshold`: at 1% below 99 units. The bound that it names is exact: the
    rate of new alarms beyond the r-th largest of n scores has the distribution Beta(r, n + 1 - r) (Vovk 2012).

    Args:
        units (int): Number of independent good units that the threshold is calibrated on.
        rate (float): Rate of false alarms that was chosen, from :data:`LEAST_RATE` up, below one.

    Returns:
        str | None: One sentence without a full stop, or ``None`` where there are enough.

    Raises:
        ValueError: If the rate is out of range.
    """
    require_rate(rate)
    if units >= max(LEAST_UNITS, 1.0 / rate - 1.0 - _ROUNDING):
        return None
    alarms = max(math.floor((units + 1) * (rate + _ROUNDING)) - 1, 0)  # that calibration leaves above the threshold
    bound, needed = _upper_bound(alarms, units), max(LEAST_UNITS, units_needed(rate))
    images = "1 image" if units == 1 else f"{units} images"
    return f"{images}: the true rate may be up to {_percent(bound)}; {_percent(rate)} needs {needed}"


def require_rate(rate: float, name: str = "rate") -> None:
    """Refuse what is not a rate of false alarms.

    Args:
        rate (float): The rate.
        name (str): Of the argument, for the message.

    Raises:
        ValueError: If the rate is not a number from :data:`LEAST_RATE` up, below one.
    """
    if not LEAST_RATE <= rate < 1.0:
        msg = f"{name} must lie between 0 and 1, and not below {LEAST_RATE:g}, got {rate:g}."
        raise ValueError(msg)


def _finite(name: str, scores: ArrayLike) -> NDArray[np.float32]:
    """Scores in the precision in which they are compared."""
    with np.errstate(over="ignore"):
        values = np.asarray(scores).astype(np.float32)
    if len(values) == 0 or not np.isfinite(values).all():
        msg = f"{name} needs finite scores, got {len(values)}."
        raise ValueError(msg)
    return values


def _sign_test(better: int, worse: int) -> bool:
    """Whether a fair coin gives so many or more of one side with a probability of 5% at most; exact."""
    total = better + worse
    probability = sum(math.comb(total, side) for side in range(better, total + 1)) / 2**total
    return probability <= 1.0 - CONFIDENCE + _ROUNDING


def _between(low: np.float32, high: np.float32) -> float:
    """32-bit number half-way between two: at or above the lower and below the higher one."""
    middle = np.float32((float(low) + float(high)) / 2.0)
    return float(middle if middle < high else low)


def _rounded_up(value: float) -> float:
    """Smallest 32-bit number that is not below a value; the largest there is, where all are."""
    if value >= _LARGEST:
        return _LARGEST
    nearest = np.float32(value)
    return float(nearest if float(nearest) >= value else np.nextafter(nearest, np.float32(np.inf)))


def _upper_bound(alarms: int, units: int) -> float:
    """Largest rate at which so few alarms among so many units have a probability of 5% (Clopper & Pearson 1934)."""
    if alarms == 0:
        return supported_rate(units)
    low, high = alarms / units, 1.0
    for _ in range(50):
        middle = (low + high) / 2.0
        few = sum(math.comb(units, k) * middle**k * (1.0 - middle) ** (units - k) for k in range(alarms + 1))
        low, high = (middle, high) if few > 1.0 - CONFIDENCE else (low, middle)
    return high


def _percent(share: float) -> str:
    return f"{100.0 * share:.2g}%" if share < 0.995 else "100%"  # noqa: PLR2004  # not 1e+02
