"""Greedy selections against the same written out."""

import numpy as np
import pytest
import torch
from torch import Tensor

from anomalib_sgfr.core.k_center import greedy_separated, k_center_greedy
from anomalib_sgfr.core.neighbours import nearest, search_index
from anomalib_sgfr.core.sampler import SubspaceSampler


def coverage(points: Tensor, bank: Tensor) -> float:
    return float(torch.cdist(points.double(), bank.double()).amin(1).max())


def greedy_oracle(points: np.ndarray, size: int, start: tuple[int, ...] = (0,)) -> list[int]:
    """Farthest-first traversal, written out."""
    taken = list(start)
    distance = np.min([np.linalg.norm(points - points[index], axis=1) for index in taken], axis=0)
    while len(taken) < size:
        taken.append(int(distance.argmax()))
        distance = np.minimum(distance, np.linalg.norm(points - points[taken[-1]], axis=1))
    return taken


@pytest.mark.parametrize(
    ("number", "width", "size"), [(200, 5, 25), (2500, 8, 1200), (700, 2, 699), (40, 3, 40)]
)
def test_farthest_first_is_the_greedy_traversal(number: int, width: int, size: int) -> None:
    points = torch.randn(number, width, dtype=torch.float64) + 3
    taken, radius = k_center_greedy(points, size)
    assert taken.tolist() == greedy_oracle(points.numpy(), size)
    assert radius == pytest.approx(coverage(points, points[taken]), abs=1e-6)


def test_farthest_first_goes_on_from_what_is_taken() -> None:
    points = torch.randn(300, 4, dtype=torch.float64)
    taken, _ = k_center_greedy(points, 30, torch.tensor([7, 2, 90]))
    assert taken.tolist() == greedy_oracle(points.numpy(), 30, (7, 2, 90))


def test_farthest_first_stops_within_the_tolerance() -> None:
    points = torch.rand(500, 2, dtype=torch.float64)
    taken, radius = k_center_greedy(points, 500, tolerance=0.2)
    assert radius == pytest.approx(coverage(points, points[taken]))
    assert radius <= 0.2 < coverage(points, points[taken[:-1]])


def test_farthest_first_stops_when_no_distinct_point_is_left() -> None:
    points = torch.randn(5, 4).repeat(6, 1)
    taken, radius = k_center_greedy(points, 20)
    assert len(taken) == 5
    assert radius == pytest.approx(0.0, abs=1e-2)
    assert len({tuple(row) for row in points[taken].tolist()}) == 5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("far", [3e3, 1e5])
@pytest.mark.parametrize("outliers", [1, 3])
def test_far_outliers_cost_no_more_than_their_own_places(
    outliers: int, far: float, dtype: torch.dtype
) -> None:
    points = torch.randn(2000, 8, dtype=dtype)
    points[7 : 7 + outliers] += far
    taken, radius = k_center_greedy(points, 100)
    assert len(taken) == 100
    reference = greedy_oracle(points.double().numpy(), 100)
    # within twice the least, as any traversal; what is not told apart at the outliers is what their
    # rounding says
    found = coverage(points, points[taken])
    assert found <= 2 * coverage(points, points[reference]) + 1e-3
    assert found == pytest.approx(radius, rel=1e-2)


def test_the_radius_counts_points_too_far_out_to_tell_apart() -> None:
    points = 1e-3 * torch.randn(60, 5)
    points[::2] += 1e4
    points[1::2] -= 1e4
    taken, radius = k_center_greedy(points, 10)
    assert 2 <= len(taken) <= 10
    assert coverage(points, points[taken]) <= radius * (1 + 1e-3) <= 0.1


def test_separated_points_are_the_first_that_fit() -> None:
    points = torch.randn(1500, 3, dtype=torch.float64) + 1
    expected: list[int] = []
    for index, point in enumerate(points.numpy()):
        if all(np.linalg.norm(point - points[other].numpy()) > 0.5 for other in expected):
            expected.append(index)
    assert greedy_separated(points, 0.5).tolist() == expected


def test_nothing_to_select_from_is_refused() -> None:
    with pytest.raises(ValueError, match="non-empty"):
        k_center_greedy(torch.zeros(0, 3), 2)


@pytest.mark.parametrize("far", [1e9, 1e12])
def test_outliers_do_not_take_the_digits_of_all_others_along(far: float) -> None:
    points = torch.randn(2000, 8)
    points[7] += far
    taken, radius = k_center_greedy(points, 100)
    assert len(taken) == 100
    others = torch.arange(len(points)) != 7
    assert coverage(points[others], points[taken]) == pytest.approx(radius, rel=1e-2)
    sampler = SubspaceSampler(100)
    for batch in points.split(64):
        sampler.observe(batch)
    assert len(sampler.bank()) == 100
    assert coverage(points[others], sampler.bank()) < 4
    index = search_index(points)
    found = nearest(points[:50] + 1e-3, index, 1)[:, 0]
    assert torch.equal(found[others[:50]], torch.arange(50)[others[:50]])
