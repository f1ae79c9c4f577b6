"""Calibration scores and the groups of images."""

import itertools

import pytest

from anomalib_sgfr import SgfrPostProcessor
from anomalib_sgfr.post_processing.calibration import (
    CalibrationScores,
    Split,
    group_of,
    require_group,
    select_evenly,
)


def test_groups_are_named_by_a_regular_expression() -> None:
    assert group_of("a/part1_2.png", None) == "a/part1_2.png"
    assert group_of("a\\part1_2.png", "a/part") == "a/part"
    assert group_of("line3/part1_2.png", r"(line\d)/part(\d)") == group_of(
        "line3/part1_9.png", r"(line\d)/part(\d)"
    )
    assert group_of("other.png", r"part(\d)") == "other.png"
    with pytest.raises(ValueError, match=r"group '\(' is not a regular expression"):
        SgfrPostProcessor(group="(")
    with pytest.raises(
        ValueError, match=r"group 'unit' matches no image's path: one is 'a/part1.png'"
    ):
        require_group("unit", ["a/part1.png"])


def test_scores_of_earlier_versions_have_the_scores_for_peaks() -> None:
    stored = CalibrationScores.of([1.0, 2.0], Split.HELD_OUT, ["a", "b"], [3.0, 4.0]).to_dict()
    assert CalibrationScores.from_dict(stored).peaks == (3.0, 4.0)
    del stored["peaks"]
    assert CalibrationScores.from_dict(stored).peaks == (1.0, 2.0)
    both = CalibrationScores.from_dict(stored).joined(
        CalibrationScores.of([5.0], Split.HELD_OUT, ["b"], [6.0])
    )
    assert (both.scores, both.peaks) == ((1.0, 5.0), (1.0, 6.0))


@pytest.mark.parametrize("most", [1, 7, 50, 68, 69, 300])
def test_as_many_training_images_are_scored_as_was_asked_for(most: int) -> None:
    """Spread evenly over them, each once."""
    for number in (1, 2, 69, 100, 299, 300, 301, 1000):
        chosen = [int(path) for path in select_evenly(list(map(str, range(number))), most)]
        assert len(chosen) == len(set(chosen)) == min(most, number)
        steps = {after - before for before, after in itertools.pairwise([*chosen, number])}
        assert max(steps) - min(steps) <= 1
