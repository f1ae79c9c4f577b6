import numpy as np
import pytest
from scipy.stats import binomtest
from sklearn.metrics import roc_auc_score

from anomalib_sgfr.report.statistics import Counts, auroc, interval, roc, subsampled
from tests.example_report import drawn_scores


@pytest.mark.parametrize("number", [1, 6, 118, 5000])
def test_intervals_are_wilsons(number: int) -> None:
    for hits in {0, 1, number // 3, number}:
        expected = binomtest(hits, number).proportion_ci(0.95, "wilson")
        assert interval(hits, number) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert interval(0, 0) == (0.0, 1.0)


def test_counts_take_what_exceeds_the_threshold() -> None:
    found = Counts.at(0.5, [0.5, 0.6, 0.5, 0.6, 0.4, 0.7, 0.9], [0, 0, 1, 1, None, None, None])
    assert found == Counts(good=2, false_alarms=1, defective=2, missed=1, unlabelled=3, called=2)
    assert Counts.at(0.5, [], []) == Counts(0, 0, 0, 0, 0, 0)


def test_a_thinned_roc_has_the_area_of_the_whole() -> None:
    scores, truths = drawn_scores(5000)
    good, bad = ([s for s, t in zip(scores, truths, strict=True) if t == its] for its in (0, 1))
    found = roc(good, bad)
    assert found is not None
    assert found.area == pytest.approx(roc_auc_score(truths, scores))
    assert len(found.x) <= 402
    assert np.trapezoid(found.y, found.x) == pytest.approx(found.area, abs=2e-3)
    assert (found.x[0], found.y[0], found.x[-1], found.y[-1]) == (0, 0, 1, 1)
    assert roc(good, []) is None
    assert auroc([], bad) is None


def test_a_short_curve_stays_as_it_is() -> None:
    curve = subsampled(np.array([0.0, 0.2, 1.0]), np.array([0.0, 0.9, 1.0]), 0.85)
    assert (curve.x, curve.y) == ([0.0, 0.2, 1.0], [0.0, 0.9, 1.0])
