"""Thresholds of scores and maps, and the normalisation of scores by a threshold.

Scores are compared as 32-bit numbers, and every threshold is one; a score that exceeds it is an
alarm. Images that are not independent, such as those of one part, are one group: rates and
confidence bounds count groups, and the images of a group share its weight.
"""

import math
from collections.abc import Hashable, Sequence
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from scipy.special import bdtr, bdtri
from torch import Tensor

from anomalib_sgfr.core.processes import summed

__all__ = [
    "LEAST_GROUPS",
    "LEAST_RATE",
    "Decision",
    "StreamingF1Threshold",
    "combined_threshold",
    "conformal_threshold",
    "describe_rate",
    "f1_threshold",
    "few_groups_warning",
    "groups_needed",
    "normalise",
    "rate_bound",
    "raw_ratio",
    "require_rate",
    "with_margin",
]

_CONFIDENCE = 0.95
LEAST_RATE = 1e-6  # false-alarm rate: no number of images that anybody has supports a smaller one
LEAST_GROUPS = 30  # below it a threshold from good images alone is uncertain at any rate
_TAIL = 0.25  # share of the largest scores that a tail is fitted to
_BOUND_TAIL = (1.0 - _CONFIDENCE) / 2.0  # of each of two bounds that hold together
_CONTRADICTION = 0.01  # probability below which alarms among good images contradict a rate
_ROUNDING = 1e-9  # of sums of shares; far below the least rate
_LARGEST = float(np.finfo(np.float32).max)
# relative; computing in another order or precision changes a score by less
_MARGIN = 1e-3
# a bin of pixels' values: the 2^9 32-bit numbers of one exponent and first 14 bits of the fraction
_DROPPED_BITS, _FRACTION_BITS = 9, 14
_LOWEST, _OCTAVES = -32, 64
_BINS = _OCTAVES << _FRACTION_BITS
_FIRST = (127 + _LOWEST) << _FRACTION_BITS


def conformal_threshold(
    scores: Sequence[float], rate: float, groups: Sequence[Hashable] | None = None
) -> float:
    """Threshold that a new nominal score exceeds with at most a given probability.

    With at least ``1 / rate - 1`` groups this is the order statistic of split conformal prediction
    (Vovk et al. 2005), which holds for exchangeable scores of any distribution; scores of one group
    share its weight (Dunn, Wasserman & Ramdas 2022, pooling CDFs). With fewer groups an exponential
    tail through the largest quarter is extrapolated beyond the largest score, and rounded up.

    Args:
        scores (Sequence[float]): Scores of nominal images.
        rate (float): Probability of a false alarm, from 1e-6 up, below one.
        groups (Sequence[Hashable] | None): Group of each score; ``None`` if each is its own.

    Returns:
        float: The threshold, a 32-bit number.

    Raises:
        ValueError: If there is no score, one is not finite in 32 bits, ``rate`` is out of range, or
            groups and scores differ in number.
    """
    require_rate(rate)
    values = _require_finite("conformal_threshold", scores).astype(np.float64)
    numbers = _group_numbers("conformal_threshold", values, groups)
    number = int(numbers.max()) + 1
    order = values.argsort(kind="stable")
    ordered = values[order]
    weight = 1.0 / (np.bincount(numbers)[numbers[order]] * (number + 1))
    below = weight.cumsum()
    enough = np.flatnonzero(below >= 1.0 - rate - _ROUNDING)
    if len(enough):
        return float(ordered[enough[0]])
    # too few groups: the tail is the uppermost quarter of them, by weight, and at least one
    exceeding = max(round(_TAIL * number), 1) / (number + 1)
    tail = below[-1] - below < exceeding - _ROUNDING
    base = ordered[~tail][-1] if not tail.all() else ordered[0]
    share = weight[tail].sum()
    excess = (weight[tail] * (ordered[tail] - base)).sum() / share
    # not below the largest score: no larger rate has a threshold above it
    return _rounded_up(max(float(base + excess * math.log(share / rate)), float(ordered[-1])))


def f1_threshold(good: Sequence[float], bad: Sequence[float]) -> float:
    """Threshold with the largest F1 score between nominal and defective scores.

    It lies half-way between the score with the largest F1, the largest of equal ones, and the next
    lower score. anomalib takes the score itself.

    Args:
        good (Sequence[float]): Scores of nominal images.
        bad (Sequence[float]): Scores of defective images.

    Returns:
        float: The threshold, a 32-bit number.

    Raises:
        ValueError: If there is none of either, or one is not finite in 32 bits.
    """
    nominal, defective = _require_finite("f1_threshold", good), _require_finite("f1_threshold", bad)
    values = np.unique(np.concatenate((nominal, defective)))
    found = len(defective) - np.searchsorted(np.sort(defective), values)
    alarms = len(nominal) - np.searchsorted(np.sort(nominal), values)
    f1 = 2 * found / (found + alarms + len(defective))
    best = int(np.flatnonzero(f1 == f1.max())[-1])
    if best == 0:
        return float(np.nextafter(values[0], np.float32(-np.inf)))
    return _between(values[best - 1], values[best])


def with_margin(threshold: float, scores: Sequence[float]) -> float:
    """Threshold moved above the score that it equals, so that rounding changes no label.

    An order statistic is the score of an image, which another order of operations gives a little
    more or less of. A larger threshold keeps what :func:`conformal_threshold` guarantees.

    Args:
        threshold (float): A 32-bit number.
        scores (Sequence[float]): Scores that it was chosen from.

    Returns:
        float: The threshold itself if it equals no score; otherwise 0.1% above it, or half-way to
        the next larger score where that is nearer.

    Raises:
        ValueError: If there is no score, or one is not finite in 32 bits.
    """
    values = _require_finite("with_margin", scores)
    if threshold <= 0.0 or not (values == np.float32(threshold)).any():
        return threshold
    moved = min(np.float32(threshold * (1.0 + _MARGIN)), np.float32(_LARGEST))
    above = values[values > np.float32(threshold)]
    if len(above):
        moved = min(moved, np.float32(_between(np.float32(threshold), above.min())))
    return float(moved)


class Decision(NamedTuple):
    """A threshold and the images that set it.

    Attributes:
        threshold (float): A 32-bit number.
        by (Literal["good", "labels"]): ``"good"`` for good images at a false-alarm rate,
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
    groups: Sequence[Hashable] | None = None,
    good_groups: Sequence[Hashable] | None = None,
    bad_groups: Sequence[Hashable] | None = None,
    alarm_cost: float = 2.0,
) -> Decision:
    """Conformal threshold, unless labelled images show that another one is better.

    1. Good images set it: :func:`conformal_threshold` of ``calibration``.
    2. Good images that were not trained on may raise it. Where more of ``good`` are alarms than the
       rate explains with a probability of 1% (exact binomial test), it rises until that is no
       longer so. One alarm among good images is never enough at a rate of 1%.
    3. Defective images may lower it, if both kinds are labelled. A lower threshold has a gain, the
       share of ``bad`` that it finds in addition, and a loss, the share of ``calibration``, or of
       ``good`` if larger, that it makes alarms. It is better if the gain exceeds ``alarm_cost``
       times the loss with 95% confidence, by exact bounds of 97.5% each (Clopper & Pearson 1934):
       a lower bound of the gain, an upper one of the loss of ``calibration``. The threshold with
       the largest difference is taken, of equals the highest. At a cost of one the difference is a
       lower bound of Youden's index (Youden 1950); a larger cost avoids the many false alarms that
       some validation sets would cause.

    ``benchmarks/threshold_rules.py`` compares this rule with others.

    Args:
        good (Sequence[float]): Scores of good validation images, not trained on; may be empty.
        bad (Sequence[float]): Scores of defective validation images; may be empty.
        calibration (Sequence[float]): Scores of all good images: training images, scored
            leave-one-group-out, and those in ``good``.
        rate (float): False-alarm rate, see :func:`conformal_threshold`.
        groups (Sequence[Hashable] | None): Group of each score in ``calibration``; ``None`` if each
            is its own, as in the next two.
        good_groups (Sequence[Hashable] | None): Groups of ``good``.
        bad_groups (Sequence[Hashable] | None): Groups of ``bad``.
        alarm_cost (float): Share of missed defects that a share of false alarms counts as, one at
            least.

    Returns:
        Decision: The threshold; set by good images (steps 1 and 2) or labels (step 3).

    Raises:
        ValueError: If ``calibration`` is empty, a score is not finite in 32 bits, ``rate`` or
            ``alarm_cost`` is out of range, or groups and scores differ in number.
    """
    if not 1.0 <= alarm_cost < math.inf:
        msg = f"alarm_cost must be a number, 1 at least, got {alarm_cost}."
        raise ValueError(msg)
    threshold = conformal_threshold(calibration, rate, groups)
    if len(good) == 0:
        return Decision(threshold, "good")
    held_out = _Weighted.of("good", good, good_groups)
    threshold = max(threshold, _least_uncontradicted(held_out, rate))
    if len(bad) == 0:
        return Decision(threshold, "good")
    nominal = _Weighted.of("calibration", calibration, groups)
    defective = _Weighted.of("bad", bad, bad_groups)
    lower = _better_threshold(threshold, held_out, defective, nominal, alarm_cost)
    return Decision(threshold, "good") if lower is None else Decision(lower, "labels")


class _Weighted(NamedTuple):
    """Ascending scores, the weights of those from each on and a final zero, and group count."""

    scores: NDArray[np.float32]
    weights: NDArray[np.float64]
    groups: int

    @classmethod
    def of(
        cls, name: str, scores: Sequence[float], groups: Sequence[Hashable] | None
    ) -> "_Weighted":
        """Scores with the weights of their groups."""
        values = _require_finite(name, scores)
        numbers = _group_numbers(name, values, groups)
        order = values.argsort(kind="stable")
        weights = (1.0 / np.bincount(numbers))[numbers[order]]
        from_each_on = np.append(weights[::-1].cumsum()[::-1], 0.0)
        return cls(values[order], from_each_on, int(numbers.max()) + 1)

    def above(self, thresholds: ArrayLike) -> NDArray[np.float64]:
        """Number of groups that exceed each threshold, in fractions where images of one do."""
        first = np.searchsorted(self.scores, np.asarray(thresholds, np.float32), side="right")
        return self.weights[first]


def _least_uncontradicted(good: _Weighted, rate: float) -> float:
    """Smallest score that no more groups exceed than the rate explains; minus infinity for all."""
    chances = bdtr(np.arange(good.groups + 1.0), good.groups, rate)  # of so many alarms or fewer
    alarms = int((chances > 1.0 - _CONTRADICTION + _ROUNDING).argmax())
    if alarms >= good.groups:
        return -math.inf
    return float(good.scores[good.above(good.scores) < alarms + 1 - _ROUNDING][0])


def _better_threshold(
    threshold: float, good: _Weighted, bad: _Weighted, nominal: _Weighted, cost: float
) -> float | None:
    """Lower threshold whose gain exceeds its loss most; ``None`` if none does."""
    values = np.unique(np.concatenate((good.scores, bad.scores, nominal.scores)))
    indices = np.unique(np.searchsorted(values, bad.scores))
    below = np.where(indices > 0, values[indices - 1], np.nextafter(values[0], np.float32(-np.inf)))
    lower = np.array([_between(*pair) for pair in zip(below, values[indices], strict=True)])
    lower = lower[lower < threshold][::-1]
    found, alarms, seen = (
        part.above(lower) - part.above(threshold) for part in (bad, nominal, good)
    )
    found, alarms = np.floor(found + _ROUNDING), np.ceil(alarms - _ROUNDING)
    # the difference without confidence bounds is never smaller than with them
    possible = found / bad.groups - cost * np.maximum(alarms / nominal.groups, seen / good.groups)
    best, chosen = 0.0, None
    for index in possible.argsort(kind="stable")[::-1]:
        if possible[index] <= best:
            break
        gain = 1.0 - _upper_bound(bad.groups - int(found[index]), bad.groups, _BOUND_TAIL)
        loss = max(
            _upper_bound(int(alarms[index]), nominal.groups, _BOUND_TAIL), seen[index] / good.groups
        )
        difference = gain - cost * loss
        is_higher = chosen is not None and lower[index] > chosen
        if difference > best or (difference == best and is_higher):
            best, chosen = difference, float(lower[index])
    return chosen


class StreamingF1Threshold:
    """Threshold with the largest F1 score of the pixels of a validation set.

    Values are counted in bins from ``2**-32`` to ``2**32``, whose edges are a factor of at most
    ``1 + 2**-14`` (0.006%) apart. Smaller values are in the first bin, larger ones and NaN in the
    last. The counts take 16 MiB from the first :meth:`update` to :meth:`reset`.
    """

    def __init__(self) -> None:
        self._counts: Tensor | None = None

    def update(self, values: Tensor, positive: Tensor) -> None:
        """Count values.

        Args:
            values (Tensor): Any shape, floating point.
            positive (Tensor): Whether each is defective; the same number of elements.

        Raises:
            ValueError: If the numbers of elements differ.
        """
        if values.numel() != positive.numel():
            msg = (
                f"positive must have as many elements as values, {values.numel()}, got"
                f" {positive.numel()}."
            )
            raise ValueError(msg)
        bits = values.detach().flatten().float().view(torch.int32)
        bins = ((bits >> _DROPPED_BITS) - _FIRST).clamp(0, _BINS - 1).long()
        both = torch.bincount(bins + _BINS * positive.flatten().bool(), minlength=2 * _BINS)
        counts = both.view(2, _BINS)
        self._counts = (
            counts if self._counts is None else self._counts + counts.to(self._counts.device)
        )

    def compute(self, device: torch.device | None = None) -> float | None:
        """Threshold from the counts of all processes. A collective call.

        Args:
            device (torch.device | None): One that the process group communicates on.

        Returns:
            float | None: The lowest of the best bins' lower edges, the same in all processes;
            ``None`` unless there are values of both classes.
        """
        own = torch.zeros(2, _BINS, dtype=torch.int64) if self._counts is None else self._counts
        counts = summed(own.to(device))
        used = counts.sum(0).nonzero().flatten()
        # in each bin and above
        negatives, positives = counts[:, used].flip(1).cumsum(1).flip(1).double()
        if not used.numel() or not float(negatives[0]) or not float(positives[0]):
            return None
        f1 = 2.0 * positives / (positives + negatives + positives[0])
        best = int(used[int((f1 == f1.max()).nonzero()[0])])
        lower_edge = torch.tensor((best + _FIRST) << _DROPPED_BITS, dtype=torch.int32)
        return 0.0 if best == 0 else float(lower_edge.view(torch.float32))

    def reset(self) -> None:
        """Forget all values."""
        self._counts = None


def normalise(raw: Tensor, threshold: Tensor, power: float) -> Tensor:
    """Scores or maps normalised to values between zero and one: ``s^p / (s^p + t^p)``.

    The threshold ``t`` becomes 0.5, and the order of scores is kept. With a power of 2 and in 32
    bits, a score that is 5% larger stays larger up to 1,000 times ``t``, one that is 1% larger up
    to 500 times; from 6,000 times on all are 1.

    Args:
        raw (Tensor): Raw scores or maps, any shape.
        threshold (Tensor): Raw threshold, a scalar.
        power (float): The exponent ``p``.

    Returns:
        Tensor: Of the same shape.
    """
    # the threshold may be zero where all nominal scores are; shares overflow in no precision
    bound = threshold.clamp_min(torch.finfo(threshold.dtype).tiny)
    share, rest = raw / (raw + bound), bound / (raw + bound)
    if power != 1.0:
        share = share**power / (share**power + rest**power)
    # rounding must not move a score to the other side of 0.5
    above = share.clamp_min(0.5 + torch.finfo(share.dtype).eps)
    return torch.where(raw > threshold, above, share.clamp_max(0.5))


def raw_ratio(normalised: float, power: float) -> float:
    """Ratio of a raw score to the threshold, from what :func:`normalise` makes of the score."""
    return (normalised / (1.0 - normalised)) ** (1.0 / power) if normalised < 1 else math.inf


def groups_needed(rate: float) -> int:
    """Number of independent nominal groups that support a false-alarm rate at 95% confidence.

    Args:
        rate (float): The rate, from 1e-6 up, below one.

    Returns:
        int: The number, at least one.

    Raises:
        ValueError: If the rate is out of range.
    """
    require_rate(rate)
    return math.ceil(math.log(1.0 - _CONFIDENCE) / math.log1p(-rate))


def rate_bound(groups: int, rate: float) -> float:
    """Upper bound, at 95% confidence, of the rate at which new nominal groups exceed a threshold.

    It is exact for the order statistic of :func:`conformal_threshold`: the rate of scores beyond
    the r-th largest of n has the distribution Beta(r, n + 1 - r) (Vovk 2012). Where a tail is
    extrapolated, the rate is lower still.

    Args:
        groups (int): Number of independent good groups that the threshold is calibrated on.
        rate (float): False-alarm rate that it was chosen for, from 1e-6 up, below one.

    Returns:
        float: The bound; 1 for no group.

    Raises:
        ValueError: If the rate is out of range.
    """
    require_rate(rate)
    # scores that calibration leaves above the threshold
    alarms = max(math.floor((groups + 1) * (rate + _ROUNDING)) - 1, 0)
    return _upper_bound(alarms, groups)


def describe_rate(groups: int, rate: float) -> str:
    """Say what is known of the false-alarm rate of a threshold, in the same words everywhere.

    Args:
        groups (int): As for :func:`rate_bound`.
        rate (float): As for :func:`rate_bound`.

    Returns:
        str: The bound, and with too few groups (:func:`few_groups_warning`) how many would show the
        rate, without a full stop.

    Raises:
        ValueError: If the rate is out of range.
    """
    bound = _percent(rate_bound(groups, rate))
    known = f"at {_CONFIDENCE:.0%} confidence the real false-alarm rate is {bound} or less"
    if not _are_too_few(groups, rate):
        return known
    needed = max(LEAST_GROUPS, groups_needed(rate))
    return f"{known}; {needed} images without an alarm would show {_percent(rate)} or less"


def few_groups_warning(groups: int, rate: float) -> str | None:
    """Warning that good images are too few for a threshold at a false-alarm rate.

    It is given below 30 groups, and where the threshold is extrapolated: at 1% below 99 groups.

    Args:
        groups (int): As for :func:`rate_bound`.
        rate (float): As for :func:`rate_bound`.

    Returns:
        str | None: One sentence without a full stop, or ``None`` where there are enough.

    Raises:
        ValueError: If the rate is out of range.
    """
    require_rate(rate)
    if not _are_too_few(groups, rate):
        return None
    images = "1 good image" if groups == 1 else f"{groups} good images"
    return f"{images}: {describe_rate(groups, rate)}"


def _are_too_few(groups: int, rate: float) -> bool:
    return groups < max(LEAST_GROUPS, 1.0 / rate - 1.0 - _ROUNDING)


def require_rate(rate: float, name: str = "rate") -> None:
    """Refuse a value that is not a false-alarm rate.

    Args:
        rate (float): The rate.
        name (str): Name of the argument, for the message.

    Raises:
        ValueError: If the rate is not a number from 1e-6 up, below one.
    """
    if not LEAST_RATE <= rate < 1.0:
        msg = f"{name} must lie between 0 and 1, and not below {LEAST_RATE:g}, got {rate:g}."
        raise ValueError(msg)


def _require_finite(name: str, scores: ArrayLike) -> NDArray[np.float32]:
    """Scores as 32-bit numbers, of which there must be one, and all finite."""
    with np.errstate(over="ignore"):
        values = np.asarray(scores).astype(np.float32)
    if len(values) == 0 or not np.isfinite(values).all():
        msg = f"{name} needs finite scores, got {len(values)}."
        raise ValueError(msg)
    return values


def _group_numbers(
    name: str, scores: NDArray[np.floating[Any]], groups: Sequence[Hashable] | None
) -> NDArray[np.int64]:
    """Number of the group of each score."""
    if groups is None:
        return np.arange(len(scores))
    if len(groups) != len(scores):
        msg = f"{name} needs a group for each score, got {len(groups)} for {len(scores)}."
        raise ValueError(msg)
    numbers = {group: number for number, group in enumerate(dict.fromkeys(groups))}
    return np.array([numbers[group] for group in groups])


def _between(low: np.float32, high: np.float32) -> float:
    """32-bit number half-way between two: at or above the lower and below the higher one."""
    middle = np.float32((float(low) + float(high)) / 2.0)
    return float(middle if middle < high else low)


def _rounded_up(value: float) -> float:
    """Smallest 32-bit number that is not below a value, or the largest one."""
    if value >= _LARGEST:
        return _LARGEST
    nearest = np.float32(value)
    return float(nearest if float(nearest) >= value else np.nextafter(nearest, np.float32(np.inf)))


def _upper_bound(alarms: int, groups: int, tail: float = 1.0 - _CONFIDENCE) -> float:
    """Largest rate that gives so few alarms with a probability of ``tail`` (Clopper & Pearson)."""
    return float(bdtri(alarms, groups, tail)) if alarms < groups else 1.0


def _percent(share: float) -> str:
    return f"{100.0 * share:.2g}%" if share < 0.995 else "100%"  # noqa: PLR2004  # not 1e+02
