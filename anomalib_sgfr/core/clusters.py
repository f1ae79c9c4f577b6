"""Covers: atoms, what is known of the embeddings each of them stands for, and how both change.

Each atom keeps with_assigned of the embeddings it stands for: how far from it they can lie at most, the
sum of their offsets and of their squared distances. See :mod:`anomalib_sgfr.core.certificate` for
what follows.

Where the atoms of a bank come from: numbers of images, and the images' paths.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from anomalib_sgfr.core import gpu
from anomalib_sgfr.core.k_center import greedy_separated, k_center_greedy
from anomalib_sgfr.core.linear_algebra import in_blocks, middle, row_argmin
from anomalib_sgfr.core.patch_grid import unknown_origins

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


_LOOKED_AT_FIRST = (
    512  # atoms that stand for the most embeddings: most of those to come lie near them
)
_ROWS, _ROWS_ON_CARD = 8192, 2**17


class Clusters(NamedTuple):
    """Atoms, and what is known of the embeddings each of them stands for.

    Attributes:
        atoms (Tensor): Shape ``(n, d)``.
        radius (Tensor): No embedding an atom stands for lies farther from it than this, shape
            ``(n,)``.
        count (Tensor): Number of embeddings each atom stands for, itself included, shape ``(n,)``,
            ``int64``.
        squares (Tensor): Their squared distances from the atom sum to no more than this, shape
            ``(n,)``, ``float64``.
        origin (Tensor): Where each atom was seen: number of the image, row and column of the patch,
            rows and columns of the image's patches, shape ``(n, 5)``, ``int32``; -1 where that is
            not known.
        offset (Tensor): Sum of the embeddings less the atom, over those it stands for, shape ``(n,
            d)``, ``float64``; NaN where that is not known any more.
    """

    atoms: Tensor
    radius: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs
    squares: Tensor
    origin: Tensor
    offset: Tensor

    @classmethod
    def of(cls, points: Tensor, origin: Tensor | None = None) -> "Clusters":
        """Cover of embeddings ``(n, d)`` by themselves; it shares their memory, and that of
        ``origin``.
        """
        zeros = torch.zeros_like(points[:, 0])
        if origin is None:
            origin = unknown_origins(len(points), points.device)
        nothing = points.new_zeros((), dtype=torch.float64).expand_as(points)  # takes no memory
        return cls(
            points,
            zeros,
            torch.ones_like(zeros, dtype=torch.int64),
            zeros.double(),
            origin,
            nothing,
        )

    @classmethod
    def empty(cls, device: torch.device | None = None) -> "Clusters":
        """No atoms: what a process without images contributes to those of the others, of their
        width and type.
        """
        return cls.of(torch.empty(0, 1, device=device))

    def rows(self, index: Tensor | slice) -> "Clusters":
        """Some of the atoms, by index, mask or slice."""
        return Clusters(*(part[index] for part in self))

    def joined(self, other: "Clusters") -> "Clusters":
        """Both covers, one after the other."""
        return Clusters(*(torch.cat(parts) for parts in zip(self, other, strict=True)))

    def with_assigned(
        self, index: Tensor, distance: Tensor, difference: Tensor, other: "Clusters | None" = None
    ) -> "Clusters":
        """Let atoms ``index`` stand for other embeddings too.

        Args:
            index (Tensor): Rows of the atoms, shape ``(m,)``.
            distance (Tensor): Of each embedding from its atom, shape ``(m,)``.
            difference (Tensor): The embedding less the atom, shape ``(m, d)``.
            other (Clusters | None): The embeddings' own accounts, if they were atoms.

        Returns:
            Clusters: With the same atoms.
        """
        count = torch.ones_like(index) if other is None else other.count
        squares, offset = self.squares.clone(), self.offset.clone()
        most = _ROWS_ON_CARD if index.is_cuda else _ROWS
        for rows in torch.arange(len(index), device=index.device).split(most):  # 64 bits take room
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
    r"""Sum of squared distances of what each atom stands for from a point beside the atom.

    .. math:: \sum \|x - a - s\|^2 = \sum \|x - a\|^2 - 2 s^\top \sum (x - a) + n \|s\|^2,

    and no more than :math:`(\sqrt{\sum \|x - a\|^2} + \sqrt n \|s\|)^2` (Minkowski) where the
    offset is not known.

    Args:
        clusters (Clusters): Atoms and what they stand for.
        shift (Tensor): The point less the atom, shape ``(n, d)``, ``float64``.

    Returns:
        Tensor: Shape ``(n,)``, ``float64``; an upper bound, rounding of the embeddings' differences
            included.
    """
    moved = clusters.count * shift.square().sum(1)
    rounding = 2.0 * torch.finfo(clusters.atoms.dtype).eps * (clusters.squares + moved)
    exact = clusters.squares - 2.0 * (shift * clusters.offset).sum(1) + moved
    most = (clusters.squares.sqrt() + moved.sqrt()).square()
    return torch.where(exact.isnan(), most, (exact + rounding).clamp_min(0.0))


def assign(
    clusters: Clusters, points: Tensor, threshold: float, origin: Tensor | None = None
) -> Clusters:
    """Take embeddings into a cover: those within ``threshold`` of an atom are accounted to it,
    others become atoms.

    Args:
        clusters (Clusters): Atoms so far.
        points (Tensor): Embeddings, shape ``(n, d)``.
        threshold (float): Euclidean distance.
        origin (Tensor | None): Where the embeddings were seen, shape ``(n, 5)``, as in
            :class:`Clusters`.

    Returns:
        Clusters: The atoms so far, with what they stand for now, and the new ones after them.
    """
    if origin is None:
        origin = unknown_origins(len(points), points.device)
    common = clusters.count.argsort(descending=True, stable=True)
    search = _on_card if gpu.serve(points) else _in_turn
    clusters, left, least = search(clusters, common, points, threshold)
    left = left[least.argsort(descending=True, stable=True)]
    novel = Clusters.of(points[left], origin[left])
    chosen = greedy_separated(novel.atoms, threshold)
    close = torch.ones_like(novel.count, dtype=torch.bool)
    close[chosen] = False
    return clusters.joined(reassign(novel.rows(chosen), novel.rows(close)))


def _in_turn(
    clusters: Clusters, common: Tensor, points: Tensor, threshold: float
) -> tuple[Clusters, Tensor, Tensor]:
    """Account points to atoms within the threshold, the common ones first; which are left, and how
    far from all.
    """
    left = torch.arange(len(points), device=points.device)  # near no atom so far
    least = torch.full_like(points[:, 0], torch.inf)
    atoms, done = clusters.atoms, 0
    while done < len(common) and len(left):
        among = common[done : max(_LOOKED_AT_FIRST, 2 * done)]
        done += len(among)
        index, distance, difference = _nearest_atom(points[left], atoms[among])
        near = distance <= threshold
        clusters = clusters.with_assigned(among[index[near]], distance[near], difference[near])
        left, least = left[~near], torch.minimum(least, distance)[~near]
    return clusters, left, least


def _on_card(
    clusters: Clusters, common: Tensor, points: Tensor, threshold: float
) -> tuple[Clusters, Tensor, Tensor]:
    """The same in one launch, and some to account."""
    row, squared = gpu.staged_nearest(points, clusters.atoms[common], _LOOKED_AT_FIRST, threshold)
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
    """Choose atoms of a cover, farthest first.

    Args:
        clusters (Clusters): Atoms.
        size (int): Number of atoms to keep; fewer if fewer are distinct.
        tolerance (float): Distance within which an atom needs no other: fewer than ``size`` are
            kept if that is enough.

    Returns:
        tuple[Clusters, Clusters, float]: What is kept, what is dropped, each with its own account,
        and the largest distance of a dropped atom from those kept.
    """
    taken, radius = k_center_greedy(clusters.atoms, size, tolerance=tolerance)
    dropped = torch.ones_like(clusters.count, dtype=torch.bool)
    dropped[taken] = False
    return clusters.rows(taken), clusters.rows(dropped), radius


def reassign(clusters: Clusters, others: Clusters) -> Clusters:
    """Account what ``others``' atoms stand for to the nearest atom of a cover each."""
    return (
        clusters.with_assigned(*_nearest_atom(others.atoms, clusters.atoms), other=others)
        if len(others.atoms)
        else clusters
    )


def merge(
    scale_clusters: list[Clusters], size: int, tolerance: float = 0.0
) -> tuple[Clusters, float]:
    """Join covers of parts of the data into one of at most ``size`` atoms; arguments as for
    :func:`prune`.

    Within the tolerance of the atoms is then all that these stand for, not the dropped atoms alone,
    as long as there is room.

    Returns:
        tuple[Clusters, float]: The cover, and the largest distance of a dropped atom from those
        kept; of what a dropped atom stands for, if that exceeds the tolerance and there was no
        room.
    """
    joined = scale_clusters[0]
    for other in scale_clusters[1:]:
        joined = joined.joined(other)
    kept, dropped, radius = prune(joined, size, tolerance)
    if tolerance > 0.0 and radius <= tolerance and len(dropped.atoms):
        reach = _reach(dropped, kept)
        order = reach.argsort(descending=True, stable=True)
        room = min(int((reach > tolerance).sum()), size - len(kept.atoms))
        kept, dropped = kept.joined(dropped.rows(order[:room])), dropped.rows(order[room:])
        farthest = float(_reach(dropped, kept).max()) if len(dropped.atoms) else 0.0
        radius = farthest if farthest > tolerance else radius
    return reassign(kept, dropped), radius


def _reach(others: Clusters, clusters: Clusters) -> Tensor:
    """How far what ``others``' atoms stand for may lie from the nearest atom of a cover."""
    return _nearest_atom(others.atoms, clusters.atoms)[1] + others.radius


def recentred(clusters: Clusters, limit: float = torch.inf) -> Clusters:
    r"""Move each atom to the mean of the embeddings it stands for: a step of k-means (Lloyd 1982).

    An embedding at a distance of at most :math:`\rho` from an atom lies at most :math:`\rho + s`
    from the mean, a shift of length ``s`` away. With :math:`n` embeddings and the sum :math:`q` of
    their squared distances from the mean, none lies farther from it than :math:`\sqrt{q (n - 1) /
    n}` (Samuelson 1968).

    Args:
        clusters (Clusters): Atoms and what they stand for.
        limit (float): Largest radius that may become of a shift: an atom moves no farther. Defaults
            to infinity.

    Returns:
        Clusters: The moved atoms; what they stand for lies in the new ``radius`` and ``squares``.
    """
    count, radius = clusters.count.double().clamp_min(1.0), clusters.radius.double()
    shift = clusters.offset / count[:, None]
    share = ((limit - radius) / shift.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)).clamp(
        0.0, 1.0
    )
    atoms = (clusters.atoms + shift * share[:, None]).to(clusters.atoms.dtype)
    farthest = (squares_about(clusters, shift) * (1.0 - 1.0 / count)).sqrt() + (
        clusters.atoms + shift - atoms
    ).norm(dim=1)
    there = moved(clusters, atoms)
    return there._replace(radius=torch.minimum(there.radius, farthest.to(there.radius.dtype)))


def moved(clusters: Clusters, atoms: Tensor) -> Clusters:
    """Move atoms, each with what it stands for.

    Args:
        clusters (Clusters): Atoms and what they stand for.
        atoms (Tensor): Where they move to, shape ``(n, d)``.

    Returns:
        Clusters: With a ``radius`` and ``squares`` that hold there.
    """
    shift = atoms.double() - clusters.atoms
    return clusters._replace(
        atoms=atoms,
        radius=(clusters.radius.double() + shift.norm(dim=1)).to(clusters.radius.dtype),
        squares=squares_about(clusters, shift),
        offset=clusters.offset - shift * clusters.count[:, None],
    )


def _nearest_atom(points: Tensor, atoms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row of the nearest atom and the Euclidean distance from it, each ``(n,)``, and the point less
    the atom.
    """
    if gpu.serve(points):
        index, _ = gpu.staged_nearest(points, atoms, len(atoms), 0.0)
        difference = points - atoms[index]
        return index, difference.norm(dim=1), difference
    centre = middle(atoms)
    about_centre = atoms - centre
    length = about_centre.square().sum(1)
    parts = in_blocks(points, len(atoms))
    room = atoms.new_empty(len(parts[0]), len(atoms))  # one for all products
    index = torch.cat(
        [
            row_argmin(
                torch.addmm(
                    length, part - centre, about_centre.T, alpha=-2.0, out=room[: len(part)]
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
    """Number anew the images that atoms come from, from zero, without gaps, each path once.

    Args:
        scale_clusters (Sequence[Clusters]): Atoms of each scale.
        images (Mapping[int, str]): Paths by the numbers in the covers' ``origin``.

    Returns:
        tuple[list[Clusters], list[str]]: The covers with the new numbers, and the paths they
        number. An image without a path gets the number -1.
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
    """Add to the numbers of the images that atoms come from, where they are known."""
    image = clusters.origin[:, :1]
    return clusters._replace(
        origin=torch.cat((torch.where(image < 0, image, image + by), clusters.origin[:, 1:]), 1)
    )
