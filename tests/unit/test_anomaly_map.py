"""Residual maps to maps of the image's size: interpolation, blur, sums over scales, and threads."""

import copy
import sys
import threading

import numpy as np
import pytest
import torch
from anomalib.models.components import GaussianBlur2d
from torch import Tensor
from torch.nn import functional

from anomalib_sgfr.anomaly_map import AnomalyMapGenerator
from anomalib_sgfr.features.layers import Scale

WHOLE = torch.empty(0)
SCALES = [Scale((0,), 4, score_weight=0.0), Scale((1,), 8, score_weight=0.25), Scale((2,), 16)]


def generator(sigma: float = 4.0) -> AnomalyMapGenerator:
    return AnomalyMapGenerator(SCALES, sigma)


def upsampled(maps: AnomalyMapGenerator, scores: Tensor, size: tuple[int, int]) -> Tensor:
    return maps.upsample([scores], size, WHOLE)[0]


@pytest.mark.parametrize("sigma", [0.0, 2.5])
@pytest.mark.parametrize(
    ("before", "after"), [((8, 12), (64, 96)), ((5, 5), (33, 40)), ((16, 16), (16, 16))]
)
def test_maps_are_sums_of_interpolated_and_blurred_residuals(
    before: tuple[int, int], after: tuple[int, int], sigma: float
) -> None:
    scores = torch.rand(3, 1, *before)
    expected = functional.interpolate(scores, size=after, mode="bilinear", align_corners=False)
    if sigma:
        expected = GaussianBlur2d(sigma=sigma)(expected)
    maps = generator(sigma)
    for _ in range(2):
        torch.testing.assert_close(upsampled(maps, scores, after), expected)
        found = maps([scores] * 3, after, WHOLE)
        torch.testing.assert_close(found.anomaly_map, 3 * expected)
        torch.testing.assert_close(found.score_map, 1.25 * expected)
    assert not maps.state_dict()


def test_few_matrices_are_kept_however_many_sizes_come() -> None:
    maps, scores = generator(), torch.rand(1, 1, 4, 5)
    for size in range(30, 90):
        upsampled(maps, scores, (size, size + 1))
    assert len(maps._matrices) <= 32
    assert len(copy.deepcopy(maps)._matrices) == 0  # made again where they are wanted
    expected = functional.interpolate(scores, size=(30, 31), mode="bilinear", align_corners=False)
    torch.testing.assert_close(
        upsampled(maps, scores, (30, 31)), GaussianBlur2d(sigma=4.0)(expected)
    )


def test_matrices_that_another_thread_may_be_reading_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("anomalib_sgfr.anomaly_map._MAX_MATRICES", 2)
    maps = generator(1.0)
    for size in (8, 9, 8, 10, 11):
        reading = maps._matrices
        before = dict(reading)
        upsampled(maps, torch.ones(1, 1, 3, 4), (size, size))
        assert reading.keys() == before.keys()


def test_threads_of_ever_new_sizes_share_the_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever one thread evicts while another one computes."""
    maps, scores = generator(1.0), torch.ones(1, 1, 3, 4)
    monkeypatch.setattr("anomalib_sgfr.anomaly_map._MAX_MATRICES", 2)
    expected = {size: upsampled(generator(1.0), scores, (size, size)) for size in range(8, 20)}
    errors: list[str] = []

    def work(seed: int) -> None:
        order = np.random.default_rng(seed)
        for size in order.integers(8, 20, 100).tolist():
            try:
                found = upsampled(maps, scores, (size, size))
            except Exception as error:  # noqa: BLE001  # whatever a race brings
                errors.append(repr(error))
            else:
                errors.extend(() if torch.equal(found, expected[size]) else [f"wrong at {size}"])

    interval = sys.getswitchinterval()
    try:
        sys.setswitchinterval(1e-6)
        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    assert errors == []
    assert len(maps._matrices) <= 2
