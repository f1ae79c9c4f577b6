"""Metrics on raw scores, against anomalib's and scikit-learn's."""

import numpy as np
import pytest
import torch
from anomalib.metrics import AUPR, AUPRO, AUROC, F1Max
from anomalib.metrics.base import AnomalibMetric

from benchmarks.common.scores import image_metrics, label_regions, per_defect, pixel_scores


def maps_and_masks(seed: int, levels: int | None) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    maps = rng.random((6, 24, 20), np.float32)
    masks = np.zeros(maps.shape, bool)
    for index, (row, column, size) in enumerate([(2, 3, 4), (10, 9, 8), (5, 5, 2), (0, 0, 3)]):
        masks[index, row : row + size, column : column + size] = True
    masks[1, 0:2, 0:2] = masks[1, 2:4, 2:4] = True  # joined by a corner: one region
    maps += 0.4 * masks
    maps /= maps.max()
    if levels:  # ties
        maps = np.round(maps * levels) / levels
    return maps.astype(np.float32), masks


def anomalib_value(metric: type[AnomalibMetric], scores: np.ndarray, truth: np.ndarray) -> float:
    built = metric(fields=["scores", "truth"])
    super(AnomalibMetric, built).update(torch.from_numpy(scores), torch.from_numpy(truth).int())
    return float(built.compute())


@pytest.mark.parametrize("levels", [None, 7])
@pytest.mark.parametrize("seed", [0, 1, 2])
def test_pixel_metrics_are_anomalibs(seed: int, levels: int | None) -> None:
    maps, masks = maps_and_masks(seed, levels)
    found = pixel_scores(maps, label_regions(masks))
    assert found.auroc == pytest.approx(anomalib_value(AUROC, maps, masks), abs=1e-6)
    assert found.average_precision == pytest.approx(anomalib_value(AUPR, maps, masks), abs=1e-6)
    assert found.aupro == pytest.approx(anomalib_value(AUPRO, maps, masks), abs=1e-5)


def test_raw_scores_give_what_their_order_gives() -> None:
    maps, masks = maps_and_masks(0, None)
    regions = label_regions(masks)
    assert pixel_scores(maps * 1000, regions)[:3] == pytest.approx(
        pixel_scores(maps, regions)[:3], abs=1e-12
    )


def test_regions_are_numbered_across_images_and_touch_at_corners() -> None:
    _, masks = maps_and_masks(0, None)
    regions = label_regions(masks)
    assert regions.max() == 5
    assert set(np.unique(regions[regions > 0])) == {1, 2, 3, 4, 5}
    assert regions[1, 1, 1] == regions[1, 2, 2] > 0
    assert not regions[~masks].any()


def test_a_perfect_map_scores_one_and_its_opposite_zero() -> None:
    _, masks = maps_and_masks(0, None)
    regions = label_regions(masks)
    assert pixel_scores(masks.astype(np.float32), regions)[:3] == pytest.approx((1.0, 1.0, 1.0))
    opposite = pixel_scores((~masks).astype(np.float32), regions)
    assert opposite.auroc == pytest.approx(0.0)
    assert opposite.aupro == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_scores_that_cannot_be_ordered_are_refused(bad: float) -> None:
    maps, masks = maps_and_masks(0, None)
    maps[0, 0, 0] = bad
    with pytest.raises(ValueError, match="finite"):
        pixel_scores(maps, label_regions(masks))


def test_no_defect_is_refused() -> None:
    maps, masks = maps_and_masks(0, None)
    with pytest.raises(ValueError, match="defective"):
        pixel_scores(maps, label_regions(masks & False))


def test_image_metrics_are_anomalibs() -> None:
    rng = np.random.default_rng(0)
    labels = rng.random(60) < 0.4
    scores = np.round(rng.random(60) * 0.6 + 0.4 * labels, 2)
    found = image_metrics(scores, labels)
    assert found["image_AUROC"] == pytest.approx(anomalib_value(AUROC, scores, labels), abs=1e-6)
    assert found["image_F1Max"] == pytest.approx(anomalib_value(F1Max, scores, labels), abs=1e-6)
    assert found["image_AP"] == pytest.approx(anomalib_value(AUPR, scores, labels), abs=1e-6)


def test_each_kind_of_defect_is_compared_with_the_good_images_alone() -> None:
    scores = np.array([0.1, 0.2, 0.9, 0.15, 0.0])
    kinds = np.array(["good", "good", "Crack", "Break", "Fray"])
    assert per_defect(scores, kinds) == {"Break": 0.5, "Crack": 1.0, "Fray": 0.0}
