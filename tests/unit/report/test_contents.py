import json

import numpy as np
import pytest

from anomalib_sgfr.report.contents import (
    ImageRow,
    as_json,
    most_important,
    tables_of,
    with_most_media,
)
from anomalib_sgfr.report.score_table import ScoreRow
from anomalib_sgfr.report.statistics import Counts, interval
from tests.example_report import contents, drawn_scores, media, stream


def image_rows(scores: list[float], truths: list[int | None]) -> list[ImageRow]:
    shown = media(0)
    return [
        ImageRow(ScoreRow(str(number), score, 0.5, int(score > 0.5), truth), media=shown)
        for number, (score, truth) in enumerate(zip(scores, truths, strict=True))
    ]


def test_mistakes_come_first_then_the_nearest_and_the_highest() -> None:
    images = image_rows([0.1, 0.9, 0.48, 0.7, 0.3, 0.95, 0.53], [0, 0, 0, 1, 1, 1, None])
    assert most_important(images, 0.5, 7)[:2] == [1, 4]  # the farthest from the threshold first
    assert set(most_important(images, 0.5, 4)) == {1, 4, 2, 5}  # 2 is the nearest, 5 the highest
    assert most_important(images, None, 2) == [5, 1]
    assert sorted(most_important(images, 0.5, 50)) == list(range(7))
    assert most_important([], 0.5, 3) == []


@pytest.mark.parametrize("seed", range(5))
def test_a_reduced_stream_keeps_what_is_chosen_among_all(seed: int) -> None:
    rng = np.random.default_rng(seed)
    scores = rng.permutation(400) / 400
    truths = [[0, 1, None][kind] for kind in rng.integers(0, 3, 400)]
    images = image_rows(scores.tolist(), truths)
    held: list[ImageRow] = []
    for image in images:
        held.append(image)
        if sum(item.media is not None for item in held) > 90:
            held = with_most_media(held, 0.5, 40)
    streamed = [item.result.image for item in with_most_media(held, 0.5, 40) if item.media]
    chosen = most_important(images, 0.5, 40)
    assert set(streamed) == {images[index].result.image for index in chosen}
    assert len(streamed) == 40


def test_the_json_has_rates_of_new_images_and_of_all() -> None:
    scores, truths = drawn_scores(300)
    found = as_json(contents(scores, truths, trained_on=40, chose=90))
    new, every = (Counts.at(0.5, scores[first:], truths[first:]) for first in (90, 0))
    assert found["new"]["false_alarms"]["count"] == new.false_alarms
    of_good = found["by_kind"]["good"]
    assert found["new"]["false_alarms"]["images"] == of_good["false_alarms"]["images"] == new.good
    assert found["all"]["missed"] == {
        "images": every.defective,
        "count": every.missed,
        "rate": every.missed / every.defective,
        "interval": list(interval(every.missed, every.defective)),
    }
    assert (found["trained_on"], found["chose_threshold"]) == (40, 90)
    assert of_good["left_out"] + found["by_kind"]["scratch"]["left_out"] == 90
    assert sum(image["chose_threshold"] for image in found["images"]) == 90
    assert list(found["images"][0])[:7] == list(ScoreRow._fields)
    assert json.loads(json.dumps(found)) == found


def test_a_kind_is_told_from_all_good_images_and_a_group_from_its_own() -> None:
    images = contents(
        [0.1, 0.6, 0.4, 0.9],
        [0, 0, 1, 1],
        names=["a1.png", "b1.png", "a2.png", "b2.png"],
        kinds=["good", "good", "dent", "hole"],
        group=r"([ab])\d\.png",
    )
    kinds = tables_of(images, 0.5)["kind"]
    assert [(row.name, row.auroc, row.counts.missed) for row in kinds] == [
        ("dent", 0.5, 1),
        ("good", None, 0),
        ("hole", 1.0, 0),
    ]
    rows = [row._replace(trained_on=number % 2 == 1) for number, row in enumerate(images.images)]
    groups = tables_of(images._replace(images=rows), 0.5)["group"]
    assert [(row.name, row.auroc, row.counts.good, row.left_out) for row in groups] == [
        ("a", 1.0, 1, 0),
        ("b", 1.0, 0, 2),
    ]


def test_json_has_the_figures_of_watched_streams() -> None:
    found = as_json(contents([0.4, 0.6], [0, 1], streams=[stream("cam2")]))
    (its,) = json.loads(json.dumps(found))["streams"]
    assert (its["stream"], its["changed_at"], its["unchanged_before"]) == ("cam2", 50, 20)
    assert its["limit"] == 200.0
    assert [layer["deviations"] for layer in its["layers"]] == [2.5, -9.25]
    assert "streams" not in as_json(contents([0.4, 0.6], [0, 1]))
