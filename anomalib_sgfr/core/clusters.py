"""Covers: atoms, what is known of the embeddings each of them stands for, and how both change.

Each atom keeps account of the embeddings it stands for: how far from it they can lie at most, the sum of their offsets
and of their squared distances. See :mod:`anomalib_sgfr.core.certificate` for what follows.

Where the atoms of a bank come from: numbers of images, and the images' paths.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from anomalib_sgfr.core import gpu
from anomalib_sgfr.core.k_center import farthest_first, separated
from anomalib_sgfr.core.linear_algebra import in_blocks, least_in_row, middle
from anomalib_sgfr.core.patch_grid import unknown_origins

__all__ = ["Cover", "absorb", "centred", "merge", "moved", "renumbered", "settle", "shifted", "squares_about", "thin"]


_LOOKED_AT_FIRST = 512  # atoms that stand for the most embeddings: most of those to come lie near them
_ROWS, _ROWS_ON_CARD = 8192, 2**17


class Cover(NamedTuple):
    """Atoms, and what is known of the embeddings each of them stands for.

    Attributes:
        atoms (Tensor): Shape ``(n, d)``.
        radius (Tensor): No embedding an atom stands for lies farther from it than this, shape ``(n,)``.
        count (Tensor): Number of embeddings each atom stands for, itself included, shape ``(n,)``, ``int64``.
        squares (Tensor): Their squared distances from the atom sum to no more than this, shape ``(n,)``, ``float64``.
        origin (Tensor): Where each atom was seen: number of the image, row and column of the patch, rows and columns
            of the image's patches, shape ``(n, 5)``, ``int32``; -1 where that is not known.
        offset (Tensor): Sum of the embeddings less the atom, over those it stands for, shape ``(n, d)``, ``float64``;
            NaN where that is not known any more.
    """

    atoms: Tensor
    radius: Tensor
    count: Tensor  # type: ignore[assignment]  # hides tuple.count, which nobody needs
    squares: Tensor
    origin: Tensor
    offset: Tensor

    @classmethod
    def of(cls, points: Tensor, origin: Tensor | None = None) -> "Cover":
        """Cover of embeddings ``(n, d)`` by themselves; it shares their memory, and that of ``origin``."""
        zeros = torch.zeros_like(points[:, 0])
        if origin is None:
            origin = unknown_origins(len(points), points.device)
        nothing = points.new_zeros((), dtype=torch.float64).expand_as(points)  # takes no memory
        return cls(points, zeros, torch.ones_like(zeros, dtype=torch.int64), zeros.double(), origin, nothing)

    @classmethod
    def empty(cls, device: torch.device | None = None) -> "Cover":
        """No atoms: what a process without images contributes to those of the others, of their width and type."""
        return cls.of(torch.empty(0, 1, device=device))

    def rows(self, index: Tensor | slice) -> "Cover":
        """Some of the atoms, by index, mask or slice."""
        return Cover(*(part[index] for part in self))

    def joined(self, other: "Cover") -> "Cover":
        """Both covers, one after the other."""
        return Cover(*(torch.cat(parts) for parts in zip(self, other, strict=True)))

    def account(self, index: Tensor, distance: Tensor, difference: Tensor, other: "Cover | None" = None) -> "Cover":
        """Let atoms ``index`` stand for other embeddings too.

        Args:
            index (Tensor): Rows of the atoms, shape ``(m,)``.
            distance (Tensor): Of each embedding from its atom, shape ``(m,)``.
            difference (Tensor): The embedding less the atom, shape ``(m, d)``.
            other (Cover | None): The embeddings' own accounts, if they were atoms.

        Returns:
            Cover: With the same atoms.
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
            radius=self.radius.scatter_reduce(0, index, distance if other is None else distance + other.radius, "amax"),
            count=self.count.index_add(0, index, count),
            squares=squares,
            offset=offset,
        )


def squares_about(cover: Cover, shift: Tensor) -> Tensor:
    r"""Sum of squared distances of what each atom stands for from a point beside the atom.

    .. math:: \sum \|x - a - s\|^2 = \sum \|x - a\|^2 - 2 s^\top \sum (x - a) + n \|s\|^2,

    and no more than :math:`(\sqrt{\sum \|x - a\|^2} + \sqrt n \|s\|)^2` (Minkowski) where the offset is not known.

    Args:
        cover (Cover): Atoms and what they stand for.
        shift (Tensor): The point less the atom, shape ``(n, d)``, ``float64``.

    Returns:
        Tensor: Shape ``(n,)``, ``float64``; an upper bound, rounding of the embeddings' differences included.
    """
    moved = cover.count * shift.square().sum(1)
    rounding = 2.0 * torch.finfo(cover.atoms.dtype).eps * (cover.squares + moved)
    exact = cover.squares - 2.0 * (shift * cover.offset).sum(1) + moved
    most = (cover.squares.sqrt() + moved.sqrt()).square()
    return torch.where(exact.isnan(), most, (exact + rounding).clamp_min(0.0))


def absorb(cover: Cover, points: Tensor, threshold: float, origin: Tensor | None = None) -> Cover:
    """Take embeddings into a cover: those within ``threshold`` of an atom are accounted to it, others become atoms.

    Args:
        cover (Cover): Atoms so far.
        points (Tensor): Embeddings, shape ``(n, d)``.
        threshold (float): Euclidean distance.
        origin (Tensor | None): Where the embeddings were seen, shape ``(n, 5)``, as in :class:`Cover`.

    Returns:
        Cover: The atoms so far, with what they stand for now, and the new ones after them.
    """
    if origin is None:
        origin = unknown_origins(len(points), points.device)
    common = cover.count.argsort(descending=True, stable=True)
    search = _on_card if gpu.serve(points) else _in_turn
    cover, left, least = search(cover, common, points, threshold)
    left = left[least.argsort(descending=True, stable=True)]
    novel = Cover.of(points[left], origin[left])
    chosen = separated(novel.atoms, threshold)
    close = torch.ones_like(novel.count, dtype=torch.bool)
    close[chosen] = False
    return cover.joined(settle(novel.rows(chosen), novel.rows(close)))


def _in_turn(cover: Cover, common: Tensor, points: Tensor, threshold: float) -> tuple[Cover, Tensor, Tensor]:
    """Account points to atoms within the threshold, the common ones first; which are left, and how far from all."""
    left = torch.arange(len(points), device=points.device)  # near no atom so far
    least = torch.full_like(points[:, 0], torch.inf)
    atoms, done = cover.atoms, 0
    while done < len(common) and len(left):
        among = common[done : max(_LOOKED_AT_FIRST, 2 * done)]
        done += len(among)
        index, distance, difference = _nearest_atom(points[left], atoms[among])
        near = distance <= threshold
        cover = cover.account(among[index[near]], distance[near], difference[near])
        left, least = left[~near], torch.minimum(least, distance)[~near]
    return cover, left, least


def _on_card(cover: Cover, common: Tensor, points: Tensor, threshold: float) -> tuple[Cover, Tensor, Tensor]:
    """The same in one launch, and some to account."""
    row, squared = gpu.nearest_in_turn(points, cover.atoms[common], _LOOKED_AT_FIRST, threshold)
    within = squared <= threshold**2
    near, left = within.nonzero().flatten(), (~within).nonzero().flatten()
    index = common[row[near]]
    difference = points[near] - cover.atoms[index]
    return cover.account(index, difference.norm(dim=1), difference), left, squared[left].sqrt()


def thin(cover: Cover, size: int, tolerance: float = 0.0) -> tuple[Cover, Cover, float]:
    """Choose atoms of a cover, farthest first.

    Args:
        cover (Cover): Atoms.
        size (int): Number of atoms to keep; fewer if fewer are distinct.
        tolerance (float): Distance within which an atom needs no other: fewer than ``size`` are kept if that is enough.

    Returns:
        tuple[Cover, Cover, float]: What is kept, what is dropped, each with its own account, and the largest distance
        of a dropped atom from those kept.
    """
    taken, radius = farthest_first(cover.atoms, size, tolerance=tolerance)
    dropped = torch.ones_like(cover.count, dtype=torch.bool)
    dropped[taken] = False
    return cover.rows(taken), cover.rows(dropped), radius


def settle(cover: Cover, others: Cover) -> Cover:
    """Account what ``others``' atoms stand for to the nearest atom of a cover each."""
    return cover.account(*_nearest_atom(others.atoms, cover.atoms), other=others) if len(others.atoms) else cover


def merge(covers: list[Cover], size: int, tolerance: float = 0.0) -> tuple[Cover, float]:
    """Join covers of parts of the data into one of at most ``size`` atoms; arguments as for :func:`thin`.

    Within the tolerance of the atoms is then all that these stand for, not the dropped atoms alone, as long as there is
    room.

    Returns:
        tuple[Cover, float]: The cover, and the largest distance of a dropped atom from those kept; of what a dropped
        atom stands for, if that exceeds the tolerance and there was no room.
    """
    joined = covers[0]
    for other in covers[1:]:
        joined = joined.joined(other)
    kept, dropped, radius = thin(joined, size, tolerance)
    if tolerance > 0.0 and radius <= tolerance and len(dropped.atoms):
        reach = _reach(dropped, kept)
        order = reach.argsort(descending=True, stable=True)
        room = min(int((reach > tolerance).sum()), size - len(kept.atoms))
        kept, dropped = kept.joined(dropped.rows(order[:room])), dropped.rows(order[room:])
        farthest = float(_reach(dropped, kept).max()) if len(dropped.atoms) else 0.0
        radius = farthest if farthest > tolerance else radius
    return settle(kept, dropped), radius


def _reach(others: Cover, cover: Cover) -> Tensor:
    """How far what ``others``' atoms stand for may lie from the nearest atom of a cover."""
    return _nearest_atom(others.atoms, cover.atoms)[1] + others.radius


def centred(cover: Cover, limit: float = torch.inf) -> Cover:
    r"""Move each atom to the mean of the embeddings it stands for: a step of k-means (Lloyd 1982).

    An embedding at a distance of at most :math:`\rho` from an atom lies at most :math:`\rho + s` from the mean, a shift
    of length ``s`` away. With :math:`n` embeddings and the sum :math:`q` of their squared distances from the mean, none
    lies farther from it than :math:`\sqrt{q (n - 1) / n}` (Samuelson 1968).

    Args:
        cover (Cover): Atoms and what they stand for.
        limit (float): Largest radius that may become of a shift: an atom moves no farther. Defaults to infinity.

    Returns:
        Cover: The moved atoms; what they stand for lies in the new ``radius`` and ``squares``.
    """
    count, radius = cover.count.double().clamp_min(1.0), cover.radius.double()
    shift = cover.offset / count[:, None]
    share = ((limit - radius) / shift.norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)).clamp(0.0, 1.0)
    atoms = (cover.atoms + shift * share[:, None]).to(cover.atoms.dtype)
    farthest = (squares_about(cover, shift) * (1.0 - 1.0 / count)).sqrt() + (cover.atoms + shift - atoms).norm(dim=1)
    there = moved(cover, atoms)
    return there._replace(radius=torch.minimum(there.radius, farthest.to(there.radius.dtype)))


def moved(cover: Cover, atoms: Tensor) -> Cover:
    """Move atoms, each with what it stands for.

    Args:
        cover (Cover): Atoms and what they stand for.
        atoms (Tensor): Where they move to, shape ``(n, d)``.

    Returns:
        Cover: With a ``radius`` and ``squares`` that hold there.
    """
    shift = atoms.double() - cover.atoms
    return cover._replace(
        atoms=atoms,
        radius=(cover.radius.double() + shift.norm(dim=1)).to(cover.radius.dtype),
        squares=squares_about(cover, shift),
        offset=cover.offset - shift * cover.count[:, None],
    )


def _nearest_atom(points: Tensor, atoms: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row of the nearest atom and the Euclidean distance from it, each ``(n,)``, and the point less the atom."""
    if gpu.serve(points):
        index, _ = gpu.nearest_in_turn(points, atoms, len(atoms), 0.0)
        difference = points - atoms[index]
        return index, difference.norm(dim=1), difference
    centre = middle(atoms)
    about_centre = atoms - centre
    length = about_centre.square().sum(1)
    parts = in_blocks(points, len(atoms))
    room = atoms.new_empty(len(parts[0]), len(atoms))  # one for all products
    index = torch.cat(
        [
            least_in_row(torch.addmm(length, part - centre, about_centre.T, alpha=-2.0, out=room[: len(part)]))
            for part in parts
        ]
    )
    difference = points - atoms[index]
    return index, difference.norm(dim=1), difference  # exact where it is small


def renumbered(covers: Sequence[Cover], images: Mapping[int, str]) -> tuple[list[Cover], list[str]]:
    """Number anew the images that atoms come from, from zero, without gaps, each path once.

    Args:
        covers (Sequence[Cover]): Atoms of each scale.
        images (Mapping[int, str]): Paths by the numbers in the covers' ``origin``.

    Returns:
        tuple[list[Cover], list[str]]: The covers with the new numbers, and the paths they number. An image without a
        path gets the number -1.
    """
    every = torch.cat([cover.origin[:, 0] for cover in covers])
    numbers, place = every.unique(return_inverse=True)
    paths = [images.get(number) for number in numbers.tolist()]
    new = {path: index for index, path in enumerate(dict.fromkeys(path for path in paths if path is not None))}
    table = numbers.new_tensor([-1 if path is None else new[path] for path in paths])
    changed = [
        cover._replace(origin=torch.cat((image[:, None], cover.origin[:, 1:]), 1))
        for cover, image in zip(covers, table[place].split([len(cover.origin) for cover in covers]), strict=True)
    ]
    return changed, list(new)


def shifted(cover: Cover, by: int) -> Cover:
    """Add to the numbers of the images that atoms come from, where they are known."""
    image = cover.origin[:, :1]
    return cover._replace(origin=torch.cat((torch.where(image < 0, image, image + by), cover.origin[:, 1:]), 1))
