"""Thresholds: from scores of good parts alone at a chosen rate of false alarms, or between good and
defective ones.

The threshold of largest F1 score of any number of values, in memory that does not grow with it.
"""

import math
from collections.abc import Hashable, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from anomalib_sgfr.core.processes import summed

__all__ = [
    "CONFIDENCE",
    "LEAST_RATE",
    "LEAST_UNITS",
    "Decision",
    "StreamingF1Threshold",
    "clear_of",
    "combined_threshold",
    "conformal_threshold",
    "f1_threshold",
    "few_units_warning",
    "require_rate",
    "supported_rate",
    "units_needed",
]


CONFIDENCE = 0.95
LEAST_RATE = 1e-6  # of false alarms: no number of images that anybody has supports a smaller one
LEAST_UNITS = 30  # below it a threshold from good images alone is uncertain at any rate
_TAIL = 0.25  # share of the largest scores that a tail is fitted to
_TAIL_OF_EACH = (1.0 - CONFIDENCE) / 2.0  # two bounds hold together at that confidence
_CONTRADICTION = 0.01  # probability below which alarms among good images contradict a rate
_ROUNDING = 1e-9  # of sums of shares; far below the least rate
_LARGEST = float(np.finfo(np.float32).max)
# of a threshold above a score: rounding of another precision or route moves a score by less
_CLEARANCE = 1e-3


def conformal_threshold(
    scores: Sequence[float], rate: float, units: Sequence[Hashable] | None = None
) -> float:
    """Threshold that a new nominal score exceeds with a given probability, at most.

    With enough scores the order statistic of split conformal prediction (Vovk et al. 2005):
    exceeded with a probability of no more than ``rate``, whatever the distribution, by a score
    exchangeable with these. Where several scores are of
    one unit, units are what is exchangeable: each has the same weight, shared by its scores (Dunn,
    Wasserman & Ramdas 2022, pooling CDFs). With fewer than ``1 / rate - 1`` units no such statistic
    exists, and an exponential tail through the largest quarter is extrapolated, from the largest
    score up, and rounded up.

    Args:
        scores (Sequence[float]): Of nominal images, in any order; taken as 32-bit numbers.
        rate (float): Probability of a false alarm, from 1e-6 up, below one.
        units (Sequence[Hashable] | None): What each is a score of; ``None`` for a unit each.

    Returns:
        float: The threshold, a 32-bit number; an alarm is what exceeds it.

    Raises:
        ValueError: If there is no score, one is not finite in 32 bits, ``rate`` is out of range, or
            units and scores differ in number.
    """
    require_rate(rate)
    values = _finite("conformal_threshold", scores).astype(np.float64)
    unit = _numbered("conformal_threshold", values, units)
    number = int(unit.max()) + 1
    order = values.argsort(kind="stable")
    ordered = values[order]
    weight = 1.0 / (np.bincount(unit)[unit[order]] * (number + 1))
    below = weight.cumsum()
    enough = np.flatnonzero(below >= 1.0 - rate - _ROUNDING)
    if len(enough):
        return float(ordered[enough[0]])
    # too few units: the tail is the uppermost quarter of them, by weight, and one at least
    exceeding = max(round(_TAIL * number), 1) / (number + 1)
    tail = below[-1] - below < exceeding - _ROUNDING
    base = ordered[~tail][-1] if not tail.all() else ordered[0]
    share = weight[tail].sum()
    excess = (weight[tail] * (ordered[tail] - base)).sum() / share
    # not below the largest score: no larger rate has a threshold above it
    return _rounded_up(max(float(base + excess * math.log(share / rate)), float(ordered[-1])))


def f1_threshold(good: Sequence[float], bad: Sequence[float]) -> float:
    """Threshold between nominal and defective scores.

    Half-way between the highest nominal and the lowest defective score where these are apart. Where
    they are not, at the largest F1 score, as anomalib chooses, but half-way to the next lower
    score: what exceeds it is anomalous, the score that it was chosen for included.

    Scores are 32-bit numbers wherever they are compared, so that both the choice and the threshold
    are of 32 bits.

    Args:
        good (Sequence[float]): Scores of nominal images, in any order; taken as 32-bit numbers.
        bad (Sequence[float]): Scores of defective images.

    Returns:
        float: The threshold, a 32-bit number; an alarm is what exceeds it.

    Raises:
        ValueError: If there is none of either, or one is not finite in 32 bits.
    """
    nominal, defective = _finite("f1_threshold", good), _finite("f1_threshold", bad)
    values = np.unique(np.concatenate((nominal, defective)))
    found = len(defective) - np.searchsorted(np.sort(defective), values)
    alarms = len(nominal) - np.searchsorted(np.sort(nominal), values)
    f1 = 2 * found / (found + alarms + len(defective))
    best = int(np.flatnonzero(f1 == f1.max())[-1])  # of equals the one with the fewest alarms
    if best == 0:
        return float(np.nextafter(values[0], np.float32(-np.inf)))
    return _between(values[best - 1], values[best])


def clear_of(threshold: float, scores: Sequence[float]) -> float:
    """Threshold moved off the score that it equals, so that no rounding carries that score across
    it.

    An order statistic is the score of an image, which another route, in another order of
    operations, gives a little more or less of. A larger threshold keeps what
    :func:`conformal_threshold` promises.

    Args:
        threshold (float): A 32-bit number.
        scores (Sequence[float]): That it was chosen from; taken as 32-bit numbers.

    Returns:
        float: The threshold itself where it equals none; otherwise a thousandth above it, or
        half-way to the next larger score where that is nearer.

    Raises:
        ValueError: If there is no score, or one is not finite in 32 bits.
    """
    values = _finite("clear_of", scores)
    if threshold <= 0.0 or not (values == np.float32(threshold)).any():
        return threshold
    above = values[values > np.float32(threshold)]
    cleared = min(np.float32(threshold * (1.0 + _CLEARANCE)), np.float32(_LARGEST))
    return float(
        cleared
        if not len(above)
        else min(cleared, np.float32(_between(np.float32(threshold), above.min())))
    )


class Decision(NamedTuple):
    """A threshold and what decided it.

    Attributes:
        threshold (float): A 32-bit number; an alarm is what exceeds it.
        by (Literal["good", "labels"]): ``"good"`` for good images at a rate of false alarms,
            ``"labels"`` for good and defective validation images.
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
    good_units: Sequence[Hashable] | None = None,
    bad_units: Sequence[Hashable] | None = None,
    alarm_cost: float = 2.0,
) -> Decision:
    """Threshold from good images at a rate of false alarms, unless labelled images show that a
    lower one is better.

    1. Good images decide: :func:`conformal_threshold` of ``calibration``.
    2. Images that were not trained on may contradict it. Where more of ``good`` are alarms than the
       rate explains with a probability of 1% (exact binomial test), the threshold rises until that
       is no longer so. One alarm among good images is never enough at a rate of 1%.
    3. Defective images may lower it, if both kinds are labelled. Each lower threshold has a gain,
       the share of ``bad`` that it finds in addition, and a loss, the share of ``calibration`` that
       it makes alarms. It is better only if the gain exceeds ``alarm_cost`` times the loss with 95%
       confidence, by exact bounds, each at 97.5% (Clopper & Pearson 1934): the lower one of the
       gain, and the upper one of the loss. The share of ``good`` that it makes alarms counts as the
       loss where it is larger. The threshold with the largest difference is taken, of equals the
       highest. At a cost of one this maximises a lower bound of Youden's index (Youden 1950), and
       so the balanced error falls; a larger cost avoids the long tail of validation sets that would
       give many false alarms.

    A few labelled images have wide bounds, and change little. ``benchmarks/threshold_rules.py`` compares
    this rule with others.

    Args:
        good (Sequence[float]): Scores of good validation images, which were not trained on; may be
            empty.
        bad (Sequence[float]): Scores of defective validation images; may be empty.
        calibration (Sequence[float]): Scores of all good images: training images, each scored
            without its own atoms, and those in ``good``.
        rate (float): Rate of false alarms, see :func:`conformal_threshold`.
        units (Sequence[Hashable] | None): What each score in ``calibration`` is of; ``None`` for a
            unit each. Images of one unit share the weight of one image.
        good_units (Sequence[Hashable] | None): The same for ``good``.
        bad_units (Sequence[Hashable] | None): The same for ``bad``.
        alarm_cost (float): Share of missed defects that a share of false alarms counts as, one at
            least.

    Returns:
        Decision: The threshold, and whether good images alone decided it (steps 1 and 2) or labels
            did (step 3). All scores are taken as 32-bit numbers.

    Raises:
        ValueError: If ``calibration`` is empty, a score is not finite in 32 bits, ``rate`` or
            ``alarm_cost`` is out of range, or units and scores differ in number.
    """
    if not 1.0 <= alarm_cost < math.inf:
        msg = f"alarm_cost must be a number, 1 at least, got {alarm_cost}."
        raise ValueError(msg)
    threshold = conformal_threshold(calibration, rate, units)
    if len(good) == 0:
        return Decision(threshold, "good")
    held_out = _Weighted.of("good", good, good_units)
    threshold = max(threshold, _least_uncontradicted(held_out, rate))
    if len(bad) == 0:
        return Decision(threshold, "good")
    nominal, defective = (
        _Weighted.of("calibration", calibration, units),
        _Weighted.of("bad", bad, bad_units),
    )
    lower = _better(threshold, held_out, defective, nominal, alarm_cost)
    return Decision(threshold, "good") if lower is None else Decision(lower, "labels")


class _Weighted(NamedTuple):
    """Scores in ascending order, the weight of those from each on, a zero at the end, and the
    number of units.
    """

    scores: NDArray[np.float32]
    weights: NDArray[np.float64]
    units: int

    @classmethod
    def of(
        cls, name: str, scores: Sequence[float], units: Sequence[Hashable] | None
    ) -> "_Weighted":
        """Scores, of which those of one unit share the weight of one."""
        values = _finite(name, scores)
        labels = _numbered(name, values, units)
        order = values.argsort(kind="stable")
        weights = (1.0 / np.bincount(labels))[labels[order]]
        return cls(
            values[order], np.append(weights[::-1].cumsum()[::-1], 0.0), int(labels.max()) + 1
        )

    def above(self, thresholds: ArrayLike) -> NDArray[np.float64]:
        """Number of units that exceed each threshold, in parts of a unit where it has several
        scores.
        """
        return self.weights[
            np.searchsorted(self.scores, np.asarray(thresholds, np.float32), side="right")
        ]


def _least_uncontradicted(good: _Weighted, rate: float) -> float:
    """Smallest score that no more of the units exceed than the rate explains; minus infinity if it
    explains all.
    """
    numbers = np.arange(good.units + 1)
    chances = (
        _log_ways(numbers, good.units)
        + numbers * math.log(rate)
        + (good.units - numbers) * math.log1p(-rate)
    )
    explained = np.exp(chances).cumsum() > 1.0 - _CONTRADICTION + _ROUNDING
    alarms = int(explained.argmax()) if explained.any() else good.units
    return (
        float(good.scores[good.above(good.scores) < alarms + 1 - _ROUNDING][0])
        if alarms < good.units
        else -math.inf
    )


def _better(
    threshold: float, good: _Weighted, bad: _Weighted, nominal: _Weighted, cost: float
) -> float | None:
    """The lower threshold whose gain exceeds its loss most, see :func:`combined_threshold`; none if
    none does.
    """
    values = np.unique(np.concatenate((good.scores, bad.scores, nominal.scores)))
    places = np.unique(np.searchsorted(values, bad.scores))
    below = np.where(places > 0, values[places - 1], np.nextafter(values[0], np.float32(-np.inf)))
    lower = np.array([_between(*pair) for pair in zip(below, values[places], strict=True)])
    lower = lower[lower < threshold][::-1]
    found, alarms, seen = (
        part.above(lower) - part.above(threshold) for part in (bad, nominal, good)
    )
    found, alarms = np.floor(found + _ROUNDING), np.ceil(alarms - _ROUNDING)
    possible = found / bad.units - cost * np.maximum(alarms / nominal.units, seen / good.units)
    best, chosen = 0.0, None
    for index in possible.argsort(kind="stable")[::-1]:  # no bound is better than what is seen
        if possible[index] <= best:
            break
        gain = 1.0 - _upper_bound(bad.units - int(found[index]), bad.units, _TAIL_OF_EACH)
        loss = max(
            _upper_bound(int(alarms[index]), nominal.units, _TAIL_OF_EACH), seen[index] / good.units
        )
        difference = gain - cost * loss
        if difference > best or (
            difference == best and chosen is not None and lower[index] > chosen
        ):
            best, chosen = difference, float(lower[index])
    return chosen


def supported_rate(units: int) -> float:
    """Rate of false alarms that so many nominal units, none of them an alarm, support at 95%
    confidence.

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
        rate (float): The rate, from 1e-6 up, below one.

    Raises:
        ValueError: If it is out of range.
    """
    require_rate(rate)
    return math.ceil(math.log(1.0 - CONFIDENCE) / math.log1p(-rate))


def few_units_warning(units: int, rate: float) -> str | None:
    """Warning that good images are too few for a threshold at a rate of false alarms.

    Below 30 units a warning is always due. Above, it is due where the threshold has to be
    extrapolated beyond the largest score, see :func:`conformal_threshold`: at 1% below 99 units.
    The bound that it names is exact: the rate of new alarms beyond the r-th largest of n scores has
    the distribution Beta(r, n + 1 - r) (Vovk 2012).

    Args:
        units (int): Number of independent good units that the threshold is calibrated on.
        rate (float): Rate of false alarms that was chosen, from 1e-6 up, below one.

    Returns:
        str | None: One sentence without a full stop, or ``None`` where there are enough.

    Raises:
        ValueError: If the rate is out of range.
    """
    require_rate(rate)
    if units >= max(LEAST_UNITS, 1.0 / rate - 1.0 - _ROUNDING):
        return None
    alarms = max(
        math.floor((units + 1) * (rate + _ROUNDING)) - 1, 0
    )  # that calibration leaves above the threshold
    bound, needed = _upper_bound(alarms, units), max(LEAST_UNITS, units_needed(rate))
    images = "1 image" if units == 1 else f"{units} images"
    return (
        f"{images}: the true rate may be up to {_percent(bound)}; {_percent(rate)} needs {needed}"
    )


def require_rate(rate: float, name: str = "rate") -> None:
    """Refuse what is not a rate of false alarms.

    Args:
        rate (float): The rate.
        name (str): Of the argument, for the message.

    Raises:
        ValueError: If the rate is not a number from 1e-6 up, below one.
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


def _numbered(
    name: str, scores: NDArray[np.floating[Any]], units: Sequence[Hashable] | None
) -> NDArray[np.int64]:
    """Number of the unit of each score."""
    if units is None:
        return np.arange(len(scores))
    if len(units) != len(scores):
        msg = f"{name} needs a unit for each score, got {len(units)} for {len(scores)}."
        raise ValueError(msg)
    numbers = {unit: number for number, unit in enumerate(dict.fromkeys(units))}
    return np.array([numbers[unit] for unit in units])


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


@lru_cache(maxsize=4096)
def _upper_bound(alarms: int, units: int, tail: float = 1.0 - CONFIDENCE) -> float:
    """Largest rate at which so few alarms among so many units have that probability (Clopper &
    Pearson 1934).
    """
    if alarms >= units:
        return 1.0
    numbers = np.arange(alarms + 1)
    ways = _log_ways(numbers, units)
    low, high = alarms / units, 1.0
    for _ in range(32):  # to less than 1e-9
        middle = (low + high) / 2.0
        few = np.exp(
            ways + numbers * math.log(middle) + (units - numbers) * math.log1p(-middle)
        ).sum()
        low, high = (middle, high) if few > tail else (low, middle)
    return high


def _log_ways(numbers: NDArray[np.int64], units: int) -> NDArray[np.float64]:
    """Logarithms of binomial coefficients, of numbers that count up from zero."""
    return np.append(0.0, np.log((units + 1 - numbers[1:]) / numbers[1:]).cumsum())


def _percent(share: float) -> str:
    return f"{100.0 * share:.2g}%" if share < 0.995 else "100%"  # noqa: PLR2004  # not 1e+02


# A bin is the 2^9 numbers that share exponent and the first 14 bits of the fraction of a 32-bit
# float.
_DROPPED, _FRACTION = 9, 14
_LOWEST, _OCTAVES = -32, 64
_BINS = _OCTAVES << _FRACTION
_FIRST = (127 + _LOWEST) << _FRACTION


class StreamingF1Threshold:
    """Threshold that parts values of two classes at the largest F1 score, from counts in fixed
    bins.

    The bins' edges are a factor of at most ``1 + 2**-14`` (0.006%) apart, from ``2**-32`` to
    ``2**32``; smaller values are in the first bin, larger ones and NaN in the last. Counts take 16
    MiB, from the first :meth:`update` to :meth:`reset`.
    """

    def __init__(self) -> None:
        self._counts: Tensor | None = None

    def update(self, values: Tensor, positive: Tensor) -> None:
        """Count values.

        Args:
            values (Tensor): Any shape, floating point.
            positive (Tensor): Whether each is of the class above the threshold; of the same number
                of elements.

        Raises:
            ValueError: If the numbers of elements differ.
        """
        if values.numel() != positive.numel():
            msg = (
                f"positive must have as many elements as values, {values.numel()}, got"
                f" {positive.numel()}."
            )
            raise ValueError(msg)
        flat = values.detach().flatten().float()
        bins = ((flat.view(torch.int32) >> _DROPPED) - _FIRST).clamp(0, _BINS - 1).long()
        counts = torch.bincount(bins + _BINS * positive.flatten().bool(), minlength=2 * _BINS).view(
            2, _BINS
        )
        self._counts = (
            counts if self._counts is None else self._counts + counts.to(self._counts.device)
        )

    def compute(self, device: torch.device | None = None) -> float | None:
        """The threshold, from what all processes have counted. A collective: every process calls
        it.

        Args:
            device (torch.device | None): One that the process group communicates on.

        Returns:
            float | None: The lower edge of a bin, the lowest if several are as good, the same in
            all processes; ``None`` unless there are values of both classes.
        """
        own = torch.zeros(2, _BINS, dtype=torch.int64) if self._counts is None else self._counts
        counts = summed(own.to(device))
        used = counts.sum(0).nonzero().flatten()
        negatives, positives = (
            counts[:, used].flip(1).cumsum(1).flip(1).double()
        )  # in each bin and above
        if not used.numel() or not float(negatives[0]) or not float(positives[0]):
            return None
        f1 = 2.0 * positives / (positives + negatives + positives[0])
        best = int(used[int((f1 == f1.max()).nonzero()[0])])
        return 0.0 if best == 0 else float(_edge(best))

    def reset(self) -> None:
        """Forget all values."""
        self._counts = None


def _edge(number: int) -> Tensor:
    """Smallest number in a bin."""
    return torch.tensor((number + _FIRST) << _DROPPED, dtype=torch.int32).view(torch.float32)
