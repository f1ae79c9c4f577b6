import re

import numpy as np

from anomalib_sgfr.report.media import Axis, bars, histogram, path_of, ticks


def test_ticks_are_round_numbers_at_their_places() -> None:
    found = ticks(0.13, 0.97)
    assert 4 <= len(found) <= 10
    for share, label in found:
        assert (
            0.13 + share * 0.84 == np.float64(label).round(9)
            or abs(0.13 + share * 0.84 - float(label)) < 1e-9
        )
    assert ticks(1.0, 1.0) == ticks(0.0, float("inf")) == []


def test_bars_are_as_high_as_their_counts() -> None:
    tops = [float(top) for top in re.findall(r"V([\d.]+)h", bars([1, 0, 2, 4]))]
    assert tops == [75.0, 50.0, 0.0]
    assert bars([]) == bars([0]) == ""


def test_a_histogram_counts_every_score() -> None:
    scores = np.random.default_rng(0).normal(size=500).tolist()
    (row,) = histogram([("Good", scores)], Axis.over(-1.0, 1.0))
    expected = np.histogram(np.clip(scores, -1, 1), 60, (-1, 1))[0]
    assert (row.number, row.tallest) == (500, expected.max())
    assert row.path.count("z") == (expected > 0).sum()


def test_a_curve_begins_at_the_bottom() -> None:
    assert path_of([0, 0.15, 0.3], [0, 0.5, 1], 0.3) == "M0.0 100.00L500.0 50.00L1000.0 0.00"
