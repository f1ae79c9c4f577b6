"""Subspace sampling: a small bank that covers a stream of nominal embeddings, in one pass and bounded memory.

A farthest-first (k-center) selection kept up to date over a stream, in the spirit of the incremental k-center of
Charikar et al. (STOC 1997): an embedding becomes an atom only if it lies farther from every atom than the threshold,
the farthest of a batch first; when there are too many atoms, they are thinned, again farthest first, and the distance
at which the thinning stopped becomes the new threshold. The threshold never falls. A small bank is chosen in the end
from more atoms than it will have: one thinning of many loses less than many thinnings of few.

Each atom keeps account of the embeddings it stands for: how far from it they can lie at most, and the sum of their
squared distances. What is thinned out
retires with its account, which goes to the nearest atom of the bank in the end: in one step, because every step adds
its length to the bound. See :mod:`anomalib_sgfr.certificate` for what follows.

Farthest-first takes what lies at the edge, noise included. In the end each atom therefore moves to the mean of what it
stands for, as in a step of k-means (Lloyd 1982), for which it keeps the sum of their offsets.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from anomalib_sgfr.selection import PRODUCT_VALUES, farthest_first, separated

__all__ = [
    "WORKING_SIZE",
    "Cover",
    "SubspaceSampler",
    "absorb",
    "centred",
    "merge",
    "moved",
    "settle",
    "squares_about",
    "thin",
]

WORKING_SIZE = 3500  # atoms that a smaller bank is chosen from, at least
_LOOKED_AT_FIRST = 512  # atoms that stand for the most embeddings: most of those to come lie near them
_ROWS = 8192
_RETIRED = 4  # times the atoms in use, before their accounts go to atoms in use after all


class Cover(NamedTuple):
    """Atoms, and what is known of the embeddings each of them stands for.

    Attributes:
        atoms (Tensor): Shape ``(n, d)``.
        radius (Tensor): No embedding an atom stands for lies farther from it than this, shape ``(n,)``.
        count (Tensor): Number of embeddings each atom stands for, itself included, shape ``(n,)``, ``int64``.
        squares (Tensor): Their squared distances from the atom sum to no more than this, shape ``(n,)``, ``float64``.
        origin (Tensor): Where each atom was seen: number of the image, row and column of the patch, shape ``(n, 3)``,
            ``int64``; -1 where that is not known.
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
        """Cover of embeddings ``(n, d)`` by themselves."""
        zeros = torch.zeros_like(points[:, 0])
        if origin is None:
            origin = torch.full((len(points), 3), -1, device=points.device)
        nothing = points.new_zeros((), dtype=torch.float64).expand_as(points)  # takes no memory
        return cls(points, zeros, torch.ones_like(zeros, dtype=torch.int64), zeros.double(), origin, nothing)

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
        for rows in torch.arange(len(index), device=index.device).split(_ROWS):  # 64 bits take room
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
        origin (Tensor | None): Where the embeddings were seen, shape ``(n, 3)``, as in :class:`Cover`.

    Returns:
        Cover: The atoms so far, with what they stand for now, and the new ones after them.
    """
    if origin is None:
        origin = torch.full((len(points), 3), -1, device=points.device)
    left = torch.arange(len(points), device=points.device)  # near no atom so far
    least = torch.full_like(points[:, 0], torch.inf)
    atoms, common = cover.atoms, cover.count.argsort(descending=True, stable=True)
    done = 0
    while done < len(common) and len(left):
        among = common[done : max(_LOOKED_AT_FIRST, 2 * done)]
        done += len(among)
        index, distance, difference = _nearest_atom(points[left], atoms[among])
        near = distance <= threshold
        cover = cover.account(among[index[near]], distance[near], difference[near])
        left, least = left[~near], torch.minimum(least, distance)[~near]
    left = left[least.argsort(descending=True, stable=True)]
    novel = Cover.of(points[left], origin[left])
    chosen = separated(novel.atoms, threshold)
    close = torch.ones_like(novel.count, dtype=torch.bool)
    close[chosen] = False
    return cover.joined(settle(novel.rows(chosen), novel.rows(close)))


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

    Returns:
        tuple[Cover, float]: The cover, and the largest distance of a dropped atom from those kept.
    """
    joined = covers[0]
    for other in covers[1:]:
        joined = joined.joined(other)
    kept, dropped, radius = thin(joined, size, tolerance)
    return settle(kept, dropped), radius


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
    centre = atoms.mean(0)
    about_centre = atoms - centre
    length = about_centre.square().sum(1)
    rows = max(1, PRODUCT_VALUES // len(atoms))
    parts = [torch.addmm(length, part - centre, about_centre.T, alpha=-2.0).argmin(1) for part in points.split(rows)]
    index = torch.cat(parts)
    difference = points - atoms[index]
    return index, difference.norm(dim=1), difference  # exact where it is small


class SubspaceSampler:
    """Streaming learner of a bank: ``observe`` batches, then read ``bank``.

    Holds at most ``6 * max(bank_size, working_size)`` embeddings between calls, whatever the length of the stream: a
    third as atoms, the others retired. Deterministic for a given order of the stream; reading the bank changes nothing.

    Args:
        bank_size (int): Largest number of atoms in the bank.
        tolerance (float): Distance (Euclidean, embedding units) within which an embedding needs no atom of its own: the
            bank stays smaller than ``bank_size`` when all that was seen lies within it. Defaults to ``0.0``.
        working_size (int): Atoms to thin to while the stream lasts, if that is more than ``bank_size``. Defaults to
            ``3500``.

    Attributes:
        patches_seen_ (int): Embeddings observed so far.
        threshold_ (float): Distance above which an embedding becomes an atom now.

    Example:
        >>> sampler = SubspaceSampler(bank_size=2)
        >>> sampler.observe(torch.tensor([[0.0], [1.0], [9.0], [10.0], [0.5]]))
        >>> sampler.bank().flatten().tolist()
        [0.0, 10.0]

    Raises:
        ValueError: If ``bank_size`` is below one or ``tolerance`` is negative or not finite.
    """

    def __init__(self, bank_size: int, tolerance: float = 0.0, working_size: int = WORKING_SIZE) -> None:
        if bank_size < 1:
            msg = f"bank_size must be at least 1, got {bank_size}."
            raise ValueError(msg)
        if not 0.0 <= tolerance < float("inf"):
            msg = f"tolerance must be a finite distance of at least 0, got {tolerance}."
            raise ValueError(msg)
        self.bank_size = bank_size
        self.tolerance = tolerance
        self.working_size = max(bank_size, working_size)
        self.patches_seen_ = 0
        self.threshold_ = tolerance
        self._cover: Cover | None = None
        self._retired: Cover | None = None

    def resume(self, cover: Cover, threshold: float) -> None:
        """Go on from a bank learnt before, instead of from nothing.

        Args:
            cover (Cover): The bank, with what its atoms stand for.
            threshold (float): ``threshold_`` of the sampler that learnt it.
        """
        self._cover = Cover(*(part.clone() for part in cover))
        self.threshold_ = max(threshold, self.tolerance)
        self.patches_seen_ = int(cover.count.sum())

    @property
    def atoms_held(self) -> int:
        """Atoms now: up to twice ``working_size``, before the last thinning."""
        return 0 if self._cover is None else len(self._cover.atoms)

    @torch.no_grad()
    def observe(self, embeddings: Tensor, origin: Tensor | None = None) -> None:
        """Take a batch of nominal embeddings into account.

        Args:
            embeddings (Tensor): Shape ``(n, d)``, floating point, of one width, dtype and device over the stream.
            origin (Tensor | None): Image, row and column of each, for :class:`Cover`; shape ``(n, 3)``, ``int64``.

        Raises:
            ValueError: If the batch is not such a matrix or holds NaN or infinite values. The state is unchanged then.
        """
        width = None if self._cover is None else self._cover.atoms.shape[1]
        if embeddings.ndim != 2 or (width is not None and embeddings.shape[1] != width):  # noqa: PLR2004
            msg = f"embeddings must have shape (n, {width or 'd'}), got {tuple(embeddings.shape)}."
            raise ValueError(msg)
        if origin is not None and origin.shape != (len(embeddings), 3):
            msg = f"origin must have shape ({len(embeddings)}, 3), got {tuple(origin.shape)}."
            raise ValueError(msg)
        if not torch.isfinite(embeddings).all():
            msg = "embeddings hold NaN or infinite values; check the images and the backbone's weights."
            raise ValueError(msg)
        if len(embeddings) == 0:
            return
        if self._cover is None:
            self._thin(Cover.of(embeddings.clone(), origin), 2 * self.working_size, self.tolerance)
        else:
            self._cover = absorb(self._cover, embeddings, self.threshold_, origin)
            if len(self._cover.atoms) > 2 * self.working_size:
                self._thin(self._cover, self.working_size)
        self.patches_seen_ += embeddings.shape[0]

    def _thin(self, cover: Cover, size: int, tolerance: float = 0.0) -> None:
        # only what stands for itself alone may go for being within the tolerance: distances would add up
        self._cover, dropped, radius = thin(cover, size, tolerance)
        self.threshold_ = max(self.threshold_, radius)
        retired = dropped if self._retired is None else self._retired.joined(dropped)
        if len(retired.atoms) > _RETIRED * self.working_size:
            self._cover, retired = settle(self._cover, retired), retired.rows(slice(0))
        self._retired = retired

    def bank(self) -> Tensor:
        """The bank learnt so far.

        Returns:
            Tensor: Atoms, shape ``(M, d)`` with ``1 <= M <= bank_size``; exact duplicates are dropped.

        Raises:
            ValueError: If no embedding was observed.
        """
        return self.cover().atoms.clone()

    def images(self) -> set[int]:
        """Numbers of the images that atoms held now come from."""
        held = [part.origin[:, 0] for part in (self._cover, self._retired) if part is not None]
        return set(torch.cat(held).unique().tolist()) if held else set()

    def cover(self) -> Cover:
        """The bank learnt so far, with what its atoms stand for; raises as :meth:`bank`."""
        return self.learnt()[0]

    @torch.no_grad()
    def learnt(self, size: int | None = None) -> tuple[Cover, float]:
        """The bank learnt so far, with what its atoms stand for; raises as :meth:`bank`.

        Args:
            size (int | None): Largest number of atoms; ``bank_size`` if ``None``. More are worth having where a bank is
                yet to be made of several covers, by :func:`merge`.

        Returns:
            tuple[Cover, float]: The cover, and the distance above which an embedding would need an atom of its own.
        """
        if self._cover is None:
            msg = "no nominal embedding was observed: the training set is empty."
            raise ValueError(msg)
        kept, dropped, radius = thin(self._cover, size or self.bank_size)
        others = dropped if self._retired is None else self._retired.joined(dropped)
        return settle(kept, others), max(self.threshold_, radius)
