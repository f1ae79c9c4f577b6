"""Thresholds: from scores of good parts alone at a chosen rate of false alarms, or between good and defective ones."""

import math
from collections.abc import Hashable, Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["CONFIDENCE", "alarm_threshold", "dividing_threshold", "supported_rate", "units_needed"]

CONFIDENCE = 0.95
_TAIL = 0.25  # share of the largest scores that a tail is fitted to
_ROUNDING = 1e-9  # of sums of shares


def alarm_threshold(scores: Sequence[float], rate: float, units: Sequence[Hashable] | None = None) -> float:
    """Threshold that a new nominal score exceeds with a given probability, at most.

    With enough scores the order statistic of split conformal prediction (Vovk et al. 2005): exceeded with a probability
    of no more than ``rate``, whatever the distribution, by a score exchangeable with these. Where several scores are of
    one unit, units are what is exchangeable: each has the same weight, shared by its scores (Dunn, Wasserman & Ramdas
    2022, pooling CDFs). With fewer than ``1 / rate - 1`` units no such statistic exists, and an exponential tail
    through the largest quarter is extrapolated, from the largest score up.

    Args:
        scores (Sequence[float]): Of nominal images, in any order.
        rate (float): Probability of a false alarm, between zero and one.
        units (Sequence[Hashable] | None): What each is a score of; ``None`` for a unit each.

    Returns:
        float: The threshold; an alarm is what exceeds it.

    Raises:
        ValueError: If there is no score, one is not finite, ``rate`` is out of range, or units and scores differ in
            number.
    """
    if not 0.0 < rate < 1.0:
        msg = f"rate must lie between 0 and 1, got {rate}."
        raise ValueError(msg)
    values = _finite("alarm_threshold", scores)
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
    return max(float(base + excess * math.log(share / rate)), float(ordered[-1]))


def dividing_threshold(good: Sequence[float], bad: Sequence[float]) -> float:
    """Threshold between nominal and defective scores.

    Half-way between the highest nominal and the lowest defective score where these are apart. Where they are not, at
    the largest F1 score, as anomalib chooses, but half-way to the next lower score: what exceeds it is anomalous, the
    score that it was chosen for included.

    Args:
        good (Sequence[float]): Scores of nominal images, in any order.
        bad (Sequence[float]): Scores of defective images.

    Returns:
        float: The threshold; an alarm is what exceeds it.

    Raises:
        ValueError: If there is none of either, or one is not finite.
    """
    nominal, defective = _finite("dividing_threshold", good), _finite("dividing_threshold", bad)
    values = np.unique(np.concatenate((nominal, defective)))
    found = len(defective) - np.searchsorted(np.sort(defective), values)
    alarms = len(nominal) - np.searchsorted(np.sort(nominal), values)
    f1 = 2 * found / (found + alarms + len(defective))
    best = int(np.flatnonzero(f1 >= f1.max() - _ROUNDING)[-1])  # of equals the one with the fewest alarms
    if best == 0:
        return float(np.nextafter(values[0], -np.inf))
    middle = float((values[best - 1] + values[best]) / 2)
    return middle if middle < values[best] else float(values[best - 1])


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
        rate (float): The rate, between zero and one.
    """
    return math.ceil(math.log(1.0 - CONFIDENCE) / math.log1p(-rate))


def _finite(name: str, scores: Sequence[float]) -> NDArray[np.float64]:
    values = np.asarray(scores, float)
    if len(values) == 0 or not np.isfinite(values).all():
        msg = f"{name} needs finite scores, got {len(values)}."
        raise ValueError(msg)
    return values
