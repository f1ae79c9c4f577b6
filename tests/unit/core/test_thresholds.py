"""Thresholds: the rate of false alarms is what was asked for, and separated scores are separated."""

import math
from fractions import Fraction

import numpy as np
import pytest
from scipy.stats import binom
from sklearn.metrics import f1_score

from anomalib_sgfr.core.thresholds import alarm_threshold, dividing_threshold, supported_rate, units_needed


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("spread", [0.1, 1.5])
def test_the_realised_rate_is_at_most_the_chosen(rate: float, spread: float) -> None:
    rng = np.random.default_rng(0)
    realised = []
    for _ in range(200):
        scores = np.exp(spread * rng.normal(size=250))
        realised.append(np.mean(np.exp(spread * rng.normal(size=1000)) > alarm_threshold(scores, rate)))
    assert np.mean(realised) <= 1.1 * rate
    assert np.mean(realised) >= 0.7 * rate  # and no more timid than it must be


def test_too_few_scores_are_extrapolated() -> None:
    scores = np.random.default_rng(0).exponential(size=40)
    one_in_a_hundred, one_in_a_thousand = (alarm_threshold(scores, rate) for rate in (0.01, 0.001))
    assert scores.max() < one_in_a_thousand
    assert one_in_a_hundred < one_in_a_thousand
    assert one_in_a_thousand == pytest.approx(-np.log(0.001), rel=0.4)
    assert np.isfinite(alarm_threshold([3.0], 0.01))
    assert alarm_threshold([3.0] * 10, 0.01) == pytest.approx(3.0)


@pytest.mark.parametrize("number", [1, 2, 5, 19, 40])
def test_a_smaller_rate_never_lowers_the_threshold(number: int) -> None:
    rates = np.geomspace(1e-4, 0.9, 60).tolist()
    for seed in range(50):
        scores = np.random.default_rng(seed).normal(10.0, 1.0, size=number).tolist()
        thresholds = [alarm_threshold(scores, rate) for rate in rates]
        assert thresholds == sorted(thresholds, reverse=True)


@pytest.mark.parametrize(
    ("scores", "rate", "message"),
    [
        ([], 0.1, "needs finite"),
        ([1.0, np.nan], 0.1, "needs finite"),
        ([1.0], 0.0, "between 0 and 1"),
        ([1.0], 1.0, "rate"),
    ],
)
def test_bad_input_is_refused(scores: list[float], rate: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        alarm_threshold(scores, rate)


def test_pictures_of_one_part_have_the_weight_of_one() -> None:
    """The rate is kept among new parts, though a part's pictures resemble each other."""
    rng = np.random.default_rng(0)

    def parts(number: int) -> tuple[np.ndarray, np.ndarray]:
        sizes = rng.choice([1, 2, 12], size=number)
        units = np.repeat(np.arange(number), sizes)
        level = rng.normal(size=number) - (sizes == 12)  # what is photographed often is nothing unusual
        return level[units] + 0.1 * rng.normal(size=len(units)), units

    by_unit, by_image = [], []
    for _ in range(300):
        scores, units = parts(60)
        new, new_units = parts(400)
        weight = 1.0 / np.bincount(new_units)[new_units]
        for realised, threshold in (
            (by_unit, alarm_threshold(scores, 0.05, units.tolist())),
            (by_image, alarm_threshold(scores, 0.05)),
        ):
            realised.append(np.average(new > threshold, weights=weight))
    assert 0.03 <= np.mean(by_unit) <= 0.055
    assert np.mean(by_image) > 0.08


@pytest.mark.parametrize("number", [1, 3, 5, 40, 250])
@pytest.mark.parametrize("rate", [1e-4, 0.01, 0.3])
def test_saying_everything_thrice_changes_nothing(number: int, rate: float) -> None:
    scores = np.random.default_rng(number).normal(10.0, 1.0, size=number).tolist()
    thrice = alarm_threshold(scores * 3, rate, list(range(number)) * 3)
    assert thrice == pytest.approx(alarm_threshold(scores, rate))


def test_units_and_scores_must_be_equally_many() -> None:
    with pytest.raises(ValueError, match="a unit for each score, got 1 for 2"):
        alarm_threshold([1.0, 2.0], 0.1, ["a"])


@pytest.mark.parametrize(("rate", "units"), [(0.1, 29), (0.05, 59), (0.02, 149), (0.01, 299)])
def test_so_many_units_support_a_rate(rate: float, units: int) -> None:
    assert units_needed(rate) == units
    assert binom.cdf(0, units, rate) <= 0.05 < binom.cdf(0, units - 1, rate)
    assert supported_rate(units) <= rate < supported_rate(units - 1)
    assert supported_rate(0) == 1.0


@pytest.mark.parametrize("bad", [1, 4, 30])
def test_separated_scores_are_separated(bad: int) -> None:
    rng = np.random.default_rng(bad)
    good, defective = rng.uniform(1.0, 2.0, 20), rng.uniform(3.0, 9.0, bad)
    assert dividing_threshold(good.tolist(), defective.tolist()) == (good.max() + defective.min()) / 2


def test_overlapping_scores_are_divided_at_the_largest_f1() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        good, bad = rng.integers(0, 12, rng.integers(1, 20)), rng.integers(4, 20, rng.integers(1, 20))
        scores, truth = np.concatenate((good, bad)), np.repeat([0, 1], (len(good), len(bad)))
        best = max(f1_score(truth, scores > value - 0.5, zero_division=0) for value in scores)
        threshold = dividing_threshold(good.tolist(), bad.tolist())
        assert f1_score(truth, scores > threshold, zero_division=0) == pytest.approx(best)


def test_equal_scores_are_all_called_anomalous_or_none() -> None:
    for score in (0.0, 1.0, 1e30):
        assert dividing_threshold([score], [score, score]) < score
    with pytest.raises(ValueError, match="finite"):
        dividing_threshold([], [1.0])


@pytest.mark.parametrize("number", [1, 3, 4, 7, 9, 19, 39, 40, 99])
@pytest.mark.parametrize("share", [Fraction(1, 100), Fraction(1, 20), Fraction(1, 10), Fraction(1, 5), Fraction(1, 2)])
def test_the_threshold_is_that_of_the_formula(number: int, share: Fraction) -> None:
    """The order statistic by exact counting; beyond it, an exponential tail by sums written out."""
    scores = sorted(np.random.default_rng(number).exponential(size=number).tolist())
    found = alarm_threshold(scores[::-1], float(share))
    rank = math.ceil((number + 1) * (1 - share))
    if rank <= number:
        assert found == scores[rank - 1]
        return
    most = max(round(number / 4), 1)
    tail, base = scores[number - most :], scores[max(number - most - 1, 0)]
    mean_excess = sum(score - base for score in tail) / len(tail)
    expected = base + mean_excess * math.log(len(tail) / (number + 1) / float(share))
    assert found == pytest.approx(max(expected, scores[-1]), rel=1e-12)


def test_of_equal_f1_the_one_with_the_fewest_alarms_is_chosen_half_way_to_the_next() -> None:
    # above 4: 1 of 2, no alarm; above 0: 2 of 2, 2 alarms; both 2/3
    assert dividing_threshold([2.0, 3.0], [1.0, 5.0]) == 4.0
    # no number lies between: the lower one itself, which is no alarm then
    below = np.nextafter(5.0, 0.0)
    assert dividing_threshold([below], [5.0]) == below
    assert dividing_threshold([1.0, below], [0.5, 5.0, 6.0]) == below
