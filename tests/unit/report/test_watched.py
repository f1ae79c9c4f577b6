"""The start of a change, and which images show it."""

import numpy as np
import pytest

from anomalib_sgfr.report.watched import StreamTable, start_of_change


def table(p_values: list[float], changed_at: int | None, scores: list[float]) -> StreamTable:
    paths = [f"{number}.png" for number in range(len(p_values))]
    return StreamTable("", paths, scores, p_values, [1.0] * len(paths), 200.0, changed_at, [])


@pytest.mark.parametrize("seed", range(8))
def test_the_start_leaves_the_smallest_squares(seed: int) -> None:
    rng = np.random.default_rng(seed)
    values = np.concatenate([rng.uniform(size=30), rng.uniform(0.0, 0.4, size=20)])
    squares = [
        ((values[:cut] - values[:cut].mean()) ** 2).sum()
        + ((values[cut:] - values[cut:].mean()) ** 2).sum()
        for cut in range(1, 50)
    ]
    assert start_of_change([*values.tolist(), 1.0, 1.0], 50) == 1 + int(np.argmin(squares))


@pytest.mark.parametrize(("before", "level"), [(0, 0.1), (40, 0.1), (40, 0.9), (400, 0.2)])
def test_the_start_is_near(before: int, level: float) -> None:
    rng = np.random.default_rng(before)
    values = [*rng.uniform(size=before), *(level + 0.1 * rng.uniform(-1, 1, size=60))]
    assert abs(start_of_change(values, len(values)) - before) <= 3
    assert start_of_change(values[:1], 1) == 0


def test_images_of_before_and_after_are_shown_with_the_largest_scores() -> None:
    rng = np.random.default_rng(0)
    scores = [*rng.uniform(0.2, 0.3, 100), *rng.uniform(0.6, 0.7, 200)]
    scores[123], scores[50] = 0.99, 0.98
    values = [*rng.uniform(size=100), *[0.01] * 200]
    of = table(values, 130, scores)
    assert of.start == 100
    assert of.direction == "higher"
    shown = [int(path.partition(".")[0]) for path in of.shown]
    assert 123 in shown
    assert 30 <= sum(number < 100 for number in shown) <= 36
    assert {0, 99, 100, 299} <= set(shown)
    assert len(shown) == len(set(shown)) <= 2 * 32 + 9
    steady = table(values[:100], None, scores[:100])
    assert steady.shown == [f"{number}.png" for number in range(68, 100)]
    assert steady.direction is None
    assert table([1.0 - value for value in values], 130, scores).direction == "lower"
