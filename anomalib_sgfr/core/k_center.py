"""Greedy k-center and greedy separation of points, as blocked matrix products."""

import numpy as np
import torch
from torch import Tensor

from anomalib_sgfr.core import gpu
from anomalib_sgfr.core.linear_algebra import in_blocks, middle, row_argmin

__all__ = ["greedy_separated", "k_center_greedy"]

_CANDIDATES = 512  # farthest points among which the next are chosen


def k_center_greedy(
    points: Tensor, size: int, start: Tensor | None = None, tolerance: float = 0.0
) -> tuple[Tensor, float]:
    """Greedy k-center: repeatedly take the point farthest from those taken.

    It approximates the smallest covering radius within a factor of 2 (Gonzalez 1985). The next
    points are chosen among the farthest few hundred for as long as no other point can be farther.
    Distances to all points are then one matrix product for many taken points.

    Args:
        points (Tensor): Candidates, shape ``(n, d)``, floating point.
        size (int): Number of points to take, at least one. A duplicate of a taken point is never
            taken.
        start (Tensor | None): Indices of points to begin with, at least one and at most ``size``;
            ``None`` for the first point.
        tolerance (float): Stop before ``size`` once every point lies within this distance of those
            taken.

    Returns:
        tuple[Tensor, float]: Indices in the order taken, ``int64``, at most ``size``; and the
        covering radius, the largest Euclidean distance of a point from the nearest taken one.

    Raises:
        ValueError: If ``points`` is empty or ``size`` is below one.
    """
    if size < 1 or points.ndim != 2 or points.shape[0] == 0:  # noqa: PLR2004
        msg = (
            "farthest_first needs a non-empty (n, d) matrix and size >= 1, got"
            f" {tuple(points.shape)} and {size}."
        )
        raise ValueError(msg)
    centred = points - middle(points)
    length = centred.square().sum(1)
    # rounding of the expanded squared distance: a point that is closer is a duplicate
    same = 8.0 * torch.finfo(points.dtype).eps * length
    distance = torch.full_like(length, torch.inf)  # squared, to the nearest taken point
    taken: list[Tensor] = []
    first = torch.zeros(1, dtype=torch.int64) if start is None else start
    fresh = first.to(points.device)
    number = 0
    while True:
        taken.append(fresh)
        number += len(fresh)
        _update_distances(distance, centred, length, fresh)
        distance[fresh] = -torch.inf
        left = torch.where(distance > same, distance, 0.0)
        farthest = float(left.amax())
        if number == size or farthest <= tolerance**2:
            among = torch.cat(taken)
            unsure = (distance <= same) & (distance > -torch.inf) & (same > farthest)
            exact = _largest_distance(centred, length, unsure.nonzero().flatten(), among)
            return among, max(farthest, exact) ** 0.5
        fresh = _next_farthest(
            left, centred, length, same, min(size - number, _CANDIDATES), tolerance
        )


def _largest_distance(points: Tensor, length: Tensor, among: Tensor, taken: Tensor) -> float:
    """Largest squared distance of a point from those taken, without rounding of the expansion."""
    farthest = 0.0
    for part in in_blocks(among, len(taken)):
        near = row_argmin(torch.addmm(length[taken], points[part], points[taken].T, alpha=-2.0))
        exact = (points[part] - points[taken[near]]).square().sum(1)
        farthest = max(farthest, float(exact.amax())) if len(part) else farthest
    return farthest


def _update_distances(distance: Tensor, points: Tensor, length: Tensor, taken: Tensor) -> None:
    """Update squared distances, in place, for newly taken points."""
    near = points[taken].T
    parts = [in_blocks(each, len(taken)) for each in (distance, points, length)]
    buffer = points.new_empty(len(parts[0][0]), len(taken))  # one for all products
    for its_distance, part, its_length in zip(*parts, strict=True):
        product = torch.addmm(length[taken], part, near, alpha=-2.0, out=buffer[: len(part)])
        torch.minimum(its_distance, product.amin(1) + its_length, out=its_distance)


def _next_farthest(
    distance: Tensor, points: Tensor, length: Tensor, same: Tensor, most: int, tolerance: float
) -> Tensor:
    """The next points, one or more: as many as the farthest candidates alone determine."""
    values, candidates = distance.topk(min(_CANDIDATES + 1, len(distance)))
    # no point outside the candidates is farther than the last of them, now or later
    whole = len(candidates) == len(distance)
    outside = torch.full_like(values[-1], -torch.inf) if whole else values[-1]
    candidates, values = candidates[:_CANDIDATES], values[:_CANDIDATES]
    near = points[candidates]
    mutual = torch.addmm(length[candidates], near, near.T, alpha=-2.0) + length[candidates][:, None]
    if gpu.serve(points):
        chosen = gpu.farthest_points(values, mutual, same[candidates], most, outside, tolerance)
        return candidates[chosen[chosen >= 0]]
    beyond = float(outside)
    left, between = values.cpu().numpy().copy(), mutual.cpu().numpy()
    rounding = same[candidates].cpu().numpy()
    picks: list[int] = []
    while len(picks) < most:
        pick = int(left.argmax())
        if picks and (left[pick] < beyond or left[pick] <= tolerance**2):
            break
        picks.append(pick)
        np.minimum(left, between[pick], out=left)
        left[pick] = -np.inf
        left[left <= rounding] = -np.inf
    return candidates[picks]


def greedy_separated(points: Tensor, distance: float) -> Tensor:
    """Indices of points farther than ``distance`` from every earlier point that is kept.

    Args:
        points (Tensor): Shape ``(n, d)``.
        distance (float): Euclidean distance.

    Returns:
        Tensor: Indices in ascending order, ``int64``.
    """
    centred = points - middle(points)
    length = centred.square().sum(1)
    left = torch.arange(len(points), device=points.device)
    kept = [left[:0]]
    while len(left):
        block, left = left[:_CANDIDATES], left[_CANDIDATES:]
        own = centred[block]
        mutual = torch.addmm(length[block], own, own.T, alpha=-2.0) + length[block][:, None]
        chosen = block[_separated_points(mutual, distance)]
        kept.append(chosen)
        if len(left):  # leave out the points that these preclude
            near = centred[chosen].T
            far = [
                torch.addmm(length[chosen], centred[part], near, alpha=-2.0).amin(1) + length[part]
                > distance**2
                for part in in_blocks(left, len(chosen))
            ]
            left = left[torch.cat(far)]
    return torch.cat(kept)


def _separated_points(mutual: Tensor, distance: float) -> Tensor:
    """Mask of the points to keep, from the squared distances of a few hundred points."""
    if gpu.serve(mutual):
        return gpu.separated_points(mutual, distance)
    close = np.triu((mutual <= distance**2).cpu().numpy(), 1)  # each with those after it
    alive = np.ones(len(close), bool)
    for row in range(len(close)):
        if alive[row]:
            alive &= ~close[row]
    return torch.from_numpy(alive).to(mutual.device)
