"""Clusters: atoms with statistics of the embeddings that each of them stands for.

An atom's statistics are the count of its embeddings, a bound on their distance from it, the sum of
their offsets and that of their squared distances. :mod:`anomalib_sgfr.core.certificate` derives its
bounds from them.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from anomalib_sgfr.core import gpu
from anomalib_sgfr.core.k_center import greedy_separated, k_center_greedy
from anomalib_sgfr.core.linear_algebra import in_blocks, middle, row_argmin
from anomalib_sgfr.core.patch_grid import ORIGIN

__all__ = [
    "Clusters",
    "assign",
    "merge",
    "moved",
    "prune",
    "reassign",
    "recentred",
    "renumber_images",
    "shift_images",
    "squares_about",
]


_FIRST_STAGE = 512  # the largest clusters: most embeddings to come lie near them
_ROWS, _ROWS_ON_GPU = 8192, 2**17


class Clusters(NamedTuple):
    """Atoms and the statistics of their members, the embeddings that each atom stands for.

    Attributes:
        atoms (Tensor): Shape ``(n, d)``.
        radius (Tensor): Upper bound of the distance of a member, shape ``(n,)``.
        count (Tensor): Number of members, the atom included, shape ``(n,)``, ``int64``.
        squares (Tensor): Upper bound of the sum of the members' squared distances, shape ``(n,)``,
            ``float64``.
        origin (Tensor): Patch that the atom comes from: number of the image, row, column, rows and
            columns of the patch grid; shape ``(n, 5)``, ``int32``; -1 where unknown.
        offset (Tensor): Sum of the members less the atom, shape ``(n, d)``, ``float64``; NaN where
            it is no longer known.
    """

    atoms: Tensor
    radius: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs
    squares: Tensor
    origin: Tensor
    offset: Tensor

    @classmethod
    def of(cls, points: Tensor, origin: Tensor | None = None) -> "Clusters":
        """Clusters of one member each.

        Args:
            points (Tensor): Embeddings, shape ``(n, d)``; the memory is shared.
            origin (Tensor | None): As the attribute; the memory is shared. ``None`` if unknown.
        """
        zeros = torch.zeros_like(points[:, 0])
        if origin is None:
            origin = torch.full((len(points), ORIGIN), -1, dtype=torch.int32, device=points.device)
        nothing = points.new_zeros((), dtype=torch.float64).expand_as(points)  # takes no memory
        ones = torch.ones_like(zeros, dtype=torch.int64)
        return cls(points, zeros, ones, zeros.double(), origin, nothing)

    @classmethod
    def empty(cls, device: torch.device | None = None) -> "Clusters":
        """No clusters: the contribution of a process without images."""
        return cls.of(torch.empty(0, 1, device=device))

    def rows(self, index: Tensor | slice) -> "Clusters":
        """Part of the clusters, by index, mask or slice."""
        return Clusters(*(part[index] for part in self))

    def joined(self, other: "Clusters") -> "Clusters":
        """These clusters followed by others."""
        return Clusters(*(torch.cat(parts) for parts in zip(self, other, strict=True)))

    def with_assigned(
        self, index: Tensor, distance: Tensor, difference: Tensor, other: "Clusters | None" = None
    ) -> "Clusters":
        """Statistics with more members; the atoms stay.

        Args:
            index (Tensor): Row of the atom that each new member goes to, shape ``(m,)``.
            distance (Tensor): Distance of each member from its atom, shape ``(m,)``.
            difference (Tensor): Each member less its atom, shape ``(m, d)``.
            other (Clusters | None): Statistics of the members, if these were atoms.
        """
        count = torch.ones_like(index) if other is None else other.count
        squares, offset = self.squares.clone(), self.offset.clone()
        most = _ROWS_ON_GPU if index.is_cuda else _ROWS
        # float64 takes memory
        for rows in torch.arange(len(index), device=index.device).split(most):
            moved = difference[rows].double()
            if other is None:
                about = moved.square().sum(1)
            else:
                about = squares_about(other.rows(rows), -moved)
                moved = moved * count[rows, None] + other.offset[rows]
            squares.index_add_(0, index[rows], about)
            offset.index_add_(0, index[rows], moved)
        return self._replace(
            radius=self.radius.scatter_reduce(
                0, index, distance if other is None else distance + other.radius, "amax"
            ),
            count=self.count.index_add(0, index, count),
            squares=squares,
            offset=offset,
        )


def squares_about(clusters: Clusters, shift: Tensor) -> Tensor:
    r"""Sum of the squared distances of each atom's members from a point beside the atom.

    .. math:: \sum \|x - a - s\|^2 = \sum \|x - a\|^2 - 2 s^\top \sum (x - a) + n \|s\|^2,

    and at most :math:`(\sqrt{\sum \|x - a\|^2} + \sqrt n \|s\|)^2` (Minkowski) where the offset is
    unknown.

    Args:
        clusters (Clusters): Atoms and statistics.
        shift (Tensor): The point less the atom, shape ``(n, d)``, ``float64``.

    Returns:
        Tensor: Upper bound, rounding included; shape ``(n,)``, ``float64``.
    """
    moved = clusters.count * shift.square().sum(1)
    rounding = 2.0 * torch.finfo(clusters.atoms.dtype).eps * (clusters.squares + moved)
    exact = clusters.squares - 2.0 * (shift * clusters.offset).sum(1) + moved
    most = (clusters.squares.sqrt() + moved.sqrt()).square()
    return torch.where(exact.isnan(), most, (exact + rounding).clamp_min(0.0))


def assign(
    clusters: Clusters, points: Tensor, threshold: float, origin: Tensor | None = None
) -> Clusters:
    """Assign embeddings to the atoms within ``threshold``; the others become atoms.

    Args:
        clusters (Clusters): Atoms and statistics so far.
        points (Tensor): Embeddings, shape ``(n, d)``.
        threshold (float): Euclidean distance.
        origin (Tensor | None): Patches of the embeddings, as in :class:`Clusters`.

    Returns:
        Clusters: The atoms so far, with more members, followed by the new ones.
    """
    common = clusters.count.argsort(descending=True, stable=True)
    search = _on_gpu if gpu.serve(points) else _in_stages
    clusters, left, least = search(clusters, common, points, threshold)
    left = left[least.argsort(descending=True, stable=True)]
    novel = Clusters.of(points[left], None if origin is None else origin[left])
    chosen = greedy_separated(novel.atoms, threshold)
    close = torch.ones_like(novel.count, dtype=torch.bool)
    close[chosen] = False
    return clusters.joined(reassign(novel.rows(chosen), novel.rows(close)))


def _in_stages(
    clusters: Clusters, common: Tensor, points: Tensor, threshold: float
) -> tuple[Clusters, Tensor, Tensor]:
    """Clusters with the points within the threshold, the points left, and their distances."""
    left = torch.arange(len(points), device=points.device)
    least = torch.full_like(points[:, 0], torch.inf)
    atoms, done = clusters.atoms, 0
    while done < len(common) and len(left):
        among = common[done : max(_FIRST_STAGE, 2 * done)]
        done += len(among)
        index, distance, difference = _nearest_atom(points[left], atoms[among])
        near = distance <= threshold
        clusters = clusters.with_assigned(among[index[near]], distance[near], difference[near])
        left, least = left[~near], torch.minimum(least, distance)[~near]
    return clusters, left, least


def _on_gpu(
    clusters: Clusters, common: Tensor, points: Tensor, threshold: float
) -> tuple[Clusters, Tensor, Tensor]:
    """Do as ``_in_stages``, in one launch of a GPU's kernel."""
    row, squared = gpu.staged_nearest(points, clusters.atoms[common], _FIRST_STAGE, threshold)
    within = squared <= threshold**2
    near, left = within.nonzero().flatten(), (~within).nonzero().flatten()
    index = common[row[near]]
    difference = points[near] - clusters.atoms[index]
    return (
        clusters.with_assigned(index, difference.norm(dim=1), difference),
        left,
        squared[left].sqrt(),
    )


def prune(
    clusters: Clusters, size: int, tolerance: float = 0.0
) -> tuple[Clusters, Clusters, float]:
    """Keep some of the atoms, chosen by :func:`~anomalib_sgfr.core.k_center.k_center_greedy`.

    Args:
        clusters (Clusters): Atoms and statistics.
        size (int): Number of atoms to keep; fewer if fewer are distinct.
        tolerance (float): Stop before ``size`` once every atom lies within this distance of those
            kept.

    Returns:
        tuple[Clusters, Clusters, float]: The clusters kept, those dropped, and the largest distance
        of a dropped atom from those kept.
    """
    taken, radius = k_center_greedy(clusters.atoms, size, tolerance=tolerance)
    dropped = torch.ones_like(clusters.count, dtype=torch.bool)
    dropped[taken] = False
    return clusters.rows(taken), clusters.rows(dropped), radius


def reassign(clusters: Clusters, others: Clusters) -> Clusters:
    """Clusters with the members of others, each other cluster assigned to the nearest atom."""
    if not len(others.atoms):
        return clusters
    return clusters.with_assigned(*_nearest_atom(others.atoms, clusters.atoms), other=others)


def merge(
    scale_clusters: list[Clusters], size: int, tolerance: float = 0.0
) -> tuple[Clusters, float]:
    """Merge the clusters of parts of the data into at most ``size``; arguments as :func:`prune`.

    With fewer than ``size`` atoms kept, the tolerance holds for all members, not for the dropped
    atoms alone.

    Returns:
        tuple[Clusters, float]: The clusters, and the largest distance of a dropped atom from those
        kept; of a member of one, if that exceeds the tolerance with ``size`` atoms kept.
    """
    joined = scale_clusters[0]
    for other in scale_clusters[1:]:
        joined = joined.joined(other)
    kept, dropped, radius = prune(joined, size, tolerance)
    if tolerance > 0.0 and radius <= tolerance and len(dropped.atoms):
        reach = _reach(dropped, kept)
        order = reach.argsort(descending=True, stable=True)
        more = min(int((reach > tolerance).sum()), size - len(kept.atoms))
        kept, dropped = kept.joined(dropped.rows(order[:more])), dropped.rows(order[more:])
        farthest = float(_reach(dropped, kept).max()) if len(dropped.atoms) else 0.0
        radius = farthest if farthest > tolerance else radius
    return reassign(kept, dropped), radius


def _reach(others: Clusters, clusters: Clusters) -> Tensor:
    """Upper bound of the distance of each other cluster's members from the nearest atom."""
    return _nearest_atom(others.atoms, clusters.atoms)[1] + others.radius


def recentred(clusters: Clusters, limit: float = torch.inf) -> Clusters:
    r"""Move each atom to the mean of its members: a step of k-means (Lloyd 1982).

    A member within :math:`\rho` of the atom lies within :math:`\rho + s` of the mean, a shift of
    length :math:`s` away. None of :math:`n` members whose squared distances from their mean sum to
    :math:`q` lies farther from it than :math:`\sqrt{q (n - 1) / n}` (Samuelson 1968).

    Args:
        clusters (Clusters): Atoms and statistics.
        limit (float): Largest radius that a shift may lead to; an atom moves no farther. Defaults
            to infinity.

    Returns:
        Clusters: The moved atoms, with ``radius`` and ``squares`` that hold for them.
    """
    count, radius = clusters.count.double().clamp_min(1.0), clusters.radius.double()
    shift = clusters.offset / count[:, None]
    length = shift.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)
    share = ((limit - radius) / length).clamp(0.0, 1.0)
    atoms = (clusters.atoms + shift * share[:, None]).to(clusters.atoms.dtype)
    farthest = (squares_about(clusters, shift) * (1.0 - 1.0 / count)).sqrt()
    farthest = farthest + (clusters.atoms + shift - atoms).norm(dim=1)
    there = moved(clusters, atoms)
    return there._replace(radius=torch.minimum(there.radius, farthest.to(there.radius.dtype)))


def moved(clusters: Clusters, atoms: Tensor) -> Clusters:
    """Move atoms; each keeps its members.

    Args:
        clusters (Clusters): Atoms and statistics.
        atoms (Tensor): Their new values, shape ``(n, d)``.

    Returns:
        Clusters: With ``radius`` and ``squares`` that hold for the new values.
    """
    shift = atoms.double() - clusters.atoms
    return clusters._replace(
        atoms=atoms,
        radius=(clusters.radius.double() + shift.norm(dim=1)).to(clusters.radius.dtype),
        squares=squares_about(clusters, shift),
        offset=clusters.offset - shift * clusters.count[:, None],
    )


def _nearest_atom(points: Tensor, atoms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row of each point's nearest atom, the distance from it, and the point less the atom."""
    if gpu.serve(points):
        index, _ = gpu.staged_nearest(points, atoms, len(atoms), 0.0)
        difference = points - atoms[index]
        return index, difference.norm(dim=1), difference
    centre = middle(atoms)
    about_centre = atoms - centre
    length = about_centre.square().sum(1)
    parts = in_blocks(points, len(atoms))
    buffer = atoms.new_empty(len(parts[0]), len(atoms))  # one for all products
    index = torch.cat(
        [
            row_argmin(
                torch.addmm(
                    length, part - centre, about_centre.T, alpha=-2.0, out=buffer[: len(part)]
                )
            )
            for part in parts
        ]
    )
    difference = points - atoms[index]
    return index, difference.norm(dim=1), difference  # exact where it is small


def renumber_images(
    scale_clusters: Sequence[Clusters], images: Mapping[int, str]
) -> tuple[list[Clusters], list[str]]:
    """Number the images that atoms come from anew: from zero, without gaps, each path once.

    Args:
        scale_clusters (Sequence[Clusters]): Clusters of each scale.
        images (Mapping[int, str]): Paths by the numbers in ``origin``.

    Returns:
        tuple[list[Clusters], list[str]]: The clusters with the new numbers, and the paths in their
        order. An image without a path gets the number -1.
    """
    every = torch.cat([clusters.origin[:, 0] for clusters in scale_clusters])
    numbers, place = every.unique(return_inverse=True)
    paths = [images.get(number) for number in numbers.tolist()]
    new = {
        path: index
        for index, path in enumerate(dict.fromkeys(path for path in paths if path is not None))
    }
    table = numbers.new_tensor([-1 if path is None else new[path] for path in paths])
    changed = [
        clusters._replace(origin=torch.cat((image[:, None], clusters.origin[:, 1:]), 1))
        for clusters, image in zip(
            scale_clusters,
            table[place].split([len(clusters.origin) for clusters in scale_clusters]),
            strict=True,
        )
    ]
    return changed, list(new)


def shift_images(clusters: Clusters, by: int) -> Clusters:
    """Clusters with ``by`` added to the known numbers of images in ``origin``."""
    image = clusters.origin[:, :1]
    return clusters._replace(
        origin=torch.cat((torch.where(image < 0, image, image + by), clusters.origin[:, 1:]), 1)
    )
