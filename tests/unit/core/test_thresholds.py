"""Thresholds: the rate of false alarms is what was asked for, and separated scores are separated."""

import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import binom
from sklearn.metrics import f1_score

from anomalib_sgfr.core.thresholds import (
    LEAST_RATE,
    alarm_threshold,
    combined_threshold,
    dividing_threshold,
    few_units_warning,
    require_rate,
    supported_rate,
    units_needed,
)


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
    assert alarm_threshold([3.0] * 10, 0.01) == 3.0


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
        ([1.0], 1e-310, "not below 1e-06"),
        ([1.0], math.nan, "rate"),
        ([1e300], 0.1, "needs finite"),
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
    threshold = dividing_threshold(good.tolist(), defective.tolist())
    assert threshold == pytest.approx((good.max() + defective.min()) / 2, rel=1e-7)


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
    scores = sorted(np.random.default_rng(number).exponential(size=number).astype(np.float32).tolist())
    found = alarm_threshold(scores[::-1], float(share))
    rank = math.ceil((number + 1) * (1 - share))
    if rank <= number:
        assert found == scores[rank - 1]
        return
    most = max(round(number / 4), 1)
    tail, base = scores[number - most :], scores[max(number - most - 1, 0)]
    mean_excess = sum(score - base for score in tail) / len(tail)
    expected = base + mean_excess * math.log(len(tail) / (number + 1) / float(share))
    assert found == pytest.approx(max(expected, scores[-1]), rel=2e-7)


def test_of_equal_f1_the_one_with_the_fewest_alarms_is_chosen_half_way_to_the_next() -> None:
    # above 4: 1 of 2, no alarm; above 0: 2 of 2, 2 alarms; both 2/3
    assert dividing_threshold([2.0, 3.0], [1.0, 5.0]) == 4.0
    # no number lies between: the lower one itself, which is no alarm then
    below = float(np.nextafter(np.float32(5.0), np.float32(0.0)))
    assert dividing_threshold([below], [5.0]) == below
    assert dividing_threshold([1.0, below], [0.5, 5.0, 6.0]) == below


# Scores as they are compared: 32-bit numbers, the smallest and the largest among them.

FLOATS = st.floats(width=32, min_value=0.0, allow_nan=False, allow_infinity=False)
CLOSE = st.integers(0, 6).map(lambda steps: float(np.float32(1.0) + steps * np.spacing(np.float32(1.0))))
SMALL = st.integers(0, 6).map(lambda steps: float(steps * np.float32(1e-45)))
SCORES = st.one_of(*(st.lists(numbers, min_size=1, max_size=12) for numbers in (FLOATS, CLOSE, SMALL)))
RATES = st.floats(LEAST_RATE, 0.9)


def is_32_bit(threshold: float) -> bool:
    return math.isfinite(threshold) and float(np.float32(threshold)) == threshold


def alarms(scores: list[float], threshold: float) -> int:
    """As everything that knows the threshold counts them."""
    return int((torch.tensor(scores) > torch.tensor(threshold)).sum())


def best_f1(good: list[float], bad: list[float]) -> Fraction:
    def f1(found: int, false: int) -> Fraction:
        return Fraction(2 * found, found + false + len(bad))

    ways = [-math.inf, *good, *bad]
    return max(f1(alarms(bad, way), alarms(good, way)) for way in ways)


@given(SCORES, SCORES)
@example([1.1, 1.3], [1.05, 1.2, 1.4, 1.5])
@example([3.0], [2.5])
@example([1.0], [float(np.nextafter(np.float32(1.0), np.float32(2.0)))])
@example([1.0 + 2**-23], [1.0 + 2**-22])
@example([0.0], [0.0])
@example([3.4028234663852886e38], [3.4028234663852886e38])
def test_no_threshold_has_a_larger_f1_where_scores_are_compared(good: list[float], bad: list[float]) -> None:
    threshold = dividing_threshold(good, bad)
    assert is_32_bit(threshold)
    found, false = alarms(bad, threshold), alarms(good, threshold)
    assert Fraction(2 * found, found + false + len(bad)) == best_f1([*map(np.float32, good)], [*map(np.float32, bad)])


@given(SCORES, RATES)
def test_the_statistic_is_the_smallest_score_that_few_enough_exceed(scores: list[float], rate: float) -> None:
    threshold = alarm_threshold(scores, rate)
    assert is_32_bit(threshold)
    allowed = math.floor(Fraction(rate) * (len(scores) + 1) + Fraction(1, 10**9))  # a new one's rank among them
    if allowed == 0:
        assert alarms(scores, threshold) == 0
        return
    assert alarms(scores, threshold) < allowed
    lower = [score for score in scores if score < threshold]
    assert not lower or alarms(scores, max(lower)) >= allowed


@given(SCORES, RATES)
def test_the_extrapolation_is_rounded_up(scores: list[float], rate: float) -> None:
    number = len(scores)
    if Fraction(rate) * (number + 1) >= 1:
        return
    ordered = sorted(np.float32(scores).astype(float).tolist())
    most = max(round(number / 4), 1)
    tail, base = ordered[number - most :], ordered[max(number - most - 1, 0)]
    excess = sum(score - base for score in tail) / len(tail)
    exact = max(base + excess * math.log(len(tail) / (number + 1) / rate), ordered[-1])
    threshold = alarm_threshold(scores, rate)
    largest = float(np.finfo(np.float32).max)
    assert threshold >= min(exact * (1.0 - 1e-12), largest)
    assert threshold <= min(float(np.nextafter(np.float32(min(exact, largest)), np.float32(np.inf))), largest)


@pytest.mark.parametrize("rate", [0.0, 1e-310, 1e-7, 1.0, math.nan])
def test_a_rate_that_nothing_supports_is_refused_by_name(rate: float) -> None:
    for refused in (units_needed, lambda rate: alarm_threshold([1.0], rate), lambda rate: few_units_warning(9, rate)):
        with pytest.raises(ValueError, match="rate must lie between 0 and 1, and not below 1e-06"):
            refused(rate)
    with pytest.raises(ValueError, match=r"^false_alarm_rate must"):
        require_rate(rate, "false_alarm_rate")


# Too few good images are said.


@pytest.mark.parametrize(
    ("units", "rate", "sentence"),
    [
        (0, 0.01, "0 images: the true rate may be up to 100%; 1% needs 299"),
        (1, 0.01, "1 image: the true rate may be up to 95%; 1% needs 299"),
        (16, 0.05, "16 images: the true rate may be up to 17%; 5% needs 59"),
        (29, 0.05, "29 images: the true rate may be up to 9.8%; 5% needs 59"),
        (30, 0.05, None),
        (20, 0.2, "20 images: the true rate may be up to 34%; 20% needs 30"),
        (98, 0.01, "98 images: the true rate may be up to 3%; 1% needs 299"),
        (99, 0.01, None),
        (200, 0.01, None),
        (998, 0.001, "998 images: the true rate may be up to 0.3%; 0.1% needs 2995"),
        (999, 0.001, None),
    ],
)
def test_too_few_units_are_warned_of_in_one_sentence(units: int, rate: float, sentence: str | None) -> None:
    assert few_units_warning(units, rate) == sentence


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.1, 0.2, 0.5])
def test_the_bound_that_is_named_is_kept_by_19_of_20_calibrations(rate: float) -> None:
    rng = np.random.default_rng(0)
    for units in (5, 16, 29):
        sentence = few_units_warning(units, rate)
        assert sentence is not None
        bound = float(sentence.split("up to ")[1].split("%")[0]) / 100
        true = [1.0 - alarm_threshold(scores, rate) for scores in rng.uniform(size=(2000, units))]
        if rate * (units + 1) >= 1:  # an order statistic: the bound is exact
            assert np.mean(np.array(true) > bound) == pytest.approx(0.05, abs=0.02)
        else:  # extrapolated: lower still
            assert np.mean(np.array(true) > bound) <= 0.06


# Who decides, where there are labels.


def test_two_good_and_three_defective_images_do_not_overrule_the_good_ones() -> None:
    """As it was: the threshold went up to 26, and two visible defects became good."""
    good = np.random.default_rng(0).normal(6.0, 1.0, 100).astype(np.float32).tolist()
    held_out, bad = [7.9, 26.0], [12.0, 27.0, 30.0]
    decision = combined_threshold(good=held_out, bad=bad, calibration=good, rate=0.01)
    assert decision == (alarm_threshold(good, 0.01), "good")
    assert decision.threshold < 12.0


def test_without_labels_of_both_kinds_good_images_decide() -> None:
    calibration = [1.0, 2.0, 3.0]
    for good, bad in (([], []), ([2.0], []), ([], [9.0] * 50)):
        decision = combined_threshold(good=good, bad=bad, calibration=calibration, rate=0.1)
        assert decision == (alarm_threshold(calibration, 0.1), "good")
