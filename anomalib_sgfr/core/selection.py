"""Selection of points that are far apart: the greedy steps behind subspace sampling, as blocked matrix products."""

import numpy as np
import torch
from torch import Tensor

from anomalib_sgfr.core import kernels
from anomalib_sgfr.core.linear_algebra import least_in_row, middle

__all__ = ["PRODUCT_VALUES", "farthest_first", "separated"]

PRODUCT_VALUES = 2**23  # distances computed at once, 32 MiB of float32
_CANDIDATES = 512  # the next points are looked for among so many


def farthest_first(
    points: Tensor, size: int, start: Tensor | None = None, tolerance: float = 0.0
) -> tuple[Tensor, float]:
    """Greedy k-center: repeatedly take the point farthest from those taken.

    A 2-approximation of the smallest covering radius (Gonzalez 1985). The next points are looked for among the
    farthest few hundred for as long as no other point can be farther, so that distances to all points are computed for
    many taken points at once, as one matrix product.

    Args:
        points (Tensor): Candidates, shape ``(n, d)``, floating point.
        size (int): Number of points to take, at least one. Exact duplicates of taken points are never taken, so fewer
            come back if fewer are distinct.
        start (Tensor | None): Indices of points that are taken to begin with, at least one and at most ``size``;
            ``None`` for the first point.
        tolerance (float): Stop before ``size`` once every point lies within this distance of those taken.

    Returns:
        tuple[Tensor, float]: Indices of the taken points in the order taken (``int64``, at most ``size``), and the
        covering radius: the Euclidean distance to its nearest taken point of the point least well covered.

    Raises:
        ValueError: If ``points`` is empty or ``size`` is below one.
    """
    if size < 1 or points.ndim != 2 or points.shape[0] == 0:  # noqa: PLR2004
        msg = f"farthest_first needs a non-empty (n, d) matrix and size >= 1, got {tuple(points.shape)} and {size}."
        raise ValueError(msg)
    centred = points - middle(points)
    length = centred.square().sum(1)
    # rounding of the expansion of squared distances, at each point: closer than this is the same point
    same = 8.0 * torch.finfo(points.dtype).eps * length
    distance = torch.full_like(length, torch.inf)  # squared, from each point to the nearest one taken
    taken: list[int] = []
    fresh = [0] if start is None else start.tolist()
    while True:
        taken += fresh
        block = torch.tensor(fresh, device=points.device)
        _lower(distance, centred, length, block)
        distance[block] = -torch.inf
        left = torch.where(distance > same, distance, 0.0)
        farthest = float(left.amax())
        if len(taken) == size or farthest <= tolerance**2:
            among = torch.tensor(taken, device=points.device)
            unsure = ((distance <= same) & (distance > -torch.inf) & (same > farthest)).nonzero().flatten()
            return among, max(farthest, _farthest_of(centred, length, unsure, among)) ** 0.5
        fresh = _next_farthest(left, centred, length, same, min(size - len(taken), _CANDIDATES), tolerance)


def _farthest_of(points: Tensor, length: Tensor, some: Tensor, taken: Tensor) -> float:
    """Squared distance from those taken of the farthest of some points, without the rounding of its expansion."""
    farthest = 0.0
    for part in some.split(max(1, PRODUCT_VALUES // len(taken))):
        near = least_in_row(torch.addmm(length[taken], points[part], points[taken].T, alpha=-2.0))
        exact = (points[part] - points[taken[near]]).square().sum(1)
        farthest = max(farthest, float(exact.amax())) if len(part) else farthest
    return farthest


def _lower(distance: Tensor, points: Tensor, length: Tensor, taken: Tensor) -> None:
    """Update squared distances, in place, for newly taken points."""
    rows = max(1, PRODUCT_VALUES // len(taken))
    for start in range(0, len(points), rows):
        part = slice(start, start + rows)
        to_taken = torch.addmm(length[taken], points[part], points[taken].T, alpha=-2.0).amin(1) + length[part]
        distance[part] = torch.minimum(distance[part], to_taken)


def _next_farthest(
    distance: Tensor, points: Tensor, length: Tensor, same: Tensor, most: int, tolerance: float
) -> list[int]:
    """The next points of the traversal, one or more: as many as can be told from the farthest candidates alone."""
    values, candidates = distance.topk(min(_CANDIDATES + 1, len(distance)))
    # no point that is not a candidate is farther than the last of them, now or later
    outside = values[-1] if len(candidates) < len(distance) else torch.full_like(values[-1], -torch.inf)
    candidates, values = candidates[:_CANDIDATES], values[:_CANDIDATES]
    near = points[candidates]
    mutual = torch.addmm(length[candidates], near, near.T, alpha=-2.0) + length[candidates][:, None]
    if kernels.serve(points):
        chosen = kernels.farthest_of_few(values, mutual, same[candidates], most, outside, tolerance)
        return candidates[chosen[chosen >= 0]].tolist()
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
    return candidates[picks].tolist()


def separated(points: Tensor, distance: float) -> Tensor:
    """Indices of points farther than ``distance`` from one another: each, in order, that no earlier one precludes.

    Args:
        points (Tensor): Shape ``(n, d)``.
        distance (float): Euclidean.

    Returns:
        Tensor: Indices in rising order, ``int64``.
    """
    centred = points - middle(points)
    length = centred.square().sum(1)
    kept = torch.empty(0, dtype=torch.int64, device=points.device)
    on_card = kernels.serve(points)
    for block in torch.arange(len(points), device=points.device).split(_CANDIDATES):
        fresh = block
        if len(kept):
            to_kept = torch.addmm(length[kept], centred[block], centred[kept].T, alpha=-2.0).amin(1) + length[block]
            fresh = block[to_kept > distance**2]
        mutual = torch.addmm(length[fresh], centred[fresh], centred[fresh].T, alpha=-2.0) + length[fresh][:, None]
        if on_card:
            kept = torch.cat((kept, fresh[kernels.separated_of_few(mutual, distance)]))
            continue
        close = np.triu((mutual <= distance**2).cpu().numpy(), 1)  # each with those after it
        alive = np.ones(len(close), bool)
        for row in range(len(close)):
            if alive[row]:
                alive &= ~close[row]
        kept = torch.cat((kept, fresh[torch.from_numpy(alive).to(fresh.device)]))
    return kept
