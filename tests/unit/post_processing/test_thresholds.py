"""Thresholds keep the rate of false alarms, and separate separated scores."""

import math
from collections import Counter
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from scipy.stats import beta, binom
from sklearn.metrics import f1_score

from anomalib_sgfr.post_processing.thresholds import (
    LEAST_RATE,
    combined_threshold,
    conformal_threshold,
    f1_threshold,
    few_groups_warning,
    groups_needed,
    rate_bound,
    require_rate,
    with_margin,
)


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.2])
@pytest.mark.parametrize("spread", [0.1, 1.5])
def test_the_realised_rate_is_at_most_the_chosen(rate: float, spread: float) -> None:
    rng = np.random.default_rng(0)
    realised = []
    for _ in range(200):
        scores = np.exp(spread * rng.normal(size=250))
        realised.append(
            np.mean(np.exp(spread * rng.normal(size=1000)) > conformal_threshold(scores, rate))
        )
    assert np.mean(realised) <= 1.1 * rate
    assert np.mean(realised) >= 0.7 * rate  # and the threshold no higher than it must be


def test_too_few_scores_are_extrapolated() -> None:
    scores = np.random.default_rng(0).exponential(size=40)
    one_in_a_hundred, one_in_a_thousand = (
        conformal_threshold(scores, rate) for rate in (0.01, 0.001)
    )
    assert scores.max() < one_in_a_thousand
    assert one_in_a_hundred < one_in_a_thousand
    assert one_in_a_thousand == pytest.approx(-np.log(0.001), rel=0.4)
    assert np.isfinite(conformal_threshold([3.0], 0.01))
    assert conformal_threshold([3.0] * 10, 0.01) == 3.0


@pytest.mark.parametrize("number", [1, 2, 5, 19, 40])
def test_a_smaller_rate_never_lowers_the_threshold(number: int) -> None:
    rates = np.geomspace(1e-4, 0.9, 60).tolist()
    for seed in range(50):
        scores = np.random.default_rng(seed).normal(10.0, 1.0, size=number).tolist()
        thresholds = [conformal_threshold(scores, rate) for rate in rates]
        assert thresholds == sorted(thresholds, reverse=True)


@pytest.mark.parametrize("scores", [[], [1.0, np.nan], [1e300]])
def test_scores_that_are_not_finite_are_refused(scores: list[float]) -> None:
    with pytest.raises(ValueError, match="conformal_threshold needs finite"):
        conformal_threshold(scores, 0.1)


def test_images_of_one_part_have_the_weight_of_one() -> None:
    """The rate is kept among new parts, though images of a part resemble each other."""
    rng = np.random.default_rng(0)

    def parts(number: int) -> tuple[np.ndarray, np.ndarray]:
        sizes = rng.choice([1, 2, 12], size=number)
        groups = np.repeat(np.arange(number), sizes)
        level = rng.normal(size=number) - (sizes == 12)  # parts with many images score low
        return level[groups] + 0.1 * rng.normal(size=len(groups)), groups

    by_group, by_image = [], []
    for _ in range(300):
        scores, groups = parts(60)
        new, new_groups = parts(400)
        weight = 1.0 / np.bincount(new_groups)[new_groups]
        for realised, threshold in (
            (by_group, conformal_threshold(scores, 0.05, groups.tolist())),
            (by_image, conformal_threshold(scores, 0.05)),
        ):
            realised.append(np.average(new > threshold, weights=weight))
    assert 0.03 <= np.mean(by_group) <= 0.055
    assert np.mean(by_image) > 0.08


@pytest.mark.parametrize("number", [1, 3, 5, 40, 250])
@pytest.mark.parametrize("rate", [1e-4, 0.01, 0.3])
def test_three_copies_of_each_score_change_nothing(number: int, rate: float) -> None:
    scores = np.random.default_rng(number).normal(10.0, 1.0, size=number).tolist()
    thrice = conformal_threshold(scores * 3, rate, list(range(number)) * 3)
    assert thrice == pytest.approx(conformal_threshold(scores, rate))


@pytest.mark.parametrize(("rate", "groups"), [(0.1, 29), (0.05, 59), (0.02, 149), (0.01, 299)])
def test_so_many_groups_support_a_rate(rate: float, groups: int) -> None:
    assert groups_needed(rate) == groups
    assert binom.cdf(0, groups, rate) <= 0.05 < binom.cdf(0, groups - 1, rate)
    assert rate_bound(groups, 1e-6) <= rate < rate_bound(groups - 1, 1e-6)
    assert rate_bound(0, rate) == 1.0


@pytest.mark.parametrize("bad", [1, 4, 30])
def test_separated_scores_are_separated(bad: int) -> None:
    rng = np.random.default_rng(bad)
    good, defective = rng.uniform(1.0, 2.0, 20), rng.uniform(3.0, 9.0, bad)
    threshold = f1_threshold(good.tolist(), defective.tolist())
    assert threshold == pytest.approx((good.max() + defective.min()) / 2, rel=1e-7)


def test_overlapping_scores_are_divided_at_the_largest_f1() -> None:
    rng = np.random.default_rng(0)
    for _ in range(100):
        good, bad = (
            rng.integers(0, 12, rng.integers(1, 20)),
            rng.integers(4, 20, rng.integers(1, 20)),
        )
        scores, truth = np.concatenate((good, bad)), np.repeat([0, 1], (len(good), len(bad)))
        best = max(f1_score(truth, scores > value - 0.5, zero_division=0) for value in scores)
        threshold = f1_threshold(good.tolist(), bad.tolist())
        assert f1_score(truth, scores > threshold, zero_division=0) == pytest.approx(best)


def test_equal_scores_are_all_called_anomalous_or_none() -> None:
    for score in (0.0, 1.0, 1e30):
        assert f1_threshold([score], [score, score]) < score
    with pytest.raises(ValueError, match="finite"):
        f1_threshold([], [1.0])


@pytest.mark.parametrize("number", [1, 3, 4, 7, 9, 19, 39, 40, 99])
@pytest.mark.parametrize(
    "share", [Fraction(1, 100), Fraction(1, 20), Fraction(1, 10), Fraction(1, 5), Fraction(1, 2)]
)
def test_the_threshold_is_that_of_the_formula(number: int, share: Fraction) -> None:
    """The order statistic by exact counting; beyond it, an exponential tail by sums written out."""
    scores = sorted(
        np.random.default_rng(number).exponential(size=number).astype(np.float32).tolist()
    )
    found = conformal_threshold(scores[::-1], float(share))
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
    assert f1_threshold([2.0, 3.0], [1.0, 5.0]) == 4.0
    # no number lies between: the lower one itself, which is no alarm then
    below = float(np.nextafter(np.float32(5.0), np.float32(0.0)))
    assert f1_threshold([below], [5.0]) == below
    assert f1_threshold([1.0, below], [0.5, 5.0, 6.0]) == below


# Scores as they are compared: 32-bit numbers, the smallest and the largest among them.

FLOATS = st.floats(width=32, min_value=0.0, allow_nan=False, allow_infinity=False)
CLOSE = st.integers(0, 6).map(
    lambda steps: float(np.float32(1.0) + steps * np.spacing(np.float32(1.0)))
)
SMALL = st.integers(0, 6).map(lambda steps: float(steps * np.float32(1e-45)))
SCORES = st.one_of(
    *(st.lists(numbers, min_size=1, max_size=12) for numbers in (FLOATS, CLOSE, SMALL))
)
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
def test_no_threshold_has_a_larger_f1_where_scores_are_compared(
    good: list[float], bad: list[float]
) -> None:
    threshold = f1_threshold(good, bad)
    assert is_32_bit(threshold)
    found, false = alarms(bad, threshold), alarms(good, threshold)
    assert Fraction(2 * found, found + false + len(bad)) == best_f1(
        [*map(np.float32, good)], [*map(np.float32, bad)]
    )


@given(SCORES, RATES)
def test_the_statistic_is_the_smallest_score_that_few_enough_exceed(
    scores: list[float], rate: float
) -> None:
    threshold = conformal_threshold(scores, rate)
    assert is_32_bit(threshold)
    allowed = math.floor(
        Fraction(rate) * (len(scores) + 1) + Fraction(1, 10**9)
    )  # a new one's rank among them
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
    threshold = conformal_threshold(scores, rate)
    largest = float(np.finfo(np.float32).max)
    assert threshold >= min(exact * (1.0 - 1e-12), largest)
    assert threshold <= min(
        float(np.nextafter(np.float32(min(exact, largest)), np.float32(np.inf))), largest
    )


@pytest.mark.parametrize("rate", [0.0, 1e-310, 1e-7, 1.0, math.nan])
def test_a_rate_that_nothing_supports_is_refused_by_name(rate: float) -> None:
    for refused in (
        groups_needed,
        lambda rate: conformal_threshold([1.0], rate),
        lambda rate: few_groups_warning(9, rate),
    ):
        with pytest.raises(ValueError, match="rate must lie between 0 and 1, and not below 1e-06"):
            refused(rate)
    with pytest.raises(ValueError, match=r"^false_alarm_rate must"):
        require_rate(rate, "false_alarm_rate")


# Warnings of too few good images.


@pytest.mark.parametrize(
    ("groups", "rate", "bound", "needed"),
    [
        (0, 0.01, "100%", "299 images without an alarm would show 1%"),
        (1, 0.01, "95%", "299 images without an alarm would show 1%"),
        (16, 0.05, "17%", "59 images without an alarm would show 5%"),
        (29, 0.05, "9.8%", "59 images without an alarm would show 5%"),
        (30, 0.05, None, None),
        (20, 0.2, "34%", "30 images without an alarm would show 20%"),
        (98, 0.01, "3%", "299 images without an alarm would show 1%"),
        (99, 0.01, None, None),
        (200, 0.01, None, None),
        (998, 0.001, "0.3%", "2995 images without an alarm would show 0.1%"),
        (999, 0.001, None, None),
    ],
)
def test_too_few_groups_are_warned_of_in_one_sentence(
    groups: int, rate: float, bound: str | None, needed: str | None
) -> None:
    images = "good image" if groups == 1 else "good images"
    known = f"at 95% confidence the real false-alarm rate is {bound} or less"
    sentence = bound and f"{groups} {images}: {known}; {needed} or less"
    assert few_groups_warning(groups, rate) == sentence


@pytest.mark.parametrize("rate", [0.01, 0.05, 0.1, 0.2, 0.5])
def test_the_bound_that_is_named_is_kept_by_19_of_20_calibrations(rate: float) -> None:
    rng = np.random.default_rng(0)
    for groups in (5, 16, 29):
        sentence = few_groups_warning(groups, rate)
        assert sentence is not None
        bound = float(sentence.split("rate is ")[1].split("%")[0]) / 100
        true = [
            1.0 - conformal_threshold(scores, rate) for scores in rng.uniform(size=(2000, groups))
        ]
        if rate * (groups + 1) >= 1:  # an order statistic: the bound is exact
            assert np.mean(np.array(true) > bound) == pytest.approx(0.05, abs=0.02)
        else:  # extrapolated: lower still
            assert np.mean(np.array(true) > bound) <= 0.06


# Thresholds with labels.

LABELLED = st.lists(st.integers(0, 30).map(float), min_size=1, max_size=8)


def groups_above(scores: list[float], groups: list[int], threshold: float) -> float:
    size = Counter(groups)
    return sum(
        1 / size[group] for score, group in zip(scores, groups, strict=True) if score > threshold
    )


def benefit(
    lower: float,
    threshold: float,
    good: list[float],
    bad: list[float],
    nominal: list[float],
    groups: list[int],
    cost: float,
) -> float:
    """Of a lower threshold: defects that it finds in addition, less good images that become alarms;
    by bounds.
    """
    found = sum(lower < score <= threshold for score in bad)
    more = groups_above(nominal, groups, lower) - groups_above(nominal, groups, threshold)
    alarms, number = math.ceil(more - 1e-9), len(set(groups))
    gain = beta.ppf(0.025, found, len(bad) - found + 1) if found else 0.0
    loss = beta.ppf(0.975, alarms + 1, number - alarms) if alarms < number else 1.0
    return gain - cost * max(loss, sum(lower < score <= threshold for score in good) / len(good))


@given(
    LABELLED,
    LABELLED,
    st.lists(st.tuples(st.integers(0, 12).map(float), st.integers(0, 40)), max_size=40),
    RATES,
    st.sampled_from([1.0, 2.0, 5.0]),
)
@example([1.0, 2.0], [4.0] * 8, [(3.0, number) for number in range(40)] + [(9.0, 0)], 0.01, 2.0)
def test_the_combined_threshold_is_the_one_of_its_description(
    good: list[float], bad: list[float], training: list[tuple[float, int]], rate: float, cost: float
) -> None:
    nominal = [score for score, _ in training] + good
    groups = [group for _, group in training] + list(range(100, 100 + len(good)))
    decision = combined_threshold(
        good=good, bad=bad, calibration=nominal, rate=rate, groups=groups, alarm_cost=cost
    )
    assert is_32_bit(decision.threshold)
    threshold = conformal_threshold(nominal, rate, groups)
    # as few of the good ones are alarms as the rate explains
    explained = max(
        alarms
        for alarms in range(len(good) + 1)
        if binom.sf(alarms - 1, len(good), rate) >= 0.01 - 1e-9
    )
    if explained < len(good):
        threshold = max(threshold, sorted(good)[len(good) - 1 - explained])
    ways = {
        np.nextafter(np.float32(score), np.float32(-1)).item()
        for score in bad
        if score <= threshold
    }
    benefits = [benefit(way, threshold, good, bad, nominal, groups, cost) for way in ways]
    if decision.by == "good":
        assert decision.threshold == threshold
        assert max(benefits, default=0.0) < 1e-7
    else:
        assert decision.threshold < threshold
        its = benefit(decision.threshold, threshold, good, bad, nominal, groups, cost)
        assert its > 0.0
        assert its >= max(benefits) - 1e-7


def test_two_good_and_three_defective_images_do_not_overrule_the_good_ones() -> None:
    """By labels alone it would lie half-way to three obvious defects, above a fainter one."""
    training = np.random.default_rng(0).normal(6.0, 1.0, 100).astype(np.float32).tolist()
    good, bad, fainter = [7.0, 7.9], [44.0, 46.0, 50.0], 12.0
    assert f1_threshold(good, bad) > fainter
    decision = combined_threshold(good=good, bad=bad, calibration=training + good, rate=0.01)
    assert decision == (conformal_threshold(training + good, 0.01), "good")
    assert decision.threshold < fainter


def test_many_defects_beside_two_good_images_do_not_make_everything_an_alarm() -> None:
    rng = np.random.default_rng(1)
    flooded = []
    for _ in range(50):
        training, good, new = (rng.normal(5.0, 1.0, number).tolist() for number in (300, 2, 1000))
        bad = rng.normal(7.0, 1.5, 20).tolist()
        decision = combined_threshold(good=good, bad=bad, calibration=training + good, rate=0.01)
        assert np.mean(np.array(new) > decision.threshold) < 0.2
        flooded.append(np.mean(np.array(new) > f1_threshold(good, bad)))
    assert max(flooded) > 0.5  # the labels alone do


def test_enough_defects_that_good_images_miss_lower_the_threshold() -> None:
    rng = np.random.default_rng(2)
    training, good = rng.normal(5.0, 0.5, 300).tolist(), rng.normal(5.0, 0.5, 10).tolist()
    calibration = [*training, *good, 9.0, 9.5, 9.0, 9.5]  # a few good images look like defects
    bad = rng.normal(7.5, 0.3, 20).tolist()
    default = conformal_threshold(calibration, 0.01)
    assert default > 8.5
    decision = combined_threshold(good=good, bad=bad, calibration=calibration, rate=0.01)
    assert decision.by == "labels"
    assert max(training) < decision.threshold < np.median(bad)
    # one image more or less, and a label that is wrong, move it little
    for fewer in (bad[1:], bad[:-1], [*bad, 7.0], [*bad, 4.9]):
        other = combined_threshold(good=good, bad=fewer, calibration=calibration, rate=0.01)
        assert other.by == "labels"
        assert other.threshold == pytest.approx(decision.threshold, abs=0.3)


def test_good_images_that_contradict_the_calibration_count() -> None:
    """Of five from a changed camera, one at most is an alarm; one unusual image changes nothing."""
    training = np.random.default_rng(3).normal(5.0, 0.5, 300).tolist()
    shift_images = [12.0, 12.5, 13.0, 13.5, 14.0]
    calibration = training + shift_images
    assert sum(score > conformal_threshold(calibration, 0.01) for score in shift_images) == 2
    assert combined_threshold(good=shift_images, bad=[], calibration=calibration, rate=0.01) == (
        13.5,
        "good",
    )
    for number in (1, 2, 5, 20, 50):
        usual = np.random.default_rng(number).normal(5.0, 0.5, number - 1).tolist()
        calibration = [*training, *usual, 14.0]
        decision = combined_threshold(
            good=[*usual, 14.0], bad=[], calibration=calibration, rate=0.01
        )
        assert decision.threshold == conformal_threshold(calibration, 0.01) < 14.0


def test_copies_of_the_labelled_images_prove_nothing_more() -> None:
    """Ten images of one part count as one: thresholds are those of the parts."""
    rng = np.random.default_rng(4)
    misled = 0
    for _ in range(30):
        training, good, bad = (
            rng.normal(*of).tolist() for of in ((5.0, 0.8, 60), (5.0, 0.8, 3), (6.8, 0.8, 2))
        )
        shared: dict[str, Any] = {"calibration": training + good, "rate": 0.02}
        once = combined_threshold(good=good, bad=bad, **shared)
        copies: dict[str, Any] = {"good": good * 10, "bad": bad * 10, **shared}
        groups = {"good_groups": list(range(3)) * 10, "bad_groups": list(range(2)) * 10}
        assert combined_threshold(**copies, **groups) == once
        misled += once.by == "good" and combined_threshold(**copies).by == "labels"
    assert misled > 0


@pytest.mark.parametrize(("seen", "by"), [(4.5, "labels"), (6.0, "good")])
def test_good_validation_images_that_would_become_alarms_keep_the_threshold(
    seen: float, by: str
) -> None:
    """A fifth of them, though hardly any training image would."""
    training = [*np.linspace(4.0, 5.0, 300).tolist(), *[8.0] * 5]
    good, bad = [4.5] * 16 + [seen] * 4, [5.9] * 12 + [9.0] * 8
    decision = combined_threshold(good=good, bad=bad, calibration=training + good, rate=0.01)
    assert decision.by == by
    assert decision.threshold == (8.0 if by == "good" else pytest.approx(5.45))


@pytest.mark.parametrize(("other", "by"), [(1.0, "labels"), (3.5, "good")])
def test_a_part_of_which_one_image_of_two_becomes_an_alarm_counts_as_one(
    other: float, by: str
) -> None:
    calibration = [*[1.0] * 495, 9.0, 10.0, 11.0, 12.0, 13.0, other]
    groups = [*range(500), 0]
    decision = combined_threshold(
        good=[1.0], bad=[3.0], calibration=calibration, rate=0.01, groups=groups
    )
    assert decision.by == by


def test_without_labels_of_both_kinds_good_images_decide() -> None:
    calibration = [1.0, 2.0, 3.0]
    for good, bad in (([], []), ([2.0], []), ([], [9.0] * 50), ([], [2.5] * 50)):
        decision = combined_threshold(good=good, bad=bad, calibration=calibration, rate=0.1)
        assert decision == (conformal_threshold(calibration, 0.1), "good")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"calibration": []}, "conformal_threshold needs finite"),
        ({"bad": [math.inf]}, "bad needs finite"),
        ({"good": [math.nan]}, "good needs finite"),
        ({"rate": 0.0}, "rate must"),
        ({"alarm_cost": 0.5}, "alarm_cost must be a number, 1 at least"),
        ({"alarm_cost": math.nan}, "alarm_cost must"),
        ({"bad_groups": ["a"]}, "bad needs a group for each score, got 1 for 2"),
        ({"good_groups": ["a"]}, "good needs a group for each score, got 1 for 2"),
        ({"groups": ["a"]}, "needs a group for each score, got 1 for 2"),
    ],
)
def test_bad_labels_are_refused_by_name(changes: dict[str, Any], message: str) -> None:
    arguments = {"good": [1.0, 2.0], "bad": [3.0, 4.0], "calibration": [1.0, 2.0], "rate": 0.1}
    with pytest.raises(ValueError, match=message):
        combined_threshold(**{**arguments, **changes})


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([1.0, 2.0, 3.0], 2.002),  # a thousandth
        ([1.0, 2.0, 2.001], 2.0005),  # half-way to the next
        ([1.0, 2.0], 2.002),
        ([1.0, 3.0], 2.0),  # of no image
        (
            [2.0, float(np.nextafter(np.float32(2.0), np.float32(3.0)))],
            2.0,
        ),  # there is nothing between
    ],
)
def test_a_threshold_is_moved_above_the_score_that_it_equals(
    scores: list[float], expected: float
) -> None:
    found = with_margin(2.0, scores)
    assert found == pytest.approx(expected, rel=1e-6)
    assert found == float(np.float32(found))
    single = np.asarray(scores, np.float32)
    assert (
        (single > np.float32(found)) == (single > np.float32(2.0))
    ).all()  # no label of these changes
    assert with_margin(0.0, [0.0, 1.0]) == 0.0
