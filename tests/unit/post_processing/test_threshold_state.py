"""Thresholds of scores and maps that a state gives."""

from typing import Any

import numpy as np
import pytest

from anomalib_sgfr import SgfrPostProcessor
from anomalib_sgfr.post_processing.calibration import CalibrationScores, Split, ThresholdState
from tests.conftest import nominal_threshold


def calibrated(scores: CalibrationScores, **asked: Any) -> ThresholdState:
    return ThresholdState(scores, **asked).calibrated()


def test_labels_choose_the_threshold_where_they_show_that_a_lower_one_is_better() -> None:
    """Thirty defects score below two unusual good images; one defect does not suffice."""
    scores = [*np.linspace(1.0, 3.0, 58), 9.0, 9.5]
    training = CalibrationScores.of(
        scores, Split.TRAINING, [f"t{index}" for index in range(60)], [2 * each for each in scores]
    )
    good = CalibrationScores.of(
        np.linspace(1.0, 3.0, 20), Split.HELD_OUT, [f"g{index}" for index in range(20)], [4.0] * 20
    )
    bad = CalibrationScores.of(
        np.linspace(5.0, 7.0, 30), Split.DEFECTIVE, [f"b{index}" for index in range(30)], [9.0] * 30
    )
    state = calibrated(training.joined(good).joined(bad), masks=3.25)
    assert (state.by, state.image, state.pixel) == ("labels", 4.0, 3.25)
    assert state.peak == pytest.approx(8.0)  # the same share of what good images give
    assert state.basis == "80 good and 30 defective images"
    assert state.warning is None
    fewer = calibrated(state.scores.exclude(f"b{index}" for index in range(29)), masks=3.25)
    assert fewer.by == "good"
    assert fewer.image == nominal_threshold(fewer.scores.good.scores, 0.01) > 9.0
    assert fewer.pixel == fewer.peak
    asked = calibrated(state.scores, false_alarm_rate=0.01)
    assert (asked.by, asked.image) == ("good", fewer.image)


def test_basis_and_warning_name_one_number_of_images() -> None:
    good = CalibrationScores.of(range(1, 7), Split.HELD_OUT, list("abcdef"))
    state = calibrated(good, false_alarm_rate=0.1)
    assert state.basis.endswith("30 images without an alarm would show 10% or less")
    assert state.warning is not None
    assert state.warning.endswith("30 images without an alarm would show 10% or less")


def test_basis_and_warning_name_one_bound() -> None:
    """Calibration leaves some of the images above the threshold, which the bound counts."""
    good = CalibrationScores.of(range(22), Split.HELD_OUT, [f"{index}" for index in range(22)])
    state = calibrated(good, false_alarm_rate=0.2)
    assert state.warning is not None
    head, *known = state.warning.partition("at 95% confidence the real false-alarm rate is 32% or")
    assert head == "22 good images: "
    assert state.basis == (
        f"22 good images (22 independent) at a false-alarm rate of 20%; {''.join(known)}"
    )


def test_pixels_are_measured_by_the_peaks_of_maps() -> None:
    """Other layers may contribute to the map than to the score."""
    good = CalibrationScores.of(
        [1.0, 2.0, 3.0], Split.HELD_OUT, ["a", "b", "c"], [10.0, 30.0, 20.0]
    )
    by_rate = SgfrPostProcessor(0.3)
    by_rate.use(calibrated(good, false_alarm_rate=0.3))
    assert float(by_rate.image_threshold) == nominal_threshold(good.scores, 0.3)
    assert float(by_rate.pixel_threshold) == nominal_threshold(good.peaks, 0.3)
    assert by_rate.mask_threshold == by_rate.peak_threshold == float(by_rate.pixel_threshold)
    by_rate.use(
        by_rate.state._replace(value=2 * by_rate.state.image).calibrated()
    )  # by hand: both alike
    assert float(by_rate.pixel_threshold) == pytest.approx(2 * nominal_threshold(good.peaks, 0.3))
    # with masks of enough labelled images the pixels' threshold is theirs; peaks are still those of
    # before
    many_good = CalibrationScores.of(
        np.linspace(1.0, 3.0, 6), Split.HELD_OUT, [f"g{index}" for index in range(6)], [10.0] * 6
    )
    bad = CalibrationScores.of(
        np.linspace(6.0, 7.0, 6), Split.DEFECTIVE, [f"b{index}" for index in range(6)], [90.0] * 6
    )
    masked = SgfrPostProcessor(pixel_sensitivity=0.8)
    masked.use(calibrated(many_good.joined(bad), masks=5.0))
    assert masked.state.by == "good"
    assert float(masked.pixel_threshold) == 5.0
    assert masked.mask_threshold == pytest.approx(2.5)  # half: normalised 0.2
    assert masked.peak_threshold == pytest.approx(5.005)
    asked = SgfrPostProcessor(0.3)
    asked.use(calibrated(many_good.joined(bad), masks=5.0, false_alarm_rate=0.3))
    assert (
        float(asked.pixel_threshold)
        == nominal_threshold(many_good.peaks, 0.3)
        == pytest.approx(10.01)
    )
