import numpy as np
import pytest

from anomalib_sgfr.report.contents import Unit, by_importance, pruned
from anomalib_sgfr.report.score_table import Scored
from tests.made_report import picture


def units(scores: list[float], truths: list[int | None]) -> list[Unit]:
    shown = picture(0)
    return [
        Unit(Scored(str(number), score, 0.5, int(score > 0.5), truth), picture=shown)
        for number, (score, truth) in enumerate(zip(scores, truths, strict=True))
    ]


def test_mistakes_come_first_then_the_near_and_the_high() -> None:
    every = units([0.1, 0.9, 0.48, 0.7, 0.3, 0.95, 0.53], [0, 0, 0, 1, 1, 1, None])
    assert by_importance(every, 0.5, 7)[:2] == [1, 4]  # the farthest from the threshold first
    assert set(by_importance(every, 0.5, 4)) == {1, 4, 2, 5}  # 2 is the nearest, 5 the highest
    assert by_importance(every, None, 2) == [5, 1]
    assert sorted(by_importance(every, 0.5, 50)) == list(range(7))
    assert by_importance([], 0.5, 3) == []


@pytest.mark.parametrize("seed", range(5))
def test_a_stream_that_is_pruned_keeps_what_is_chosen_among_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.permutation(400) / 400
    truths = [[0, 1, None][kind] for kind in rng.integers(0, 3, 400)]
    every = units(scores.tolist(), truths)
    held: list[Unit] = []
    for unit in every:
        held.append(unit)
        if sum(item.picture is not None for item in held) > 90:
            held = pruned(held, 0.5, 40)
    streamed = [item.scored.image for item in pruned(held, 0.5, 40) if item.picture]
    assert set(streamed) == {every[place].scored.image for place in by_importance(every, 0.5, 40)}
    assert len(streamed) == 40
